"""One process a node copies packs to the node's own disk, in the order in which the plan will read them.

It belongs to the trainer of local rank 0, knows the plan, and sees how far the trainer is; so it copies what the ranks
of this node read next, and lets go of what they read last. Readers need it for nothing: they open a copy once there is
one, and the store itself until then.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.console import say
from mimscale.store.stage import Added, Stage
from mimscale.stream.plan import SamplePlan
from mimscale.world import World, die_with_parent

LOOK_EVERY_S = 0.5  # how often a copier that waits looks how far the trainer is
RETRY_EVERY_S = 30.0  # how often one that finds no room tries again, although the trainer stands


class Copier:
    """The copying process of this node. Only local rank 0 has one."""

    def __init__(self, stage: Stage, upcoming: Callable[[int], list[Path]], horizon: int, start_batch: int) -> None:
        """Prepare; `start` starts it.

        Args:
            stage: where copies go.
            upcoming: the packs that this node reads in a global batch.
            horizon: global batches after which every pack came up.
            start_batch: number of global batches that are done.
        """
        # Plain memory without a lock: one writes, the other reads, and a number that is a little old does no harm.
        context = multiprocessing.get_context("fork")
        self._done = context.RawValue(ctypes.c_int64, start_batch)
        self._copied_bytes = context.RawValue(ctypes.c_int64, 0)
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._process = context.Process(
            target=_copy_ahead,
            args=(stage, upcoming, horizon, self._done, self._copied_bytes, os.getpid(), in_main_thread),
            daemon=True,
        )
        self._folder = stage.folder
        self._said_so = False

    def start(self) -> None:
        """Start copying. Call it before anything that a fork cannot have."""
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork beside threads. The copier takes no lock that a thread could have held.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            self._process.start()

    def reached(self, batch_index: int) -> None:
        """The trainer consumes global batch `batch_index`."""
        self._done.value = batch_index
        if not self._process.is_alive() and not self._said_so:
            self._said_so = True
            say(
                f"{self._folder}: the process that copies packs ended with code {self._process.exitcode}; "
                "what is not there yet is read from the store"
            )

    @property
    def copied_bytes(self) -> int:
        """Bytes of complete copies made so far."""
        return int(self._copied_bytes.value)

    def close(self) -> None:
        """End it. What it has begun is absent; the next copier removes the rest of it."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


def upcoming_packs(
    plan: SamplePlan, world: World, accumulation: int, paths_of: Callable[[int], list[Path]]
) -> Callable[[int], list[Path]]:
    """The packs that the ranks of this node read in a global batch, in the order of their samples.

    Args:
        plan: the order.
        world: the place of a rank of this node; the ranks of a node have successive numbers.
        accumulation: micro-batches of an optimizer step.
        paths_of: the packs that each volume of the plan lies in.
    """
    first = world.rank - world.local_rank
    ranks = range(first, first + world.local_size)

    def packs(batch_index: int) -> list[Path]:
        samples = [part for rank in ranks for part in plan.rank_samples(batch_index, rank, world.size, accumulation)]
        volumes = plan.samples(np.concatenate(samples)).volume
        return list(dict.fromkeys(path for volume in volumes.tolist() for path in paths_of(volume)))

    return packs


def _copy_ahead(
    stage: Stage,
    upcoming: Callable[[int], list[Path]],
    horizon: int,
    done: Any,
    copied_bytes: Any,
    parent: int,
    from_main_thread: bool,
) -> None:
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides, as for its loader workers
    # But not this one: a trainer that crashes ends its children by it, and waits for them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if from_main_thread:  # the kernel takes the end of the thread that forked for the end of the parent
        die_with_parent(signal.SIGKILL)
    needed: dict[Path, int] = {}  # the last global batch ahead that reads a pack
    given_up: set[Path] = set()
    is_full = False
    batch_index = done.value
    # Also without prctl, and when the trainer was killed before it: an orphan has another parent.
    while os.getppid() == parent:
        batch_index = max(batch_index, done.value)
        if batch_index >= done.value + horizon:
            time.sleep(LOOK_EVERY_S)
            continue
        for path in upcoming(batch_index):
            needed[path] = batch_index
            while path not in given_up and os.getppid() == parent and needed[path] >= done.value:
                reached = done.value
                keep = frozenset(other for other, last in needed.items() if last >= reached)
                added = stage.add(path, keep)
                copied_bytes.value = stage.copied_bytes
                if added is Added.UNREADABLE:
                    given_up.add(path)
                    say(f"{path}: not copied to {stage.folder}: {added.value}; see `mimscale inspect STORE --verify`")
                if added is not Added.FULL:
                    break
                if not is_full:
                    is_full = True
                    say(f"{stage.folder}: no room for more copies yet; the rest is read from the store")
                _wait_for_progress(done, reached, parent)
        batch_index += 1


def _wait_for_progress(done: Any, reached: int, parent: int) -> None:
    deadline_s = time.monotonic() + RETRY_EVERY_S
    while done.value == reached and time.monotonic() < deadline_s and os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
