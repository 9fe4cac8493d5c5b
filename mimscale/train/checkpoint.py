"""Checkpoints that are complete or absent.

    checkpoints/.tmp-step_00000100/   every rank writes here: DeepSpeed's shards, its position; rank 0 the weights
    -> each rank flushes its files and reports their size and sha256 -> rank 0 writes manifest.json
    -> rename to step_00000100 -> `newest` pointer by temp + rename -> prune, never the newest good one

A tag without a manifest that verifies is no checkpoint. `weights.safetensors` (fp32) lies in each, so that evaluation,
transfer and export need neither DeepSpeed nor the right number of ranks. No torch here: login nodes list them too.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from mimscale import durable
from mimscale.console import say
from mimscale.errors import CheckpointError
from mimscale.train.config import CheckpointConfig
from mimscale.train.retention import read_scores, why_kept
from mimscale.train.run_dir import RunDir
from mimscale.world import World

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


class Saveable(Protocol):
    """What checkpoints need of an engine; see `mimscale.train.engine.Engine`."""

    zero_stage: int

    def save(self, folder: Path, step: int) -> list[OSError]:
        """Write this rank's state. A collective."""

    def load(self, folder: Path) -> None:
        """Read it back. A collective."""


class Together(Protocol):
    """What checkpoints need of the ranks; see `mimscale.train.ranks.Ranks`."""

    world: World

    def gather(self, item: Any) -> list[Any]:
        """One object of every rank."""

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result or error, on every rank."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Where a run goes on."""

    step: int
    position: dict[str, Any] | None  # None at step 0


def tag_name(step: int) -> str:
    """Folder name of a step's checkpoint; names sort by step."""
    return f"step_{step:08d}"


def step_of(tag: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(tag.name.removeprefix("step_"))


def tags(run: RunDir) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted((tag for tag in run.checkpoints.glob("step_*") if tag.name[5:].isdigit()), key=step_of, reverse=True)


def checkpoints_kept(run: RunDir, config: CheckpointConfig, newest_good: Path) -> dict[int, list[str]]:
    """Step -> why its checkpoint stays, for those that do; see `why_kept`. One that is not whole takes no place."""
    whole = [tag for tag in tags(run) if tag == newest_good or why_not_loadable(tag, hashes=False) is None]
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
    if version != MANIFEST_VERSION:
        raise CheckpointError(f"{tag}: manifest version {version}, this mimscale reads {MANIFEST_VERSION}")
    assert isinstance(manifest, dict)
    return manifest


def why_not_loadable(tag: Path, *, hashes: bool = True) -> str | None:
    """None when every file of a checkpoint is there with the size and sha256 of its manifest, else what is wrong.

    Args:
        tag: the checkpoint's folder.
        hashes: False compares the sizes only: milliseconds instead of a read of all bytes.
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
    for name, entry in files.items():
        try:
            reason = _why_not_as_saved(tag, name, entry, hashes=hashes)
        except ValueError as error:  # a name with a zero byte
            reason = f"{name!r} is no name of a file ({error})"
        if reason is not None:
            return reason
    return None


def _why_not_as_saved(tag: Path, name: str, entry: dict[str, Any], *, hashes: bool) -> str | None:
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
    broken: list[str] = []
    for tag in tags(run):
        reason = why_not_loadable(tag)
        if reason is None:
            for line in broken:
                say(f"checkpoint passed over: {line}")
            return tag
        broken.append(f"{tag.name}: {reason}")
    if broken:
        raise CheckpointError(
            f"{run.checkpoints}: no usable checkpoint\n  "
            + "\n  ".join(broken)
            + "\nRestore one from a backup, or start over with --fresh; a run never goes back to step 0 by itself"
        )
    return None


def refuse_other_ranks(tag: Path, manifest: dict[str, Any], world_size: int, zero_stage: int) -> None:
    """Raise CheckpointError unless a run of this size and stage can load a checkpoint."""
    saved_by = (manifest["world_size"], manifest["zero_stage"])
    if saved_by != (world_size, zero_stage):
        raise CheckpointError(
            f"{tag}: saved by {saved_by[0]} rank(s) at ZeRO stage {saved_by[1]}, this run has {world_size} at stage "
            f"{zero_stage}; continue on {saved_by[0]} rank(s) at stage {saved_by[1]}, or begin a new run"
        )


class Checkpoints:
    """Saves and restores one run. Every method but `due` is a collective.

    Args:
        run: where.
        config: when, and how many to keep.
        engine: whose state.
        ranks: the processes that share it.
        write_weights: writes weights and contract of a step into a folder, on rank 0; called on every rank, since
            gathering the weights is a collective.
    """

    def __init__(
        self,
        run: RunDir,
        config: CheckpointConfig,
        engine: Saveable,
        ranks: Together,
        write_weights: Callable[[Path, int], None],
    ) -> None:
        self._run = run
        self._config = config
        self._engine = engine
        self._ranks = ranks
        self._write_weights = write_weights
        self._newest_step: int | None = None

    def due(self, step: int) -> bool:
        """True when `step` steps done call for a save."""
        return step % self._config.every_steps == 0

    def restore(self) -> Restored:
        """Load the newest good checkpoint into the engine.

        Raises:
            CheckpointError: none is usable, or it was saved on another number of ranks or ZeRO stage.
        """
        name = self._ranks.first_does(self._find)
        if name is None:
            return Restored(step=0, position=None)
        tag = Path(name)
        manifest = read_manifest(tag)
        refuse_other_ranks(tag, manifest, self._ranks.world.size, self._engine.zero_stage)
        self._engine.load(tag)
        self._newest_step = manifest["step"]
        return Restored(step=manifest["step"], position=manifest["position"])

    def _find(self) -> str | None:
        for litter in self._run.checkpoints.glob(f"{durable.TEMPORARY_PREFIX}*"):  # of a save that was killed
            if litter.is_dir():
                shutil.rmtree(litter, ignore_errors=True)  # somebody may still read from it
            else:
                litter.unlink(missing_ok=True)
        tag = newest(self._run)
        if tag is not None:
            self._run.refuse_foreign(tag.rglob("*.pt"), CheckpointError)
        return str(tag) if tag else None

    def save(self, step: int, position: dict[str, Any]) -> None:
        """Commit a checkpoint of `step` steps done.

        Raises:
            CheckpointError: a rank could not write, or two ranks stand at different positions. The last good checkpoint
                is untouched and nothing half-written keeps a final name.
        """
        if self._newest_step == step:
            return
        final = self._run.checkpoints / tag_name(step)
        temporary = final.with_name(durable.TEMPORARY_PREFIX + final.name)
        self._ranks.first_does(lambda: _empty_folder(temporary))
        reports = self._ranks.gather(self._write_parts(temporary, step, position))
        self._ranks.first_does(lambda: self._commit(temporary, final, step, reports))
        self._newest_step = step

    def _write_parts(self, folder: Path, step: int, position: dict[str, Any]) -> dict[str, Any]:
        rank = self._ranks.world.rank
        errors = [str(error) for error in self._engine.save(folder, step)]
        position_file = folder / f"position-rank{rank:05d}.json"
        try:
            durable.write_json(position_file, position)
            self._write_weights(folder, step)
        except (OSError, CheckpointError) as error:
            errors.append(str(error))
        # DeepSpeed names its shards by rank. Rank 0 describes the files that no rank claims.
        own = [path for path in _files(folder) if f"_rank_{rank}_" in path.name or path == position_file]
        return {"rank": rank, "errors": errors, "position": position, "files": _described(folder, own)}

    def _commit(self, temporary: Path, final: Path, step: int, reports: list[dict[str, Any]]) -> None:
        problems = [f"rank {report['rank']}: {error}" for report in reports for error in report["errors"]]
        if any(report["position"] != reports[0]["position"] for report in reports):
            problems += [f"rank {report['rank']} stands at another sample: {report['position']}" for report in reports]
        try:
            if not problems:
                self._commit_files(temporary, final, step, reports)
                return
        except OSError as error:
            problems.append(f"rank 0: {error}")
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: not saved ({shutil.disk_usage(final.parent).free} bytes are free on its disk); the last good "
            "checkpoint is untouched. Free space or lower checkpoint.keep, then give the same command again\n  "
            + "\n  ".join(problems)
        )

    def _commit_files(self, temporary: Path, final: Path, step: int, reports: list[dict[str, Any]]) -> None:
        files: dict[str, Any] = {}
        for report in reports:
            files |= report["files"]
        files |= _described(temporary, [p for p in _files(temporary) if str(p.relative_to(temporary)) not in files])
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "step": step,
            "world_size": self._ranks.world.size,
            "zero_stage": self._engine.zero_stage,
            "position": reports[0]["position"],
            "saved_unix_s": time.time(),
            "files": files,
        }
        for folder in {(temporary / name).parent for name in files}:
            durable.fsync_folder(folder)
        durable.write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)  # only a broken one of the same step, which `restore` passed over
        durable.rename_folder(temporary, final)
        try:  # it is committed: what follows may fail, but is no reason to stop a run
            durable.write_text(self._run.checkpoints / "newest", final.name + "\n")
            self._prune(final)
        except OSError as error:
            say(f"{final}: committed, but clearing up older checkpoints failed ({error}); the next save tries again")

    def _prune(self, newest_good: Path) -> None:
        kept = checkpoints_kept(self._run, self._config, newest_good)
        for tag in reversed(tags(self._run)):
            if step_of(tag) not in kept:
                doomed = tag.with_name(f"{durable.TEMPORARY_PREFIX}doomed-{tag.name}")
                durable.rename_folder(tag, doomed)  # deletion is atomic too: half a checkpoint never has a final name
                shutil.rmtree(doomed)


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with durable.explained(CheckpointError, folder, "free space or check the permissions of run_dir"):
        folder.mkdir(parents=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _described(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": durable.sha256_of_file(file)}
        for file in files
    }
