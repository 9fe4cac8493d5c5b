"""Errors that a user can put right, each with the exit code that a scheduler sees.

Every message names the thing, the value and the way out. `ValueError` is for wrong arguments inside the code, `assert`
for what only a bug of ours can break.
"""


class MimscaleError(Exception):
    """Something that the user, not the programmer, can put right."""

    exit_code = 1


class ConfigError(MimscaleError):
    """A recipe, an override or a command line that cannot be used."""

    exit_code = 2


class DataError(MimscaleError):
    """A source, a store or a volume that is missing, damaged or of another format."""

    exit_code = 3


class CheckpointError(MimscaleError):
    """Checkpoints that exist but cannot be used, or one that could not be written."""

    exit_code = 4


class LaunchError(MimscaleError):
    """A job that could not be submitted or started."""

    exit_code = 5


class LostRankError(MimscaleError):
    """A rank that hangs or is gone."""

    exit_code = 6


# Not an error: stopped by a signal with everything saved; the same command continues the run.
INTERRUPTED_EXIT_CODE = 75
