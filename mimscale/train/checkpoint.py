"""Checkpoints that are complete or absent.

    checkpoints/.tmp-step_00000100/   every rank writes its part of the state here; rank 0 the weights as well
    -> each rank flushes its files and reports their size and sha256 -> rank 0 writes state.json and manifest.json
    -> rename to step_00000100 -> `newest` pointer by temp + rename -> prune, never the newest good one

A tag without a manifest that verifies is no checkpoint. `weights.safetensors` (fp32) lies in each, so that evaluation,
transfer and export need neither the state nor the right number of ranks. Training stops only while each rank copies its
part; a thread writes it, and the ranks commit at the first step boundary at which all of them have written. No torch
here: login nodes list checkpoints too.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mimscale import durable
from mimscale.console import say
from mimscale.errors import CheckpointError
from mimscale.train.committed import (
    MANIFEST,
    MANIFEST_VERSION,
    first_good,
    read_manifest,
    refuse_former_version,
    tag_name,
    tags,
    why_not_loadable,
)
from mimscale.train.config import CheckpointConfig
from mimscale.train.older import OlderCheckpoints
from mimscale.train.run_dir import RunDir
from mimscale.train.watchdog import Writing
from mimscale.world import World


class Part(Protocol):
    """A copy of one rank's part of the training state; see `mimscale.train.state.Snapshot`."""

    @property
    def full_weights(self) -> dict[str, Any]:
        """Parameter -> whole fp32 tensor, on rank 0; empty elsewhere."""

    @property
    def file_bytes(self) -> int:
        """What `write` writes."""

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write and flush it; returns file -> bytes and sha256."""

    def index(self) -> Any:
        """What it holds, for `Saveable.write_index`."""


class Saveable(Protocol):
    """What checkpoints need of an engine; see `mimscale.train.engine.Engine`."""

    zero_stage: int

    @property
    def precision(self) -> str:
        """What it computes in."""

    def snapshot(self) -> Part:
        """Copy this rank's part of the training state. A collective."""

    def write_index(self, folder: Path, parts: list[Any]) -> Path:
        """Write down which part holds what, from the index of every rank's part."""

    def load(self, folder: Path, files: Iterable[str]) -> None:
        """Read back what any number of ranks at any ZeRO stage wrote. A collective."""


class Together(Protocol):
    """What checkpoints need of the ranks; see `mimscale.train.ranks.Ranks`."""

    world: World

    def gather(self, item: Any) -> list[Any]:
        """One object of every rank."""

    def gather_to_first(self, item: Any) -> list[Any]:
        """One object of every rank, on rank 0."""

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result or error, on every rank."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Where a run goes on."""

    step: int
    position: dict[str, Any] | None  # None at step 0


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was committed, and what it cost."""

    step: int
    stall_s: float  # training stood still
    write_s: float  # rank 0 wrote and hashed
    total_bytes: int  # of all ranks


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """A save under way on this rank."""

    step: int
    temporary: Path
    report: "Future[dict[str, Any]]"
    stall_s: float
    began_s: float  # by the monotonic clock
    thread: int | None  # that writes


class Checkpoints:
    """Saves and restores one run. Every method but `due`, `is_written` and `writing` is a collective.

    Args:
        run: where.
        config: when, how, and how many to keep.
        engine: whose state.
        ranks: the processes that share it.
        write_weights: writes the full weights of a step, with their contract, into a folder and returns the files;
            called on rank 0, on the writing thread.
    """

    def __init__(
        self,
        run: RunDir,
        config: CheckpointConfig,
        engine: Saveable,
        ranks: Together,
        write_weights: Callable[[Path, int, dict[str, Any]], list[Path]],
    ) -> None:
        self._run = run
        self._config = config
        self._engine = engine
        self._ranks = ranks
        self._write_weights = write_weights
        self._older = OlderCheckpoints(run, config)
        self._newest_step: int | None = None
        self._writing: _Writing | None = None
        self._failure: CheckpointError | None = None

    def due(self, step: int) -> bool:
        """True when `step` steps done call for a save."""
        return step % self._config.every_steps == 0

    def restore(self) -> Restored:
        """Load the newest good checkpoint into the engine.

        Raises:
            CheckpointError: none is usable, or an earlier mimscale saved it.
        """
        world = self._ranks.world
        candidates = [Path(name) for name in self._ranks.first_does(self._find)]

        def why_not(tag: Path) -> str | None:
            # Every rank reads some of the files: one alone would hash for minutes what hundreds have written.
            reasons = self._ranks.gather(why_not_loadable(tag, share=(world.rank, world.size)))
            return next((reason for reason in reasons if reason is not None), None)

        tag, broken = first_good(self._run, candidates, why_not)
        for line in broken if world.is_first else ():
            say(f"checkpoint passed over: {line}")
        if tag is None:
            return Restored(step=0, position=None)
        self._look_at_older(tag, candidates)
        manifest = read_manifest(tag)
        refuse_former_version(tag, manifest)
        if world.is_first:
            self._say_what_changed(tag, manifest)
        self._engine.load(tag, manifest["files"])
        self._newest_step = manifest["step"]
        return Restored(step=manifest["step"], position=manifest["position"])

    def _look_at_older(self, tag: Path, candidates: list[Path]) -> None:
        """Share the look at the files of those that may stay: rank 0 alone would take long at its first commit."""
        world, older = self._ranks.world, candidates[candidates.index(tag) + 1 :]
        own = [why_not_loadable(one, hashes=False, share=(world.rank, world.size)) for one in older]
        of_ranks = self._ranks.gather(own)
        if world.is_first:
            self._older.found(tag, whole=True)
            for one, reasons in zip(older, zip(*of_ranks, strict=True), strict=True):
                self._older.found(one, whole=not any(reasons))

    def _find(self) -> list[str]:
        for litter in self._run.checkpoints.glob(f"{durable.TEMPORARY_PREFIX}*"):  # of a save that was killed
            if litter.is_dir():
                shutil.rmtree(litter, ignore_errors=True)  # somebody may still read from it
            else:
                litter.unlink(missing_ok=True)
        return [str(tag) for tag in tags(self._run)]

    def _say_what_changed(self, tag: Path, manifest: dict[str, Any]) -> None:
        now = {
            "ranks": self._ranks.world.size,
            "ZeRO stage": self._engine.zero_stage,
            "precision": self._engine.precision,
        }
        then = dict(zip(now, (manifest[key] for key in ("world_size", "zero_stage", "precision")), strict=True))
        changes = [f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name]]
        if changes:
            say(f"{tag.name}: {', '.join(changes)}")

    def save(self, step: int, position: dict[str, Any]) -> Saved | None:
        """Copy the state of `step` steps done and begin to write it; with `checkpoint.mode: sync` also commit it.

        Returns:
            The checkpoint that was committed meanwhile: in the background mode that of the save before.

        Raises:
            CheckpointError: a save failed, this one or the one before: a rank could not write, or two ranks stand at
                different positions. The last good checkpoint is untouched and nothing half-written keeps a final name.
        """
        before = self.commit()
        if self._newest_step == step:
            return before
        began_s = time.perf_counter()
        temporary = self._run.checkpoints / f"{durable.TEMPORARY_PREFIX}{tag_name(step)}"
        part = self._engine.snapshot()
        # The parts of all ranks are about equal; rank 0 writes the weights besides.
        needed_bytes = part.file_bytes * self._ranks.world.size + _weights_bytes(part)
        try:
            self._ranks.first_does(lambda: self._make_room(temporary, needed_bytes))
        except CheckpointError as error:
            self._fails(error)
            return before
        report: Future[dict[str, Any]] = Future()
        # A daemon: a process that ends for another reason does not wait for a disk that hangs. Of a save that nobody
        # commits nothing is left.
        writer = threading.Thread(
            target=_answer, args=(report, lambda: self._write_part(temporary, step, position, part)), daemon=True
        )
        writer.start()
        stall_s = time.perf_counter() - began_s
        self._writing = _Writing(
            step=step,
            temporary=temporary,
            report=report,
            stall_s=stall_s,
            began_s=time.monotonic(),
            thread=writer.ident,
        )
        if self._config.mode == "background":
            return before
        saved = self.commit()
        self._older.wait()
        return saved

    def is_written(self) -> bool:
        """True when this rank has written its part of a save that is not yet committed."""
        return self._writing is not None and self._writing.report.done()

    def writing(self) -> Writing | None:
        """What this rank has begun to write and has not yet written. No collective; any thread may ask."""
        writing = self._writing
        if writing is None or writing.report.done():
            return None
        return Writing(tag_name(writing.step), writing.thread, writing.began_s)

    def commit(self) -> Saved | None:
        """Wait until every rank has written, and commit the save under way, if there is one.

        Raises:
            CheckpointError: it failed, and `checkpoint.on_failure` says stop.
        """
        writing = self._writing
        if writing is None:
            return None
        began_s = time.perf_counter()
        report = writing.report.result()
        self._writing = None
        reports = self._ranks.gather_to_first(report)
        try:
            total_bytes = self._ranks.first_does(lambda: self._commit(writing, reports))
        except CheckpointError as error:
            self._fails(error)
            return None
        self._newest_step, self._failure = writing.step, None
        stall_s = writing.stall_s + time.perf_counter() - began_s
        return Saved(step=writing.step, stall_s=stall_s, write_s=report["write_s"], total_bytes=total_bytes)

    def finish(self) -> Saved | None:
        """Commit what is under way; nothing may be lost any more.

        Raises:
            CheckpointError: the last save failed, whatever `checkpoint.on_failure` says: no later one will make up
                for it.
        """
        saved = self.commit()
        self._older.wait()
        if self._failure is not None:
            raise self._failure
        return saved

    def _fails(self, error: CheckpointError) -> None:
        if self._config.on_failure == "stop":
            raise error
        self._failure = error
        if self._ranks.world.is_first:
            say(f"{error}\nTraining goes on (checkpoint.on_failure=continue); the next save tries again")

    def _write_part(self, folder: Path, step: int, position: dict[str, Any], part: Part) -> dict[str, Any]:
        began_s = time.perf_counter()
        rank, errors, files = self._ranks.world.rank, [], {}
        try:
            files = part.write(folder)
            if part.full_weights:
                files |= _described(folder, self._write_weights(folder, step, part.full_weights))
        except (OSError, CheckpointError) as error:
            errors.append(str(error))
        return {
            "rank": rank,
            "errors": errors,
            "position": position,
            "files": files,
            "needed_bytes": part.file_bytes + _weights_bytes(part),
            "index": part.index(),
            "write_s": time.perf_counter() - began_s,
        }

    def _commit(self, writing: _Writing, reports: list[dict[str, Any]]) -> int:
        final = writing.temporary.with_name(tag_name(writing.step))
        problems = [f"rank {report['rank']}: {error}" for report in reports for error in report["errors"]]
        if any(report["position"] != reports[0]["position"] for report in reports):
            problems += [f"rank {report['rank']} stands at another sample: {report['position']}" for report in reports]
        try:
            if not problems:
                return self._commit_files(writing, final, reports)
        except OSError as error:
            problems.append(f"rank 0: {error}")
        shutil.rmtree(writing.temporary, ignore_errors=True)
        raise _not_saved(writing.temporary, sum(report["needed_bytes"] for report in reports), problems)

    def _commit_files(self, writing: _Writing, final: Path, reports: list[dict[str, Any]]) -> int:
        temporary = writing.temporary
        files: dict[str, Any] = {}
        for report in reports:
            files |= report["files"]
        files |= _described(temporary, [self._engine.write_index(temporary, [report["index"] for report in reports])])
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "step": writing.step,
            "world_size": self._ranks.world.size,
            "zero_stage": self._engine.zero_stage,
            "precision": self._engine.precision,
            "position": reports[0]["position"],
            "saved_unix_s": time.time(),
            "files": files,
        }
        durable.write_json(temporary / MANIFEST, manifest)  # which flushes the folder too
        shutil.rmtree(final, ignore_errors=True)  # only a broken one of the same step, which `restore` passed over
        durable.rename_folder(temporary, final)
        try:  # it is committed: what follows may fail, but is no reason to stop a run
            durable.write_text(self._run.checkpoints / "newest", final.name + "\n")
            self._older.saved(final, files)
            self._older.prune(final)
        except OSError as error:
            say(f"{final}: committed, but clearing up older checkpoints failed ({error}); the next save tries again")
        return sum(entry["bytes"] for entry in files.values())

    def _make_room(self, temporary: Path, needed_bytes: int) -> None:
        """Make an empty folder, unless the disk is plainly too small: that would harm everything else in the run."""
        self._older.wait()  # its space counts
        shutil.rmtree(temporary, ignore_errors=True)
        with durable.explained(CheckpointError, temporary, "free space or check the permissions of run_dir"):
            temporary.mkdir(parents=True)
            free_bytes = shutil.disk_usage(temporary).free
        if needed_bytes > free_bytes:
            temporary.rmdir()
            raise _not_saved(temporary, needed_bytes, [])


def _answer(future: "Future[dict[str, Any]]", work: Callable[[], dict[str, Any]]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _not_saved(temporary: Path, needed_bytes: int, problems: list[str]) -> CheckpointError:
    free_bytes = shutil.disk_usage(temporary.parent).free
    missing = f", {needed_bytes - free_bytes} bytes are missing" if needed_bytes > free_bytes else ""
    return CheckpointError(
        f"{temporary.with_name(temporary.name.removeprefix(durable.TEMPORARY_PREFIX))}: not saved (it takes "
        f"{needed_bytes} bytes, {free_bytes} are free on its disk{missing}); the last good checkpoint is untouched. "
        "Free space or lower checkpoint.keep, then give the same command again"
        + "".join(f"\n  {problem}" for problem in problems)
    )


def _weights_bytes(part: Part) -> int:
    return sum(tensor.nbytes for tensor in part.full_weights.values())


def _described(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": durable.sha256_of_file(file)}
        for file in files
    }
