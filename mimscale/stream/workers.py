"""The processes that read a rank's parts, and every way in which they can fail.

Workers are stateless. Worker w of W reads the parts w, w + W, w + 2 W ... of its rank, and DataLoader hands them out in
turn, so they arrive in plan order.
"""

import os
import signal
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mimscale import console
from mimscale.errors import DataError, LostRankError
from mimscale.store.files import ReadBy
from mimscale.store.manifest import Manifest
from mimscale.store.stage import Stage
from mimscale.stream.batch import BadSample, Batch, MicroBatch, Plan, SampleReader
from mimscale.stream.config import StreamConfig
from mimscale.stream.slots import MappedSlots, Slots
from mimscale.world import World, die_with_parent

LOOK_EVERY_S = 2.0  # how often a waiting loader looks whether its workers are alive

Part = list[MicroBatch]


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker: DataLoader would bury its text under a traceback."""

    text: str


class Parts(IterableDataset[list[Batch] | _Failure]):
    """Parts by number, striped over workers. Holds no open file: a worker opens its own after the fork."""

    def __init__(
        self,
        store: Path,
        manifest: Manifest,
        indices: NDArray[np.int64],
        plan: Plan,
        overlay: str | None,
        part: Callable[[int], Part | None],
        stage: Stage | None,
        read_by: ReadBy,
    ) -> None:
        self._open = partial(SampleReader, store, manifest, indices, plan, overlay, stage=stage, read_by=read_by)
        self._part = part
        self.first = 0  # number of the first part to read
        self.refused: dict[int, str] = {}  # volumes that killed workers, and how
        self.slots: tuple[int, Any] = (-1, None)  # `loader` and `taken` of the trainer's MappedSlots
        self.reading: Any = None  # [workers] the volume that each worker reads now, -1 at first; in shared memory
        self._manifest, self._indices = manifest, indices

    def volume_id(self, volume: int) -> str:
        """The id of a volume of the plan."""
        return self._manifest.sample_row(int(self._indices[volume])).id

    def __iter__(self) -> Iterator[list[Batch] | _Failure]:
        worker = get_worker_info()
        number, step = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        told = partial(self.reading.__setitem__, worker.id) if worker is not None else _nobody
        try:
            slots = None if worker is None else Slots(self.slots[0], worker.id, self.slots[1])
            reader = self._open(slots=slots, refused=self.refused, now=told)
            while (part := self._part(number)) is not None:
                yield reader.read_together(part)
                number += step
        except DataError as error:
            yield _Failure(str(error))


def _nobody(volume: int) -> None:
    """Nobody asks what the trainer itself reads."""


class Batches:
    """Runs the workers of a dataset, counts bad samples, and turns the ways a worker can fail into words."""

    def __init__(
        self,
        dataset: Parts,
        config: StreamConfig,
        pin_memory: bool | None,
        accumulation: int = 1,
        together: int = 1,
        world: World | None = None,
    ) -> None:
        self.bad_samples: list[BadSample] = []
        self._dataset = dataset
        self._config = config
        # Many ranks have a loader worker 0.
        self._of = "" if world is None or world.size == 1 else f" of rank {world.rank} on {world.node}"
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prefetched_parts = -(-config.prefetch_batches // together)
        self._iterator: Iterator[Any] | None = None
        self._slots: MappedSlots | None = None
        self._held: list[deque[Batch]] = [deque() for _ in range(accumulation)]
        self._step = 0  # of the accumulation
        self._received = 0
        self._substituted = 0
        self._deaths: list[str] = []
        self._deaths_at: Counter[int] = Counter()  # volume -> workers that were killed while they read it
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            held = self._held[self._step]
            if not held:
                item = self._receive()
                if isinstance(item, _Failure):
                    raise DataError(item.text)
                held.extend(item)
            batch = held.popleft()
            self._count(batch)
        except BaseException:
            self.close()
            raise
        self._step = (self._step + 1) % len(self._held)
        return batch

    def close(self) -> None:
        """End the workers, also ones that hang."""
        self._closed = True
        self._end_workers()

    def _end_workers(self) -> None:
        iterator, self._iterator = self._iterator, None
        workers = _processes(iterator)
        if iterator is not None and workers:
            _loader_iterator(iterator)._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
            _remove_names_of_shared_memory(worker.pid)
        if self._slots is not None:
            self._slots.close()
            self._slots = None

    def _start(self) -> Iterator[Any]:
        if self._config.workers == 0:
            return self._unpinned_or_pinned()
        context = get_context(self._config.start_method)
        self._slots = MappedSlots(context, self._config.workers)
        self._dataset.slots = (self._slots.loader, self._slots.taken)
        self._dataset.reading = context.RawArray("q", [-1] * self._config.workers)
        previous = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            # The number of workers is the user's choice; DataLoader compares it with the cores of this process alone.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            # Python 3.12 warns of any fork beside threads. Our workers take no lock that a thread could have held.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            iterator = iter(
                DataLoader(
                    self._dataset,
                    batch_size=None,
                    num_workers=self._config.workers,
                    multiprocessing_context=context,
                    prefetch_factor=self._prefetched_parts,
                    timeout=min(LOOK_EVERY_S, self._config.timeout_s),
                    pin_memory=self._pin_memory,
                    worker_init_fn=partial(_start_worker, threading.current_thread() is threading.main_thread()),
                    # DataLoader draws a seed for its workers: from the global generator it would change the training.
                    generator=torch.Generator(),
                )
            )
        # DataLoader's handler raises between any two lines of the trainer when a worker dies; `_receive` is clearer.
        if threading.current_thread() is threading.main_thread() and previous is not None:
            signal.signal(signal.SIGCHLD, previous)
        # A trainer that leaves without closing would wait for its workers for ever when it ends: multiprocessing
        # then asks them to end by a TERM, which they ignore. This runs before.
        weakref.finalize(self, _kill_workers, os.getpid(), _processes(iterator))
        return iterator

    def _unpinned_or_pinned(self) -> Iterator[list[Batch] | _Failure]:
        for item in self._dataset:
            if self._pin_memory and not isinstance(item, _Failure):
                item = [batch.pin_memory() for batch in item]
            yield item

    def _receive(self) -> list[Batch] | _Failure:
        deadline = time.monotonic() + self._config.timeout_s
        while True:
            if self._iterator is None:
                self._iterator = self._start()
            workers = _processes(self._iterator)
            try:
                item = next(self._iterator)
            except StopIteration:
                raise
            except (RuntimeError, OSError, EOFError) as error:
                if dead := _dead(workers):
                    self._bury(dead)
                    deadline = time.monotonic() + self._config.timeout_s
                elif not str(error).startswith("DataLoader timed out"):
                    raise
                elif time.monotonic() >= deadline:
                    raise LostRankError(self._why_hung(workers)) from None
            else:
                self._received += 1
                assert isinstance(item, list | _Failure)
                return item

    def _bury(self, dead: list[int]) -> None:
        """Start all workers again where the trainer is; a volume on which a second one dies counts as unreadable.

        Raises:
            DataError: a worker ended by itself, or too many were killed.
        """
        workers = _processes(self._iterator)
        for number in dead:
            volume, how = self._dataset.reading[number], _why_dead(f"{number}{self._of}", workers[number])
            at = "" if volume < 0 else f"; it read volume {self._dataset.volume_id(volume)}"
            self._deaths.append(how + at)
            if workers[number].exitcode > 0 or len(self._deaths) > max(1, self._config.max_bad_samples):
                raise DataError("\n".join(self._deaths[-10:]))
            console.say(f"{self._deaths[-1]}; the workers start again")
            self._deaths_at[volume] += 1
            if volume >= 0 and self._deaths_at[volume] > 1:
                self._dataset.refused[volume] = f"two loader workers were killed while they read it ({how})"
        self._end_workers()
        self._dataset.first = self._received

    def _why_hung(self, workers: list[Any]) -> str:
        number = (self._received - self._dataset.first) % self._config.workers
        volume = self._dataset.reading[number]
        # Joining a process that does not answer would only wait.
        for process in workers:
            process.kill()
        at = "" if volume < 0 else f"; it reads volume {self._dataset.volume_id(volume)}"
        return (
            f"loader worker {number}{self._of} (pid {workers[number].pid}) has delivered nothing for stream.timeout_s="
            f"{self._config.timeout_s:g} s{at}; look at the file system of the store, or raise stream.timeout_s; the "
            "same command continues a run from the last checkpoint"
        )

    def _count(self, batch: Batch) -> None:
        if not batch.bad:
            return
        self.bad_samples += batch.bad
        self._substituted += batch.substituted
        if self._substituted > self._config.max_bad_samples:
            lines = [f"  {bad.volume_id} (sample {bad.sample_id}): {bad.reason}" for bad in self.bad_samples]
            raise DataError(
                f"{self._substituted} samples could not be read, more than stream.max_bad_samples="
                f"{self._config.max_bad_samples}; repair the store (`mimscale inspect STORE --verify`) or raise the "
                "limit:\n" + "\n".join(lines)
            )


def _start_worker(from_main_thread: bool, worker_id: int) -> None:
    """Set up a loader process: it belongs to its parent, which alone decides about signals.

    Ctrl-C and a scheduler's TERM reach the whole process group. The trainer then finishes its step and saves, and needs
    its workers until it ends them; a trainer that is killed takes them along.
    """
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if from_main_thread:  # the kernel takes the end of the thread that forked for the end of the parent
        die_with_parent(signal.SIGKILL)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _kill_workers(owner_pid: int, workers: list[Any]) -> None:
    if os.getpid() != owner_pid:
        return  # in a worker, which holds a copy of its parent's memory
    for worker in workers:
        worker.kill()
        worker.join(timeout=1.0)
        _remove_names_of_shared_memory(worker.pid)


def _remove_names_of_shared_memory(pid: int) -> None:
    """Of a worker that has ended: one that is killed between torch's shm_open and its shm_unlink leaves a name behind.

    The memory behind such a name would be taken until the machine starts again. Nobody else has it: torch hands on
    descriptors, never names.
    """
    for path in Path("/dev/shm").glob(f"torch_{pid}_*"):  # noqa: S108
        path.unlink(missing_ok=True)


def _loader_iterator(iterator: Iterator[Any]) -> Any:
    return iterator  # DataLoader's iterator has no public way to reach or end its workers


def _processes(iterator: Iterator[Any] | None) -> list[Any]:
    return list(getattr(iterator, "_workers", ()))


def _dead(workers: list[Any]) -> list[int]:
    """Numbers of the workers that ended before their time."""
    for worker in workers:
        # A broken connection may be seen an instant before the process counts as ended.
        worker.join(timeout=0.1)
    return [number for number, worker in enumerate(workers) if worker.exitcode not in (None, 0)]


def _why_dead(number: str, worker: Any) -> str:
    how = f"ended with exit code {worker.exitcode}; its error stands above"
    if worker.exitcode < 0:
        how = (
            f"was killed by {signal.Signals(-worker.exitcode).name}; when the machine ran out of memory (dmesg says "
            "so), lower stream.workers or stream.prefetch_batches"
        )
    return f"loader worker {number} (pid {worker.pid}) {how}"
