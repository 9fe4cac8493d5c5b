"""Which checkpoint of a run a user means. No torch here."""

from pathlib import Path

from mimscale.errors import CheckpointError
from mimscale.train.checkpoint import newest, tags, why_not_loadable
from mimscale.train.run_dir import RunDir


def find_checkpoint(run: RunDir, name: str) -> Path:
    """The checkpoint that a user means: "newest" or a folder name.

    Raises:
        CheckpointError: there is none, no such one, or it is damaged.
    """
    if name == "newest":
        tag = newest(run)
        if tag is None:
            raise CheckpointError(f"{run.checkpoints}: no checkpoint yet; let the run reach its first save")
        return tag
    tag = run.checkpoints / name
    if tag not in tags(run):
        known = ", ".join(tag.name for tag in tags(run)) or "none"
        raise CheckpointError(f"{tag}: no such checkpoint; there are: {known}")
    if (reason := why_not_loadable(tag)) is not None:
        raise CheckpointError(f"{tag}: {reason}; choose another checkpoint")
    return tag
