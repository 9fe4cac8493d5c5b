"""Which sample, when, to whom: pure functions of the seed and the global sample index.

Ranks and workers only pick their stripe of the one global order, so it does not depend on how many there are, and a
resumed run is a larger index, not a replay.

    g global sample index, counted over all epochs | N volumes | G global batch: samples of an optimizer step
    K crops per volume and epoch | D volumes drawn in an epoch: N, or fewer with weights (see `shares`)

An epoch is a permutation of the volumes that it draws, cut into blocks of G volumes (the last block takes the remainder
too). Inside a block the first crop of each volume comes first, then the second of each ...: the crops of one volume lie
near each other, in the same place of successive global batches, and any G samples in a row are of G different volumes.
The tail of an epoch that does not fill a global batch is dropped. Nothing is stored but the shapes: a batch costs
O(batch) memory and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.config import differing_keys, tree_hash
from mimscale.errors import ConfigError
from mimscale.store.manifest import Manifest
from mimscale.stream import order
from mimscale.stream.config import StreamConfig
from mimscale.stream.crops import CropSpace, Samples, Volumes, read_volumes
from mimscale.stream.shares import EqualShares, WeightedShares, weighted_shares

# Part of the hash of a plan. Raise it with every change of what a (seed, index) gives: old positions lose their sense.
ORDER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far the trainer is in the order: all that a resumed run needs to know about its data."""

    seed: int
    epoch: int
    samples_done: int  # over all epochs; what the trainer consumed, not what workers fetched ahead
    plan_hash: str
    global_batch: int
    parts: dict[str, Any]  # what the hash was made of, so that a change can be named

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Position":
        """Read `to_dict` back.

        Raises:
            ConfigError: a field is missing or unknown.
        """
        try:
            return cls(**tree)
        except TypeError as error:
            raise ConfigError(f"position of the data order: {error}; it was written by another version") from None


class SamplePlan:
    """The endless global order of training samples."""

    def __init__(
        self,
        *,
        seed: int,
        volumes: Volumes,
        crop_voxels: Sequence[int],
        config: StreamConfig,
        global_batch: int,
        fingerprint: str = "",
    ) -> None:
        """Plan over `volumes`.

        Args:
            seed: 0 <= seed < 2**64.
            volumes: what may be drawn.
            crop_voxels: Z, Y, X.
            config: how crops are drawn.
            global_batch: samples of an optimizer step, over all ranks and accumulation steps.
            fingerprint: the manifest's hash of the volumes' ids, part of the plan's hash.

        Raises:
            ConfigError: an epoch has too few samples for one global batch, or a crop edge is not positive.
            DataError: there is no volume.
        """
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed={seed}: must be at least 0 and below 2**64")
        if global_batch < 1:
            raise ConfigError(f"global_batch={global_batch}: must be at least 1")
        self.seed = seed
        self.global_batch = global_batch
        self.crops = CropSpace(volumes, crop_voxels, config)
        self._shares: EqualShares | WeightedShares = EqualShares(self.num_volumes)
        if config.weights is not None:
            assert volumes.kinds is not None, "weights need the kind of each volume"
            self._shares = weighted_shares(volumes.kinds, config.weights.values, "stream.weights.values")
        self._drawn = self._shares.drawn_per_epoch
        self._config = config
        self._fingerprint = fingerprint
        samples = self._drawn * config.crops_per_volume
        if samples < global_batch:
            raise ConfigError(
                f"global_batch={global_batch} is larger than an epoch: {self._drawn} volumes x "
                f"stream.crops_per_volume={config.crops_per_volume} = {samples} samples; "
                "lower global_batch or raise stream.crops_per_volume"
            )
        self._block = min(global_batch, self._drawn)

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        indices: NDArray[np.int64],
        *,
        seed: int,
        crop_voxels: Sequence[int],
        config: StreamConfig,
        global_batch: int,
        store: Path | None = None,
        overlay: str | None = None,
    ) -> "SamplePlan":
        """Plan over the volumes `indices` of a manifest. `origins: occupied` and `labelled` need the store's folder.

        Raises:
            ConfigError, DataError: as the constructor and `read_volumes`.
        """
        return cls(
            seed=seed,
            volumes=read_volumes(manifest, indices, config, store, overlay),
            crop_voxels=crop_voxels,
            config=config,
            global_batch=global_batch,
            fingerprint=manifest.plan_fingerprint(indices, overlay if config.origins == "labelled" else None),
        )

    @property
    def num_volumes(self) -> int:
        """N."""
        return self.crops.num_volumes

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self._drawn * self._config.crops_per_volume // self.global_batch

    @property
    def samples_per_epoch(self) -> int:
        """Samples in an epoch, without the dropped tail."""
        return self.batches_per_epoch * self.global_batch

    @property
    def dropped_per_epoch(self) -> int:
        """Samples of an epoch's tail that do not fill a global batch; other ones in each epoch."""
        return self._drawn * self._config.crops_per_volume - self.samples_per_epoch

    def volumes_of_batch(self, batch_index: int) -> NDArray[np.int64]:
        """The volume of each sample of a global batch: [global_batch]. Substitutes of unreadable ones are not here."""
        return self._volumes(np.arange(self.global_batch, dtype=np.int64) + batch_index * self.global_batch)[0]

    def samples(self, global_indices: NDArray[np.int64]) -> Samples:
        """The samples with these global indices [n]."""
        index = np.asarray(global_indices, dtype=np.int64)
        volume, draw_id = self._volumes(index)
        origin = self.crops.draw(self.seed, index, volume, draw_id)
        return Samples(volume=volume, origin=origin, seed=order.draw_seeds(self.seed, index, order.SAMPLE_SEED))

    def substitutes(self, global_indices: NDArray[np.int64], attempt: int) -> Samples:
        """What replaces unreadable samples at attempt 1, 2 ...: another volume and origin, the same seed."""
        index = np.asarray(global_indices, dtype=np.int64)
        volume, origin = self.crops.substitutes(self.seed, index, self._volumes(index)[0], attempt)
        return Samples(volume=volume, origin=origin, seed=order.draw_seeds(self.seed, index, order.SAMPLE_SEED))

    @property
    def batches_a_group(self) -> int:
        """Global batches whose crops come from the same regions; 1 without regions."""
        return 1 if self._config.region_voxels is None else self._config.crops_per_volume

    def group_of(self, batch_index: int) -> int:
        """The group of global batches that one belongs to. An epoch begins a group, and may end with a smaller one."""
        epoch, place = divmod(batch_index, self.batches_per_epoch)
        return epoch * self._groups_per_epoch + place // self.batches_a_group

    def group(self, number: int) -> range:
        """The global batches of a group."""
        epoch, place = divmod(number, self._groups_per_epoch)
        first, end = place * self.batches_a_group, self.batches_per_epoch
        return range(epoch * end + first, epoch * end + min(first + self.batches_a_group, end))

    @property
    def _groups_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.batches_a_group)

    def batch_seed(self, batch_index: int) -> int:
        """A seed that all ranks share in one global batch, for what must be the same in the whole batch."""
        return int(order.draw_seeds(self.seed, batch_index, order.BATCH_SEED))

    def rank_samples(
        self, batch_index: int, rank: int, world_size: int, accumulation: int = 1
    ) -> list[NDArray[np.int64]]:
        """Global indices that `rank` reads for one global batch: `accumulation` arrays [micro_batch].

        Raises:
            ConfigError: the global batch does not divide by `world_size * accumulation`.
        """
        micro_batch = micro_batch_of(self.global_batch, world_size, accumulation)
        first = batch_index * self.global_batch + rank * micro_batch
        stride = world_size * micro_batch
        return [np.arange(micro_batch, dtype=np.int64) + first + step * stride for step in range(accumulation)]

    @cached_property
    def plan_hash(self) -> str:
        """Hash of all that the order depends on."""
        return tree_hash(self._parts)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """What the order depends on, as plain values; keys of the config have their own names."""
        config = self._config
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "number of volumes": self.num_volumes,
            "ids, shapes and foreground boxes of the volumes": self._fingerprint,
            "geometry of the volumes": self.crops.digest,
            "kinds that weights go by": self._shares.digest,
            "crop_voxels": [int(edge) for edge in self.crops.crop_voxels],
            "stream.filter": config.filter,
            "stream.weights": None if config.weights is None else {**vars(config.weights)},
            "stream.crops_per_volume": config.crops_per_volume,
            "stream.region_voxels": config.region_voxels and list(config.region_voxels),
            "stream.align_voxels": config.align_voxels,
            "stream.origins": config.origins,
            "stream.pos_neg": list(config.pos_neg) if config.origins == "labelled" else None,
            "stream.target_spacing_mm": config.target_spacing_mm and list(config.target_spacing_mm),
        }

    def position(self, batches_done: int) -> Position:
        """Where the order stands after `batches_done` optimizer steps."""
        return Position(
            seed=self.seed,
            epoch=batches_done // self.batches_per_epoch,
            samples_done=batches_done * self.global_batch,
            plan_hash=self.plan_hash,
            global_batch=self.global_batch,
            parts=self._parts,
        )

    def batches_done(self, position: Position) -> int:
        """The number of global batches behind `position`: where to go on.

        Raises:
            ConfigError: the position belongs to another order; both hashes and all that differs are shown.
        """
        if position.plan_hash != self.plan_hash:
            raise ConfigError(
                "the order of the data is not the one that this run began with (saved -> now):\n"
                + f"  plan_hash: {position.plan_hash} -> {self.plan_hash}\n"
                + "".join(f"  {line}\n" for line in differing_keys(position.parts, self._parts))
                + "Put back what changed, or accept the new order with --fresh-data: the run goes on at its step in it."
            )
        return position.samples_done // self.global_batch

    def _volumes(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The volume of each sample [n], and a number [n] that the crops of a volume share in one epoch."""
        if index.size and index.min() < 0:
            raise ValueError(f"global sample index {index.min()} is negative")
        epoch, place = np.divmod(index, self.samples_per_epoch)
        crops = self._config.crops_per_volume
        last_block = self._drawn // self._block - 1
        block = np.minimum(place // (self._block * crops), last_block)
        start = block * self._block
        width = np.where(block == last_block, self._drawn - start, self._block)
        slot = (place - start * crops) % width
        volume = np.empty_like(index)
        for each in np.unique(epoch):  # one, or two at an epoch's end
            of_epoch = epoch == each
            volume[of_epoch] = self._shares.volumes((start + slot)[of_epoch], self.seed, int(each))
        return volume, epoch * self._drawn + start + slot


class FixedPlan:
    """Validation: the same crops of the same volumes in every run on any number of ranks, each exactly once."""

    def __init__(self, crops: CropSpace, config: StreamConfig, seed: int) -> None:
        """Take `config.crops_per_volume` crops of each volume, drawn by `seed` and by nothing else."""
        self.crops = crops
        self.seed = seed
        self._per_volume = config.crops_per_volume

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        indices: NDArray[np.int64],
        *,
        seed: int,
        crop_voxels: Sequence[int],
        config: StreamConfig,
        store: Path | None = None,
        overlay: str | None = None,
    ) -> "FixedPlan":
        """Plan over the volumes `indices` of a manifest; weights do not matter.

        Raises:
            ConfigError: a crop edge is not positive.
            DataError: no volume, or as `read_volumes`.
        """
        config = replace(config, weights=None)
        return cls(
            CropSpace(read_volumes(manifest, indices, config, store, overlay), crop_voxels, config), config, seed
        )

    def __len__(self) -> int:
        return self.crops.num_volumes * self._per_volume

    def samples(self, indices: NDArray[np.int64]) -> Samples:
        """The samples `indices` [n] of [0, len)."""
        index = np.asarray(indices, dtype=np.int64)
        volume = index // self._per_volume
        origin = self.crops.draw(self.seed, index, volume, draw_id=volume)
        return Samples(volume=volume, origin=origin, seed=order.draw_seeds(self.seed, index, order.SAMPLE_SEED))

    def substitutes(self, indices: NDArray[np.int64], attempt: int) -> Samples:
        """What replaces unreadable samples at attempt 1, 2 ..."""
        index = np.asarray(indices, dtype=np.int64)
        volume, origin = self.crops.substitutes(self.seed, index, index // self._per_volume, attempt)
        return Samples(volume=volume, origin=origin, seed=order.draw_seeds(self.seed, index, order.SAMPLE_SEED))

    def rank_samples(self, rank: int, world_size: int, batch: int) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """What `rank` reads: batches of indices [batch], and which of them count [batch].

        Every rank gets equally many batches of equal size (a forward pass may be a collective); the indices that fill
        up are repeats and do not count.
        """
        num_batches = -(-len(self) // (world_size * batch))
        place = np.arange(num_batches * batch, dtype=np.int64) * world_size + rank
        return [(part % len(self), part < len(self)) for part in np.split(place, range(batch, len(place), batch))]


def micro_batch_of(global_batch: int, world_size: int, accumulation: int) -> int:
    """Samples of one forward pass on one rank.

    Raises:
        ConfigError: the global batch does not divide by `world_size * accumulation`.
    """
    micro_batch, rest = divmod(global_batch, world_size * accumulation)
    if rest or not micro_batch:
        raise ConfigError(
            f"global_batch={global_batch} does not divide by {world_size} ranks x {accumulation} accumulation steps; "
            f"use a multiple of {world_size * accumulation}, or another number of ranks or accumulation steps"
        )
    return micro_batch
