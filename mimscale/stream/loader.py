"""Store -> micro-batches: the stream of one rank, for training and for fixed sets of crops.

A part is what one worker reads at once: a micro-batch; where the crops of a volume come from one region, it is the
`crops_per_volume` micro-batches that share their regions, so that each region is decoded once: a rank then holds that
many micro-batches for each of its accumulation steps, besides those that the workers hold ready. Nobody here counts a
position: the trainer knows its steps.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mimscale import console
from mimscale.errors import ConfigError
from mimscale.store import native
from mimscale.store.manifest import Manifest
from mimscale.store.stage import Stage
from mimscale.stream.batch import BadSample, Batch, MicroBatch
from mimscale.stream.config import StreamConfig
from mimscale.stream.plan import FixedPlan, Position, SamplePlan
from mimscale.stream.staging import Copier
from mimscale.stream.workers import Batches, Part, Parts
from mimscale.world import World

__all__ = ["BadSample", "Batch", "StreamLoader", "fixed_batches"]


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
        dataset = Parts(store, manifest, indices, plan, overlay, part, stage, config.read)
        self._plan = plan
        self._is_staged = stage is not None
        self._stage_hits = self._stage_misses = self._staged_bytes = 0.0
        self._copier = copier
        self._batches = Batches(dataset, config, pin_memory, accumulation, plan.batches_a_group, world)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: more than `max_bad_samples` samples could not be read, or workers died.
            LostRankError: a worker hangs.
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
        DataError, LostRankError: as `StreamLoader`.
    """
    part = partial(_fixed_part, plan.rank_samples(world.rank, world.size, batch))
    parts = Parts(store, manifest, indices, plan, overlay, part, stage, config.read)
    batches = Batches(parts, config, pin_memory, world=world)
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
