"""Ends a job that does not get on: all ranks write their Python stacks, then leave with exit code 6.

A rank that hangs makes the others wait in a collective, so no main thread can be asked. Each rank has a thread that
looks at a clock. The first whose time is up writes a marker into the run directory; the others, who then have been
silent for about as long, follow it at once. Each writes its stacks and waits for those of the others before it leaves,
since a launcher ends all ranks with the first one that leaves. A checkpoint that is being written in the background is
watched too: steps are made meanwhile, but a file system that hangs would let the run go on for hours and save nothing.

    logs/stacks-rank00001.txt   stacks of all threads of a rank below a line of JSON; hangs of later jobs are appended
    logs/hang.json              the marker: which rank was first

A thread needs the interpreter's lock, and something may hold that for ever; or the disk that shall take the stacks is
what hangs. Then timers that are no Python threads write the stacks (faulthandler's) and end the process, with the same
code.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import mimscale
from mimscale import durable
from mimscale.errors import CheckpointError, LostRankError
from mimscale.train.config import HealthConfig
from mimscale.train.exit_timer import ExitTimer
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.world import World

OUR_FOLDER = Path(mimscale.__file__).parent
MARKER = "hang.json"
STACKS_GLOB = "stacks-rank*.txt"
LONGEST_LOOK_S = 5.0  # between two looks at the clock
# From this part of the limit on a silent rank looks for the marker of another: all have been silent for about as long.
FOLLOWS_AFTER = 0.5
# How long a rank waits for the stacks of the others before it leaves.
WAIT_FOR_OTHERS_S = 20.0
# Between the stacks of a process whose threads cannot run and its end.
WRITE_STACKS_S = 2.0


@dataclass(frozen=True)
class Writing:
    """A checkpoint that this rank is writing."""

    name: str
    thread: int | None  # that writes
    began_s: float  # by the monotonic clock


@dataclass(frozen=True)
class _Stuck:
    """Where one rank stood: the line of JSON above its stacks."""

    hang_id: str  # one for all ranks
    rank: int
    node: str
    silent_s: float
    at: str
    waits: bool  # for other ranks, in a collective


class Watchdog:
    """Watches one rank while the block runs.

    Args:
        run: whose `logs/` gets the stacks; outcome.json says what happened.
        config: how long a step may take.
        world: this rank.
        leave: ends the process at once, whatever its main thread does.
    """

    def __init__(
        self, run: RunDir, config: HealthConfig, world: World, *, leave: Callable[[int], object] = os._exit
    ) -> None:
        self._run, self._config, self._world, self._leave = run, config, world, leave
        self._main_thread = threading.get_ident()
        self._limit_s = config.first_step_timeout_s
        self._last_beat_s = time.monotonic()
        self._writing: Callable[[], Writing | None] = lambda: None
        self._step: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: IO[str] | None = None
        self._exit_timer = _exit_timer()
        self._marker = run.logs / MARKER

    def alive(self, step: int | None = None) -> None:
        """This rank gets on. With a step (the number done), the limit is that of a running job from now on."""
        self._last_beat_s = time.monotonic()
        if step is not None:
            is_first, self._step = self._step is None, step
            self._limit_s = self._config.hang_timeout_s
            if is_first:  # the timers still have the limit of the first step
                self._arm(self._limit_s)

    def also_watch(self, writing: Callable[[], Writing | None]) -> None:
        """Look at what this rank writes in the background as well: it may take as long as a step."""
        self._writing = writing

    def _arm(self, limit_s: float) -> None:
        """Start the timers anew; they fire while the other ranks still wait for this rank's stacks."""
        assert self._stacks is not None
        stacks_s = limit_s + WAIT_FOR_OTHERS_S / 2
        faulthandler.dump_traceback_later(stacks_s, file=self._stacks, exit=self._exit_timer is None)
        if self._exit_timer is not None:
            self._exit_timer.start(stacks_s + WRITE_STACKS_S)

    def __enter__(self) -> "Watchdog":
        path = self._run.logs / f"stacks-rank{self._world.rank:05d}.txt"
        with durable.explained(CheckpointError, path, "free space, then give the same command again"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = path.open("a")  # now, since faulthandler's timer needs an open file
            if self._world.is_first:
                self._marker.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._exit_timer is not None:
            self._exit_timer.close()
        assert self._stacks is not None
        empty = self._stacks.tell() == 0
        self._stacks.close()
        if empty:
            Path(self._stacks.name).unlink(missing_ok=True)

    def _watch(self) -> None:
        look_s = min(LONGEST_LOOK_S, self._config.hang_timeout_s / 10)
        while not self._ended.wait(look_s):
            self._arm(self._limit_s)
            now_s, writing = time.monotonic(), self._writing()
            silent = (now_s - self._last_beat_s) / self._limit_s
            written = 0.0 if writing is None else (now_s - writing.began_s) / self._config.hang_timeout_s
            part = max(silent, written)
            if part > 1 or (part > FOLLOWS_AFTER and self._marker.exists()):
                # A rank whose main thread waits for a write of its own blames the write.
                self._end(now_s - self._last_beat_s, writing if written > FOLLOWS_AFTER else None)
                return

    def _end(self, silent_s: float, writing: Writing | None) -> None:
        """Leave, because of a write that does not end or else because no step is made."""
        world = self._world
        try:
            self._arm(3 * WAIT_FOR_OTHERS_S)  # longer than all that follows
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            at, waits = _place(self._main_thread if writing is None else writing.thread)
            here = _Stuck(self._hang_id(), world.rank, world.node, round(silent_s, 1), at, waits)
            self._dump(here)
            if writing is not None:
                # The others make steps, or wait for this rank: where they stand says nothing.
                what, limit_s, limit = f"{writing.name} was not written", self._config.hang_timeout_s, _limit_name(0)
                stuck = [here]
            else:
                step = "the first step" if self._step is None else f"step {self._step + 1}"
                what, limit_s, limit = f"{step} was not done", self._limit_s, _limit_name(self._step)
                stuck = self._stuck_ranks(here.hang_id)
            text = (
                f"{what} within {limit_s:g} s ({limit}); {_places(stuck, world.size if writing is None else 0)}. "
                f"All stacks are in {self._run.logs}/{STACKS_GLOB}; the same command continues from the last checkpoint"
            )
            sys.stderr.write(f"mimscale: rank {here.rank} on {here.node}: {text}\n")
            sys.stderr.flush()
            if not self._run.outcome.exists():
                self._run.write_outcome(
                    Outcome(outcome="failed", exit_code=LostRankError.exit_code, step=-1, message=text)
                )
        finally:  # whatever the disk says
            self._leave(LostRankError.exit_code)

    def _hang_id(self) -> str:
        """The id in the marker, which the first rank that gets here writes."""
        hang_id = uuid.uuid4().hex
        try:
            with self._marker.open("x") as file:
                file.write(json.dumps({"hang_id": hang_id, "rank": self._world.rank, "unix_s": time.time()}))
        except FileExistsError:
            deadline_s = time.monotonic() + WAIT_FOR_OTHERS_S
            while time.monotonic() < deadline_s:
                with suppress(ValueError, OSError):  # not written yet
                    return str(json.loads(self._marker.read_text())["hang_id"])
                time.sleep(0.05)
        return hang_id

    def _dump(self, here: _Stuck) -> None:
        assert self._stacks is not None
        self._stacks.write(json.dumps(vars(here)) + "\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        os.fsync(self._stacks.fileno())

    def _stuck_ranks(self, hang_id: str) -> list[_Stuck]:
        """Where all ranks stood, as far as they say so in time."""
        deadline_s = time.monotonic() + WAIT_FOR_OTHERS_S
        while True:
            stuck = []
            for path in sorted(self._run.logs.glob(STACKS_GLOB)):
                lines = path.read_text().splitlines(keepends=True)
                heads = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]
                stuck += [_Stuck(**head) for head in heads if head["hang_id"] == hang_id]
            if len(stuck) >= self._world.size or time.monotonic() > deadline_s:
                return stuck
            time.sleep(0.2)


def _exit_timer() -> ExitTimer | None:
    """None where the system has none: there faulthandler ends the process, with its own code 1."""
    try:
        return ExitTimer(LostRankError.exit_code)
    except OSError:
        return None


def _place(thread: int | None) -> tuple[str, bool]:
    """Where a thread stands: the innermost line of our own code and that of all, and if in a collective."""
    frame = sys._current_frames().get(thread or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "no thread", False
    paths = [Path(frame.f_code.co_filename) for frame in frames]
    innermost = _line(frames[0])
    ours = next((_line(frame) for frame, path in zip(frames, paths, strict=True) if OUR_FOLDER in path.parents), "")
    waits = any("distributed" in path.parts and "torch" in path.parts for path in paths)
    return f"{ours}, in {innermost}" if ours not in ("", innermost) else innermost, waits


def _limit_name(step: int | None) -> str:
    return "health.first_step_timeout_s" if step is None else "health.hang_timeout_s"


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"


def _places(stuck: list[_Stuck], world_size: int) -> str:
    """Ranks by where they stand: those in collectives wait for the others, so they come last; else the fewest first."""
    at: dict[str, list[_Stuck]] = defaultdict(list)
    for rank in stuck:
        at[rank.at].append(rank)
    parts = []
    for place, ranks in sorted(at.items(), key=lambda item: (item[1][0].waits, len(item[1]))):
        names = ", ".join(f"{rank.rank} on {rank.node}" for rank in ranks[:4])
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        parts.append(f"rank {names}{more} {'waited' if ranks[0].waits else 'stood'} at {place}")
    silent = sorted(set(range(world_size)) - {rank.rank for rank in stuck})
    if silent:
        parts.insert(0, f"rank {', '.join(map(str, silent[:4]))}{' and more' * (len(silent) > 4)} did not answer")
    return "; ".join(parts)
