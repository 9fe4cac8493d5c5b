"""From sample indices to voxels: reads crops, replaces what cannot be read, and says so.

B samples | C channels | Z Y X crop, voxels
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.errors import DataError
from mimscale.store.intensity import normalisation
from mimscale.store.layout import read_info
from mimscale.store.manifest import Manifest, SampleRow
from mimscale.store.reader import ShardReader
from mimscale.stream.crops import CropSpace, Samples

MOST_ATTEMPTS = 8  # substitutes tried for one sample before the store counts as broken


class Plan(Protocol):
    """What a reader needs of a plan; `SamplePlan` and `FixedPlan` have it."""

    @property
    def crops(self) -> CropSpace:
        """Where crops may lie."""
        ...

    def samples(self, indices: NDArray[np.int64], /) -> Samples:
        """The samples with these indices [n]."""
        ...

    def substitutes(self, indices: NDArray[np.int64], attempt: int, /) -> Samples:
        """What replaces unreadable samples at attempt 1, 2 ..."""
        ...


@dataclass(frozen=True)
class BadSample:
    """A volume that could not be read, twice, for a sample."""

    sample_id: int
    volume_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch as stored on disk: voxels keep the scanner's numbers, `device.normalise` turns them into floats."""

    volume: Tensor  # [B, C, Z, Y, X] the dtype of the store; the common one where the volumes differ
    label: Tensor | None  # [B, Z, Y, X] uint8; 255 = ignore
    sample_ids: Tensor  # [B] int64, global index in the plan
    seeds: list[int]  # B seeds that belong to the samples, for masks and augmentation
    normalisation: Tensor  # [B, C, 4] float32: clip_low, clip_high, shift, scale
    inside: Tensor  # [B, 3, 2] int32: start, stop of the part of the crop that lies in the volume
    volume_ids: list[str]  # B, what was really read
    counted: Tensor  # [B] bool; False for the repeats that fill up a last validation batch
    batch_index: int = 0  # the global batch that these samples are a part of
    bad: tuple[BadSample, ...] = ()  # what could not be read and was replaced

    @property
    def substituted(self) -> int:
        """Number of samples that were replaced because they could not be read."""
        return len({bad.sample_id for bad in self.bad})

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; the copy does not wait where the memory is pinned."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; DataLoader calls it."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: change(value) for name, value in self.__dict__.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes each tensor costs a file descriptor and a round trip: only voxels travel as shared memory,
        # the small ones ride in the message.
        small: dict[str, Any] = {
            name: value.numpy() if isinstance(value, Tensor) and name in _SMALL else value
            for name, value in self.__dict__.items()
        }
        return _unpickled, (small,)


_SMALL = frozenset({"sample_ids", "normalisation", "inside", "counted"})


def _unpickled(fields: dict[str, Any]) -> Batch:
    tensors: dict[str, Any] = {name: torch.from_numpy(fields[name]) for name in _SMALL}
    return Batch(**{**fields, **tensors})


class SampleReader:
    """Reads micro-batches. One for each process: it holds file descriptors."""

    def __init__(
        self,
        store: Path,
        manifest: Manifest,
        indices: NDArray[np.int64],
        plan: Plan,
        overlay: str | None = None,
        *,
        shared_memory: bool = False,
    ) -> None:
        """Open nothing but `store.json`; packs are opened when they are read.

        Args:
            store: the store's folder.
            manifest: its manifest.
            indices: the manifest's rows that the plan's volumes stand for [N].
            plan: which crops belong to which sample.
            overlay: name of the label overlay to read, or None.
            shared_memory: decode straight into memory that another process can map.
        """
        self._store, self._manifest, self._indices = store, manifest, indices
        self._plan, self._overlay, self._shared_memory = plan, overlay, shared_memory
        self._intensity = read_info(store).intensity
        self._reader = ShardReader(store, manifest)

    def read(
        self, sample_ids: NDArray[np.int64], counted: NDArray[np.bool_] | None = None, batch_index: int = 0
    ) -> Batch:
        """Read the crops of `sample_ids` [B].

        A crop that cannot be read is tried once more, then replaced by the plan's substitute.

        Raises:
            DataError: the substitutes cannot be read either, or a volume has no such overlay.
        """
        samples = self._plan.samples(sample_ids)
        rows = [self._row(volume) for volume in samples.volume]
        origins = [_triple(origin) for origin in samples.origin]
        size = _triple(self._plan.crops.crop_voxels)
        volume = self._empty((len(rows), rows[0].shape[0], *size), np.result_type(*(row.dtype for row in rows)))
        label = self._empty((len(rows), *size), np.dtype(np.uint8)) if self._overlay else None
        bad: list[BadSample] = []
        for place, sample_id in enumerate(sample_ids):
            attempt = 0
            while (reason := self._try(rows[place], origins[place], volume, label, place)) is not None:
                bad.append(BadSample(int(sample_id), rows[place].id, reason))
                attempt += 1
                if attempt > MOST_ATTEMPTS:
                    raise DataError(
                        f"{self._store}: sample {sample_id} and its {MOST_ATTEMPTS} substitutes cannot be read; the "
                        f"last reason: {reason}; `mimscale inspect {self._store} --verify` lists what is damaged"
                    )
                substitute = self._plan.substitutes(sample_ids[place : place + 1], attempt)
                rows[place] = self._row(substitute.volume[0])
                origins[place] = _triple(substitute.origin[0])
                if (wider := np.result_type(volume.array.dtype, rows[place].dtype)) != volume.array.dtype:
                    narrow, volume = volume, self._empty(volume.array.shape, wider)
                    volume.array[...] = narrow.array
        return Batch(
            volume=volume.tensor,
            label=None if label is None else label.tensor,
            sample_ids=torch.from_numpy(np.array(sample_ids, dtype=np.int64)),
            seeds=[int(seed) for seed in samples.seed],
            normalisation=torch.from_numpy(np.stack([normalisation(self._intensity, row.stats) for row in rows])),
            inside=torch.from_numpy(_inside(rows, origins, size)),
            volume_ids=[row.id for row in rows],
            counted=torch.from_numpy(np.ones(len(rows), dtype=bool) if counted is None else np.array(counted)),
            batch_index=batch_index,
            bad=tuple(bad),
        )

    def _try(
        self,
        row: SampleRow,
        origin: tuple[int, int, int],
        volume: "_Buffer",
        label: "_Buffer | None",
        place: int,
    ) -> str | None:
        """Read one crop into its place; None when it worked, else why not, after a second try."""
        size = _triple(volume.array.shape[2:])
        for last in (False, True):
            try:
                if row.dtype == volume.array.dtype:
                    self._reader.read(row, origin, size, out=volume.array[place])
                else:
                    volume.array[place] = self._reader.read(row, origin, size)
                if label is not None:
                    self._reader.read(row, origin, size, overlay=self._overlay, out=label.array[place][None])
            except (DataError, OSError) as error:
                if last:
                    return str(error)
                # A stale descriptor or a shard index read in a bad moment must not fail the second try too.
                self._reader.close()
                self._reader = ShardReader(self._store, self._manifest)
            else:
                return None
        raise AssertionError("the loop returns")

    def _row(self, volume: np.int64) -> SampleRow:
        row = self._manifest.sample_row(int(self._indices[volume]))
        if self._overlay is not None and self._overlay not in row.overlays:
            # Nothing is damaged: to train on the rest without a word would be wrong.
            raise DataError(
                f"volume {row.id} of {self._store} has no overlay {self._overlay!r} (it has: "
                f"{', '.join(row.overlays) or 'none'}); ingest it with a label, or select volumes that have one"
            )
        return row

    def _empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> "_Buffer":
        if not self._shared_memory:
            return _Buffer(torch.from_numpy(np.empty(shape, dtype)))
        num_bytes = math.prod(shape) * dtype.itemsize
        storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")  # type: ignore[no-untyped-call]
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return _Buffer(torch.empty(0, dtype=kind).set_(storage).view(*shape))


class _Buffer:
    """Memory seen as a tensor and as an array. A tensor made from the array again would no longer count as shared."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.array: NDArray[Any] = tensor.numpy()


def _triple(values: Sequence[int] | NDArray[np.int64]) -> tuple[int, int, int]:
    z, y, x = (int(value) for value in values)
    return z, y, x


def _inside(
    rows: Sequence[SampleRow], origins: Sequence[tuple[int, int, int]], size: tuple[int, int, int]
) -> NDArray[np.int32]:
    """Start and stop of what lies in the volume, [B, 3, 2], in voxels of the crop."""
    origin = np.array(origins)
    shape = np.array([row.shape[1:] for row in rows])
    return np.stack([np.clip(-origin, 0, size), np.clip(shape - origin, 0, size)], axis=-1).astype(np.int32)
