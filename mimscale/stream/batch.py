"""From sample indices to voxels: reads crops, replaces what cannot be read, and says so.

B samples | C channels | Z Y X crop, voxels
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.errors import DataError
from mimscale.store.files import Files, ReadBy
from mimscale.store.intensity import normalisation
from mimscale.store.layout import overlay_path, pack_path, read_info
from mimscale.store.manifest import Manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import SampleRow
from mimscale.store.stage import Stage
from mimscale.stream.crops import CropSpace, ReadBoxes, Samples
from mimscale.stream.slots import Reference, Slot, Slots, tensor_of

MOST_ATTEMPTS = 8  # substitutes tried for one sample before the store counts as broken


_MOST_ROWS = 1024  # of volumes, kept by each worker


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
    label: Tensor | None  # [B, Z, Y, X] uint8 on the grid of `volume`; 255 = ignore
    sample_ids: Tensor  # [B] int64, global index in the plan
    seeds: list[int]  # B seeds that belong to the samples, for masks and augmentation
    spacing_mm: list[tuple[float, float, float]]  # B spacings along Z, Y, X, of the resampled crop where `grid` is
    normalisation: Tensor  # [B, C, 4] float32: clip_low, clip_high, shift, scale
    inside: Tensor  # [B, 3, 2] int32: start, stop of the part of `volume` that lies in the stored volume
    volume_ids: list[str]  # B, what was really read
    subjects: list[str] = field(default_factory=list)  # B keyed hashes: whom it shows
    counted: Tensor  # [B] bool; False for the repeats that fill up a last validation batch
    # At a target spacing `volume` is as stored, with air behind the smaller fields of view; the device resamples it.
    grid: Tensor | None = None  # [B, 3, 2] float64: centre of the crop's first voxel in `volume`, and the step
    crop_voxels: tuple[int, int, int] | None = None  # edges of the resampled crop; None where `grid` is
    batch_index: int = 0  # the global batch that these samples are a part of
    modalities: tuple[str, ...] = ()  # B, where validation has asked for them
    foreground_above: Tensor | None = None  # [B, C] float32, likewise: normalised intensity between air and body
    bad: tuple[BadSample, ...] = ()  # what could not be read and was replaced
    voxels_decoded: float = 0.0  # to make this batch; what several batches share counts in equal parts
    bytes_read: float = 0.0
    stage_hits: float = 0.0  # arrays read from a copy on this node; shared like the bytes
    stage_misses: float = 0.0  # and from the store, although there is a stage
    send: Callable[[str], Reference] | None = None  # in a worker: what its message says of `volume` and `label`

    @property
    def substituted(self) -> int:
        """Number of samples that were replaced because they could not be read."""
        return len({bad.sample_id for bad in self.bad})

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, but for the sample ids; the copy does not wait where the memory is pinned."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, the only copy on its way from the decoder; DataLoader calls it."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def tensors(self) -> dict[str, Tensor]:
        """What goes to the device."""
        return {
            name: value for name, value in self.__dict__.items() if isinstance(value, Tensor) and name != "sample_ids"
        }

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(value) for name, value in self.tensors().items()}
        return replace(self, **changed)

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes each tensor costs a file descriptor and a round trip: the small ones ride in the message,
        # and voxels stay where they are, in memory that both sides know.
        fields: dict[str, Any] = dict(self.__dict__)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor) and name in _SMALL:
                fields[name] = value.numpy()
            elif isinstance(value, Tensor) and self.send is not None:
                fields[name] = self.send(name)
        return _unpickled, ({**fields, "send": None},)


_SMALL = frozenset({"sample_ids", "normalisation", "inside", "counted", "grid"})


def _unpickled(fields: dict[str, Any]) -> Batch:
    tensors: dict[str, Any] = {name: torch.from_numpy(fields[name]) for name in _SMALL if fields[name] is not None}
    voxels = {name: tensor_of(value) for name, value in fields.items() if isinstance(value, Reference)}
    return Batch(**{**fields, **tensors, **voxels})


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass, still to be read."""

    sample_ids: NDArray[np.int64]  # [B]
    counted: NDArray[np.bool_] | None = None  # [B]; None: all
    batch_index: int = 0


@dataclass
class _Crop:
    """A sample on its way from the plan to its place in a batch."""

    sample_id: int
    volume: int  # of the plan
    origin: NDArray[np.int64]  # [3]
    row: SampleRow


@dataclass
class _Draft:
    """A micro-batch while it is read."""

    what: MicroBatch
    crops: list[_Crop]
    seeds: NDArray[np.uint64]
    volume: "_Buffer"
    label: "_Buffer | None"
    bad: list[BadSample] = field(default_factory=list)


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
        slots: Slots | None = None,
        stage: Stage | None = None,
        read_by: ReadBy = "auto",
        refused: Mapping[int, str] | None = None,
        now: Callable[[int], None] = lambda volume: None,
    ) -> None:
        """Open nothing but `store.json`; packs are opened when they are read.

        Args:
            store: the store's folder.
            manifest: its manifest.
            indices: the manifest's rows that the plan's volumes stand for [N].
            plan: which crops belong to which sample.
            overlay: name of the label overlay to read, or None.
            slots: decode straight into these, which another process can map.
            stage: where copies of packs may lie, or None.
            read_by: how packs on file systems are read; see `StreamConfig.read`.
            refused: volumes of the plan that count as unreadable, and why.
            now: told of each volume before it is read, and of -1 when nothing is.
        """
        self._refused, self._now = refused or {}, now
        self._store, self._manifest, self._indices = store, manifest, indices
        self._plan, self._overlay, self._slots = plan, overlay, slots
        self._intensity = read_info(store).intensity
        # Crops of a volume are read near each other, and a row of a manifest takes a while to become an object.
        self._sample_row = lru_cache(maxsize=_MOST_ROWS)(manifest.sample_row)
        self._stage = stage
        self._files = Files(stage, read_by=read_by)
        self._reader = ShardReader(store, manifest, self._files)
        self._closed_voxels = self._closed_bytes = 0  # counted by readers that were closed

    def read(
        self, sample_ids: NDArray[np.int64], counted: NDArray[np.bool_] | None = None, batch_index: int = 0
    ) -> Batch:
        """Read the crops of one micro-batch, `sample_ids` [B]; see `read_together`."""
        (batch,) = self.read_together([MicroBatch(sample_ids, counted, batch_index)])
        return batch

    def read_together(self, micro_batches: Sequence[MicroBatch]) -> list[Batch]:
        """Read some micro-batches: what their crops of one volume share is read and decoded once.

        A crop that cannot be read is tried once more, then replaced by the plan's substitute. What is read together
        changes no voxel of a batch, and no substitute.

        Raises:
            DataError: the substitutes cannot be read either, or a volume has no such overlay.
        """
        before = self._counts()
        # Drawn at once: for a few samples it is the calls that cost.
        samples = self._plan.samples(np.concatenate([what.sample_ids for what in micro_batches]))
        ends = np.cumsum([len(what.sample_ids) for what in micro_batches]).tolist()
        drafts = [
            self._draft(what, samples.volume[a:b], samples.origin[a:b], samples.seed[a:b])
            for what, (a, b) in zip(micro_batches, pairwise([0, *ends]), strict=True)
        ]
        of_volume: dict[int, list[tuple[_Draft, int]]] = defaultdict(list)
        for draft in drafts:
            for place, crop in enumerate(draft.crops):
                of_volume[crop.volume].append((draft, place))
        for volume, places in of_volume.items():
            self._now(volume)
            if len(places) == 1 or not self._read_together(places):
                # Each on its own: which of them fail must not depend on what happened to be read together.
                for draft, place in places:
                    self._read_or_replace(draft, place)
        self._now(-1)
        counts = {name: (count - before[name]) / len(drafts) for name, count in self._counts().items()}
        return [self._batch(draft, counts) for draft in drafts]

    def _draft(
        self, what: MicroBatch, volumes: NDArray[np.int64], origins: NDArray[np.int64], seeds: NDArray[np.uint64]
    ) -> _Draft:
        crops = [
            _Crop(int(sample_id), int(volume), origin, self._row(volume))
            for sample_id, volume, origin in zip(what.sample_ids, volumes, origins, strict=True)
        ]
        sizes = self._plan.crops.read_boxes(volumes, origins).size
        size = _triple(sizes.max(axis=0))
        filled = bool((sizes != size).any())
        volume = self._empty(
            (len(crops), crops[0].row.shape[0], *size), np.result_type(*(crop.row.dtype for crop in crops)), filled
        )
        label = self._empty((len(crops), *size), np.dtype(np.uint8), filled) if self._overlay else None
        return _Draft(what, crops, seeds, volume, label)

    def _batch(self, draft: _Draft, counts: dict[str, Any]) -> Batch:
        boxes = self._boxes(draft.crops)
        resampled = self._plan.crops.target_spacing_mm is not None
        counted = draft.what.counted
        return Batch(
            volume=draft.volume.tensor,
            label=None if draft.label is None else draft.label.tensor,
            sample_ids=torch.from_numpy(np.array(draft.what.sample_ids, dtype=np.int64)),
            seeds=[int(seed) for seed in draft.seeds],
            spacing_mm=[self._plan.crops.target_spacing_mm or crop.row.spacing_mm for crop in draft.crops],
            normalisation=torch.from_numpy(
                np.stack([normalisation(self._intensity, crop.row.stats) for crop in draft.crops])
            ),
            inside=torch.from_numpy(_inside(draft.crops, boxes)),
            volume_ids=[crop.row.id for crop in draft.crops],
            subjects=[crop.row.subject for crop in draft.crops],
            counted=torch.from_numpy(np.ones(len(draft.crops), dtype=bool) if counted is None else np.array(counted)),
            grid=torch.from_numpy(np.stack([boxes.first, boxes.step], axis=-1)) if resampled else None,
            crop_voxels=_triple(self._plan.crops.crop_voxels) if resampled else None,
            batch_index=draft.what.batch_index,
            send=None if self._slots is None else partial(_reference, self._slots, draft),
            bad=tuple(draft.bad),
            **counts,
        )

    def _boxes(self, crops: Sequence[_Crop]) -> ReadBoxes:
        volumes = np.array([crop.volume for crop in crops])
        return self._plan.crops.read_boxes(volumes, np.stack([crop.origin for crop in crops]))

    def _read_together(self, places: Sequence[tuple[_Draft, int]]) -> bool:
        """Read crops of one volume into their places; False when any of them cannot be read."""
        if places[0][0].crops[places[0][1]].volume in self._refused:
            return False
        try:
            self._read_crops(places)
        except (DataError, OSError):
            self._reopen(places[0][0].crops[places[0][1]].row)
            return False
        return True

    def _read_or_replace(self, draft: _Draft, place: int) -> None:
        """Read one crop into its place; what cannot be read, twice, is replaced."""
        crop = draft.crops[place]
        attempt = 0
        while (reason := self._why_unreadable(draft, place)) is not None:
            draft.bad.append(BadSample(crop.sample_id, draft.crops[place].row.id, reason))
            attempt += 1
            if attempt > MOST_ATTEMPTS:
                raise DataError(
                    f"{self._store}: sample {crop.sample_id} and its {MOST_ATTEMPTS} substitutes cannot be read; the "
                    f"last reason: {reason}; `mimscale inspect {self._store} --verify` lists what is damaged"
                )
            substitute = self._plan.substitutes(np.array([crop.sample_id]), attempt)
            volume, origin = substitute.volume[0], substitute.origin[0]
            draft.crops[place] = _Crop(crop.sample_id, int(volume), origin, self._row(volume))
            self._now(int(volume))
            self._make_room(draft, place)

    def _make_room(self, draft: _Draft, place: int) -> None:
        """Let the buffers hold the crop in `place`, which may be of a wider dtype, or at another spacing larger."""
        old = draft.volume
        shape = old.array.shape
        size = np.maximum(shape[2:], self._boxes([draft.crops[place]]).size[0])
        dtype = np.result_type(old.array.dtype, draft.crops[place].row.dtype)
        if dtype == old.array.dtype and tuple(size) == shape[2:]:
            return
        z, y, x = shape[2:]
        draft.volume = self._empty((*shape[:2], *size), dtype, filled=True)
        draft.volume.array[:, :, :z, :y, :x] = old.array
        self._let_go(old)
        if draft.label is not None:
            old_label = draft.label
            draft.label = self._empty((shape[0], *size), old_label.array.dtype, filled=True)
            draft.label.array[:, :z, :y, :x] = old_label.array
            self._let_go(old_label)

    def _why_unreadable(self, draft: _Draft, place: int) -> str | None:
        """Read one crop into its place; None when it worked, else why not, after a second try."""
        if (reason := self._refused.get(draft.crops[place].volume)) is not None:
            return f"volume {draft.crops[place].row.id}: {reason}"
        for last in (False, True):
            try:
                self._read_crops([(draft, place)])
            except (DataError, OSError) as error:
                if last:
                    return str(error)
                self._reopen(draft.crops[place].row)
            else:
                return None
        raise AssertionError("the loop returns")

    def _read_crops(self, places: Sequence[tuple[_Draft, int]]) -> None:
        """Read crops of one volume into their places; each chunk that they touch is decoded once."""
        crops = [draft.crops[place] for draft, place in places]
        boxes, row = self._boxes(crops), crops[0].row
        starts = [_triple(start) for start in boxes.start]
        z, y, x = size = _triple(boxes.size[0])  # one spacing: one size
        volumes = [draft.volume.array[place, :, :z, :y, :x] for draft, place in places]
        if all(volume.dtype == row.dtype for volume in volumes):
            self._reader.read_crops(row, starts, size, out=volumes)
        else:
            for volume, voxels in zip(volumes, self._reader.read_crops(row, starts, size), strict=True):
                volume[...] = voxels
        labels = [
            draft.label.array[place : place + 1, :z, :y, :x] for draft, place in places if draft.label is not None
        ]
        if labels:
            self._reader.read_crops(row, starts, size, self._overlay, labels)

    def _reopen(self, row: SampleRow) -> None:
        """Start with fresh files: a stale descriptor or a shard index read in a bad moment must not fail again."""
        self._closed_voxels += self._reader.voxels_decoded
        self._closed_bytes += self._reader.bytes_read
        self._reader.close()
        if self._stage is not None:  # a copy that cannot be read must not hide a good pack
            self._stage.discard(pack_path(self._store, row.part))
            if self._overlay is not None:
                self._stage.discard(overlay_path(self._store, self._overlay, row.overlays[self._overlay].part))
        self._reader = ShardReader(self._store, self._manifest, self._files)

    def _counts(self) -> dict[str, int]:
        """What was done so far, by the names that a batch has for it."""
        return {
            "voxels_decoded": self._closed_voxels + self._reader.voxels_decoded,
            "bytes_read": self._closed_bytes + self._reader.bytes_read,
            "stage_hits": self._files.hits,
            "stage_misses": self._files.misses if self._stage is not None else 0,
        }

    def _row(self, volume: int | np.int64) -> SampleRow:
        row = self._sample_row(int(self._indices[volume]))
        if self._overlay is not None and self._overlay not in row.overlays:
            # Nothing is damaged: to train on the rest without a word would be wrong.
            raise DataError(
                f"volume {row.id} of {self._store} has no overlay {self._overlay!r} (it has: "
                f"{', '.join(row.overlays) or 'none'}); ingest it with a label, or select volumes that have one"
            )
        return row

    def _empty(self, shape: Sequence[int], dtype: np.dtype[Any], filled: bool = False) -> "_Buffer":
        """A new buffer, of zeros where `filled`: what no crop reaches must be the same in every run."""
        shape = tuple(map(int, shape))
        if self._slots is None:
            return _Buffer(torch.from_numpy(np.zeros(shape, dtype) if filled else np.empty(shape, dtype)))
        num_bytes = math.prod(shape) * dtype.itemsize
        slot = self._slots.take(num_bytes)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        buffer = _Buffer(slot.memory[:num_bytes].view(kind).view(*shape), slot)
        if filled:
            buffer.array.fill(0)
        return buffer

    def _let_go(self, buffer: "_Buffer") -> None:
        if self._slots is not None and buffer.slot is not None:
            self._slots.give_back(buffer.slot)


class _Buffer:
    """Memory seen as a tensor and as an array. A tensor made from the array again would no longer count as shared."""

    def __init__(self, tensor: Tensor, slot: Slot | None = None) -> None:
        self.tensor, self.slot = tensor, slot
        self.array: NDArray[Any] = tensor.numpy()


def _reference(slots: Slots, draft: _Draft, name: str) -> Reference:
    buffer = {"volume": draft.volume, "label": draft.label}[name]
    assert buffer is not None
    assert buffer.slot is not None
    return slots.reference(buffer.slot, buffer.tensor)


def _triple(values: Sequence[int] | NDArray[np.int64]) -> tuple[int, int, int]:
    z, y, x = (int(value) for value in values)
    return z, y, x


def _inside(crops: Sequence[_Crop], boxes: ReadBoxes) -> NDArray[np.int32]:
    """Start and stop of what lies in the volume, [B, 3, 2], in voxels of what was read."""
    shape = np.array([crop.row.shape[1:] for crop in crops])
    limits = np.stack([-boxes.start, shape - boxes.start], axis=-1)
    return np.clip(limits, 0, boxes.size[..., None]).astype(np.int32)
