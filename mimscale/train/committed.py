"""The checkpoints of a run as they lie on disk: which there are, which are whole, which stay.

A tag without a manifest that verifies is no checkpoint. No torch here: login nodes list checkpoints too.
"""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mimscale import durable
from mimscale.console import say
from mimscale.errors import CheckpointError
from mimscale.train.config import CheckpointConfig
from mimscale.train.retention import read_scores, why_kept
from mimscale.train.run_dir import RunDir

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
# Version 1 held DeepSpeed's own files. Its weights can still be read, its training state cannot.
READABLE_VERSIONS = (1, 2)
PART_PREFIX = "state-rank"  # of the files that each rank writes


def tag_name(step: int) -> str:
    """Folder name of a step's checkpoint; names sort by step."""
    return f"step_{step:08d}"


def step_of(tag: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(tag.name.removeprefix("step_"))


def tags(run: RunDir) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted((tag for tag in run.checkpoints.glob("step_*") if tag.name[5:].isdigit()), key=step_of, reverse=True)


def has_its_files(tag: Path) -> bool:
    """True when every file of a checkpoint is there with the size of its manifest."""
    return why_not_loadable(tag, hashes=False) is None


def checkpoints_kept(
    run: RunDir, config: CheckpointConfig, newest_good: Path, *, is_whole: Callable[[Path], bool] = has_its_files
) -> dict[int, list[str]]:
    """Step -> why its checkpoint stays, for those that do; see `why_kept`. One that is not whole takes no place."""
    whole = [tag for tag in tags(run) if tag == newest_good or is_whole(tag)]
    return why_kept(
        [step_of(tag) for tag in whole],
        newest_good=step_of(newest_good),
        keep=config.keep,
        keep_every_steps=config.keep_every_steps,
        keep_best=config.keep_best,
        scores=read_scores(run, config.keep_best),
    )


def read_manifest(tag: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: missing, broken or of another version.
    """
    try:
        manifest = json.loads((tag / MANIFEST).read_text())
        version = manifest["manifest_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{tag}: no readable {MANIFEST} ({error})") from None
    if version not in READABLE_VERSIONS:
        raise CheckpointError(f"{tag}: manifest version {version}, this mimscale reads {MANIFEST_VERSION}")
    assert isinstance(manifest, dict)
    return manifest


def why_not_loadable(tag: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """None when every file of a checkpoint is there with the size and sha256 of its manifest, else what is wrong.

    Args:
        tag: the checkpoint's folder.
        hashes: False compares the sizes only: milliseconds instead of a read of all bytes.
        share: (i, n) looks at every n-th file from the i-th on only, so that n ranks share the work.
    """
    if tag.is_symlink():
        return "is a link; a checkpoint lies in its run directory"
    try:
        manifest = read_manifest(tag)
    except CheckpointError as error:
        return str(error).removeprefix(f"{tag}: ")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    ):
        return f"no readable {MANIFEST} (its files are no table of bytes and sha256)"
    for name, entry in sorted(files.items())[share[0] :: share[1]]:
        try:
            reason = why_not_as_saved(tag, name, entry, hashes=hashes)
        except ValueError as error:  # a name with a zero byte
            reason = f"{name!r} is no name of a file ({error})"
        if reason is not None:
            return reason
    return None


def why_not_as_saved(tag: Path, name: str, entry: dict[str, Any], *, hashes: bool) -> str | None:
    """None when one file of a checkpoint is there with the size, and if asked the sha256, of the manifest's entry."""
    # By name and by lstat, without resolving: thousands of files on a parallel file system are looked at.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"{name} points out of the checkpoint"
    file = tag / path
    if any((tag / folder).is_symlink() for folder in (path, *path.parents[:-1])):
        return f"{name} is a link; a checkpoint holds its files itself"
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"
    if hashes and durable.sha256_of_file(file) != entry["sha256"]:
        return f"{name} has other bytes than were saved (sha256 differs)"
    return None


def newest(run: RunDir) -> Path | None:
    """The newest checkpoint that verifies, or None when there is none at all. A broken one is passed over loudly.

    Raises:
        CheckpointError: checkpoints exist but none is usable; each is named with its reason.
    """
    tag, broken = first_good(run, tags(run), why_not_loadable)
    for line in broken:
        say(f"checkpoint passed over: {line}")
    return tag


def first_good(
    run: RunDir, candidates: list[Path], why_not: Callable[[Path], str | None]
) -> tuple[Path | None, list[str]]:
    """The first candidate that is good, and what is wrong with those before it."""
    broken: list[str] = []
    for tag in candidates:
        reason = why_not(tag)
        if reason is None:
            return tag, broken
        broken.append(f"{tag.name}: {reason}")
    if broken:
        raise CheckpointError(
            f"{run.checkpoints}: no usable checkpoint\n  "
            + "\n  ".join(broken)
            + "\nRestore one from a backup, or start over with --fresh; a run never goes back to step 0 by itself"
        )
    return None, broken


def refuse_former_version(tag: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError when the training state is one that only an earlier mimscale reads."""
    if manifest["manifest_version"] != MANIFEST_VERSION:
        raise CheckpointError(
            f"{tag}: manifest version {manifest['manifest_version']} holds the training state in DeepSpeed's files, "
            f"which mimscale reads no longer (it reads version {MANIFEST_VERSION}). Finish the run with the code that "
            "wrote it (env.json and jobs.jsonl in the run directory name it), or begin a new run; evaluate and export "
            "read its weights as ever"
        )
