"""Store -> micro-batches, read by worker processes in the order of the plan.

Workers are stateless. Worker w of W reads the parts w, w + W, w + 2 W ... of its rank, and DataLoader hands them out in
turn, so they arrive in plan order. A part is a micro-batch; where the crops of a volume come from one region, it is the
`crops_per_volume` micro-batches that share their regions, so that each region is decoded once: a rank then holds that
many micro-batches for each of its accumulation steps, besides those that the workers hold ready. Nobody here counts a
position: the trainer knows its steps.
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
from mimscale.errors import ConfigError, DataError
from mimscale.store import native
from mimscale.store.manifest import Manifest
from mimscale.store.stage import Stage
from mimscale.stream.batch import BadSample, Batch, MicroBatch, Plan, SampleReader
from mimscale.stream.config import StreamConfig
from mimscale.stream.plan import FixedPlan, Position, SamplePlan
from mimscale.stream.slots import MappedSlots, Slots
from mimscale.stream.staging import Copier
from mimscale.world import World, die_with_parent

__all__ = ["BadSample", "Batch", "StreamLoader", "fixed_batches"]

LOOK_EVERY_S = 2.0  # how often a waiting loader looks whether its workers are alive


Part = list[MicroBatch]


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker: DataLoader would bury its text under a traceback."""

    text: str


class StreamLoader:
    """The endless stream of one rank's micro-batches; `accumulation` of them make an optimizer step.

    Use it in a `with` block, or call `close`: it ends the workers.
    """

    def __init__(
        self,
        *,
        store: Path,
        manifest: Manifest,
        indices: NDArray[np.int64],
        plan: SamplePlan,
        world: World,
        micro_batch: int,
        accumulation: int,
        config: StreamConfig,
        overlay: str | None = None,
        start_batch: int = 0,
        pin_memory: bool | None = None,
        stage: Stage | None = None,
        copier: Copier | None = None,
    ) -> None:
        """Prepare; workers start at the first `next`.

        Args:
            store: the store's folder.
            manifest: its manifest.
            indices: the rows of the manifest that the plan was made of.
            plan: the global order.
            world: this rank's place.
            micro_batch: samples of one forward pass on one rank.
            accumulation: forward passes of an optimizer step.
            config: workers and limits.
            overlay: name of the label overlay to read, or None.
            start_batch: number of global batches that are done.
            pin_memory: hand out page-locked tensors; by default where there is a CUDA device.
            stage: where copies of packs may lie, or None.
            copier: the process that makes them, where this rank is the one to run it.

        Raises:
            ConfigError: micro_batch x accumulation x ranks is not the global batch.
        """
        if micro_batch * accumulation * world.size != plan.global_batch:
            raise ConfigError(
                f"global_batch={plan.global_batch} is not {micro_batch} samples a micro-batch x {accumulation} "
                f"accumulation steps x {world.size} ranks = {micro_batch * accumulation * world.size}; "
                "change one of them"
            )
        if native.read_boxes is None and world.rank == 0:
            console.say(f"chunks are decoded by {native.description}")
        part = partial(_training_part, plan, world, accumulation, start_batch)
        dataset = _Parts(store, manifest, indices, plan, overlay, part, stage)
        self._plan = plan
        self._is_staged = stage is not None
        self._stage_hits = self._stage_misses = self._staged_bytes = 0.0
        self._copier = copier
        self._batches = _Batches(dataset, config, pin_memory, accumulation, plan.batches_a_group)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: more than `max_bad_samples` samples could not be read, or a worker died or hangs.
        """
        batch = next(self._batches)
        self._stage_hits += batch.stage_hits
        self._stage_misses += batch.stage_misses
        if self._copier is not None:
            self._copier.reached(batch.batch_index)
        return batch

    def take_counts(self) -> dict[str, float]:
        """What this rank did with a stage since the last call; the same names on every rank, none without a stage."""
        if not self._is_staged:
            return {}
        staged_bytes = 0.0 if self._copier is None else float(self._copier.copied_bytes)
        counts = {
            "stage_hits": self._stage_hits,
            "stage_misses": self._stage_misses,
            "staged_bytes": staged_bytes - self._staged_bytes,
        }
        self._stage_hits, self._stage_misses, self._staged_bytes = 0.0, 0.0, staged_bytes
        return counts

    @property
    def bad_samples(self) -> list[BadSample]:
        """What this rank could not read so far, summed over its workers."""
        return self._batches.bad_samples

    def position(self, batches_done: int) -> Position:
        """Where the order stands after `batches_done` optimizer steps: pure, whatever workers have fetched ahead."""
        return self._plan.position(batches_done)

    def close(self) -> None:
        """End the workers and the copier. Safe to call twice."""
        self._batches.close()
        if self._copier is not None:
            self._copier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def fixed_batches(
    *,
    store: Path,
    manifest: Manifest,
    indices: NDArray[np.int64],
    plan: FixedPlan,
    world: World,
    batch: int,
    config: StreamConfig,
    overlay: str | None = None,
    pin_memory: bool | None = None,
    stage: Stage | None = None,
) -> Iterator[Batch]:
    """Yield this rank's part of a fixed set of crops: the union over ranks is the same for any number of ranks.

    Every rank yields equally many batches of `batch` samples; a sample with `counted` False only fills up a batch.
    Closing the generator ends the workers.

    Raises:
        DataError: as `StreamLoader`.
    """
    part = partial(_fixed_part, plan.rank_samples(world.rank, world.size, batch))
    batches = _Batches(_Parts(store, manifest, indices, plan, overlay, part, stage), config, pin_memory)
    try:
        yield from batches
    finally:
        batches.close()


def _training_part(plan: SamplePlan, world: World, accumulation: int, start_batch: int, number: int) -> Part:
    """Part `number` of a rank: one accumulation step of the global batches that are read together."""
    group, step = divmod(number, accumulation)
    return [
        MicroBatch(plan.rank_samples(batch_index, world.rank, world.size, accumulation)[step], batch_index=batch_index)
        for batch_index in plan.group(plan.group_of(start_batch) + group)
        if batch_index >= start_batch
    ]


def _fixed_part(parts: list[tuple[NDArray[np.int64], NDArray[np.bool_]]], number: int) -> Part | None:
    return [MicroBatch(*parts[number], batch_index=number)] if number < len(parts) else None


class _Parts(IterableDataset[list[Batch] | _Failure]):
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
    ) -> None:
        self._open = partial(SampleReader, store, manifest, indices, plan, overlay, stage=stage)
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


class _Batches:
    """Runs the workers of a dataset, counts bad samples, and turns the ways a worker can fail into words."""

    def __init__(
        self,
        dataset: _Parts,
        config: StreamConfig,
        pin_memory: bool | None,
        accumulation: int = 1,
        together: int = 1,
    ) -> None:
        self.bad_samples: list[BadSample] = []
        self._dataset = dataset
        self._config = config
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
                    raise DataError(self._why_hung(workers)) from None
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
            volume, how = self._dataset.reading[number], _why_dead(number, workers[number])
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
            f"loader worker {number} (pid {workers[number].pid}) has delivered nothing for stream.timeout_s="
            f"{self._config.timeout_s:g} s{at}; look at the file system of the store, or raise stream.timeout_s"
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


def _why_dead(number: int, worker: Any) -> str:
    how = f"ended with exit code {worker.exitcode}; its error stands above"
    if worker.exitcode < 0:
        how = (
            f"was killed by {signal.Signals(-worker.exitcode).name}; when the machine ran out of memory (dmesg says "
            "so), lower stream.workers or stream.prefetch_batches"
        )
    return f"loader worker {number} (pid {worker.pid}) {how}"
