"""Where a crop of a volume may lie, and the draw of one: pure functions of the seed and the sample index."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mimscale.errors import ConfigError, DataError
from mimscale.store.chunk_maps import ChunkMaps, load_chunk_maps
from mimscale.store.manifest import Manifest
from mimscale.stream import order
from mimscale.stream.config import StreamConfig
from mimscale.stream.select import parse_attribute


@dataclass(frozen=True)
class Samples:
    """What to read, and the seed that belongs to it. All boxes are in voxels of the store, Z, Y, X."""

    volume: NDArray[np.int64]  # [n] index into the plan's volumes
    origin: NDArray[np.int64]  # [n, 3] first voxel; negative where the volume is smaller than the crop
    seed: NDArray[np.uint64]  # [n] for masks and augmentation


@dataclass(frozen=True)
class ReadBoxes:
    """What is read of the store for crops, and where the crops' voxels lie in it: Z, Y, X."""

    start: NDArray[np.int64]  # [n, 3] first voxel in the volume
    size: NDArray[np.int64]  # [n, 3]
    first: NDArray[np.float64]  # [n, 3] where the centre of a crop's first voxel lies, in voxels of the box
    step: NDArray[np.float64]  # [n, 3] from each to the next one


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """What a plan knows of its volumes."""

    shapes: NDArray[np.int64]  # [N, 3]
    foreground_boxes: NDArray[np.int64]  # [N, 3, 2] start, stop
    spacing_mm: NDArray[np.float64] | None = None  # [N, 3], for `target_spacing_mm`
    maps: ChunkMaps | None = None  # for `origins: occupied` and `labelled`
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # [N] rows of `maps`
    overlay: str | None = None  # whose classes `origins: labelled` looks for
    kinds: NDArray[np.str_] | None = None  # [N] the value that weights go by


class CropSpace:
    """Where crops of each volume may lie, and the draw of one: pure in (seed, index, attempt)."""

    def __init__(self, volumes: Volumes, crop_voxels: Sequence[int], config: StreamConfig) -> None:
        """Draw crops of `crop_voxels` Z, Y, X; at `config.target_spacing_mm`, when there is one."""
        self.shapes = np.ascontiguousarray(volumes.shapes, dtype=np.int64)
        self.crop_voxels = np.asarray(tuple(crop_voxels), dtype=np.int64)
        self.foreground_boxes = np.ascontiguousarray(volumes.foreground_boxes, dtype=np.int64)
        self._volumes = volumes
        self._config = config
        self.target_spacing_mm = config.target_spacing_mm
        if self.shapes.ndim != 2 or self.shapes.shape[1] != 3 or self.shapes.min(initial=1) < 1:
            raise ValueError(f"shapes must be [N, 3] of positive voxels, got {self.shapes.shape}")
        if self.foreground_boxes.shape != (len(self.shapes), 3, 2):
            raise ValueError(f"foreground boxes must be [{len(self.shapes)}, 3, 2], got {self.foreground_boxes.shape}")
        if self.crop_voxels.shape != (3,) or self.crop_voxels.min() < 1:
            raise ConfigError(f"crop_voxels={list(crop_voxels)}: expected three positive numbers Z, Y, X")
        region = config.region_voxels
        if region is not None and (np.asarray(region) < self.crop_voxels).any():
            raise ConfigError(f"stream.region_voxels={region}: must hold a crop of crop_voxels={list(crop_voxels)}")
        if config.origins == "labelled" and volumes.overlay is None:
            raise ConfigError("stream.origins=labelled: needs an overlay, and this run reads none; use occupied")
        if not len(self.shapes):
            raise DataError("no volume to draw samples from: the selected split or modality of the store is empty")

    @property
    def num_volumes(self) -> int:
        """N."""
        return len(self.shapes)

    def extents(self, volume: NDArray[np.int64], voxels: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Voxels of the store [n, 3] that a box of `voxels` at the target spacing covers in each `volume` [n]."""
        if self.target_spacing_mm is None:
            return np.broadcast_to(np.asarray(voxels, dtype=np.int64), (len(volume), 3))
        assert self._volumes.spacing_mm is not None, "volumes without spacing"
        edges_mm = np.asarray(voxels) * np.asarray(self.target_spacing_mm)
        # A spacing of 0.7 mm may stand there as 0.69999999: a hair must not cost a voxel.
        voxels = np.ceil(edges_mm / self._volumes.spacing_mm[volume] - 1e-3)
        return np.maximum(1, voxels).astype(np.int64)

    def draw(
        self, seed: int, index: NDArray[np.int64], volume: NDArray[np.int64], draw_id: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Crop origins [n, 3] of samples `index` [n] in `volume` [n].

        With `region_voxels`, crops with the same `draw_id` [n] lie in one region: it is drawn as a crop would be, and
        they lie in it uniformly. A region is cut to its volume.
        """
        if self._config.region_voxels is None:
            return self.origins(seed, index, volume)
        extent = self.extents(volume, self.crop_voxels)
        wanted = self.extents(volume, self._config.region_voxels)
        size = np.maximum(extent, np.minimum(wanted, self.shapes[volume]))
        start = self._placed(seed, draw_id, volume, size, order.REGION, attempt=0)
        words = order.draw(seed, index, order.ORIGIN)[..., :3]
        return start + order.below(words, size - extent + 1)

    def read_boxes(self, volume: NDArray[np.int64], origin: NDArray[np.int64]) -> ReadBoxes:
        """What to read for crops at `origin` [n, 3] of `volume` [n].

        At the store's spacing that is the crop. At a target spacing, voxel j of the crop has its centre
        (j + 0.5) * target / spacing - 0.5 voxels behind the centre of the first voxel, and the box holds both
        neighbours of each.
        """
        if self.target_spacing_mm is None:
            step = np.ones(origin.shape)
        else:
            assert self._volumes.spacing_mm is not None, "volumes without spacing"
            step = np.asarray(self.target_spacing_mm) / self._volumes.spacing_mm[volume]
        first = 0.5 * step - 0.5
        low = np.floor(first).astype(np.int64)
        high = np.ceil(first + (self.crop_voxels - 1) * step).astype(np.int64) + 1
        return ReadBoxes(start=origin + low, size=high - low, first=first - low, step=step)

    def origins(
        self, seed: int, index: NDArray[np.int64], volume: NDArray[np.int64], attempt: int = 0
    ) -> NDArray[np.int64]:
        """Crop origins [n, 3] of samples `index` [n] in `volume` [n], each on its own.

        Uniform over the multiples of `align_voxels`, and the last position that still fits, so that the far border of a
        volume is seen too. Along an axis where the volume is smaller than the crop, it lies in the crop's middle.
        """
        return self._placed(seed, index, volume, self.extents(volume, self.crop_voxels), order.ORIGIN, attempt)

    def _placed(
        self,
        seed: int,
        index: NDArray[np.int64],
        volume: NDArray[np.int64],
        extent: NDArray[np.int64],
        purpose: int,
        attempt: int,
    ) -> NDArray[np.int64]:
        """First voxels [n, 3] of boxes of `extent` [n, 3], as `config.origins` says."""
        room = self.shapes[volume] - extent  # [n, 3] the last legal origin; negative: the volume is smaller
        last_legal = np.maximum(room, 0)
        first, last = np.zeros_like(last_legal), last_legal
        step = self._config.align_voxels
        if self._config.origins in ("occupied", "labelled"):
            first, last = self._around_chunks(seed, index, volume, extent, last_legal, attempt)
            aligned = -(-first // step) * step
            first = np.where(aligned <= last, aligned, first)
            # Off the grid only where the far border would never be seen otherwise.
            limit = np.where(last == last_legal, last, first + (last - first) // step * step)
        else:
            if self._config.origins == "foreground":
                # Origins whose crop has its middle in the box. Without foreground the box is empty: anywhere then.
                boxes = self.foreground_boxes[volume]
                has_foreground = (boxes[..., 1] > boxes[..., 0]).all(axis=1, keepdims=True)
                centred = np.clip(boxes - (extent // 2)[..., None] - np.array([0, 1]), 0, last_legal[..., None])
                first = np.where(has_foreground, centred[..., 0], first)
                last = np.where(has_foreground, centred[..., 1], last)
            first = first // step * step
            limit = np.minimum(first - (first - last) // step * step, last_legal)
        choices = -(-(limit - first) // step) + 1
        words = order.draw(seed, index, purpose, attempt)[..., :3]
        drawn = np.minimum(first + step * order.below(words, choices), limit)
        return np.where(room < 0, -(-room // 2), drawn)

    def _around_chunks(
        self,
        seed: int,
        index: NDArray[np.int64],
        volume: NDArray[np.int64],
        extent: NDArray[np.int64],
        last_legal: NDArray[np.int64],
        attempt: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last origin [n, 3] of the boxes that hold one chunk, drawn among those that count."""
        maps = self._volumes.maps
        assert maps is not None, "checked when the plan was made"
        first, last = np.zeros_like(last_legal), last_legal.copy()
        words = order.draw(seed, index, order.CHUNK, attempt)
        positive, negative = self._config.pos_neg
        anywhere = words[:, 0] >= positive / (positive + negative) * 2.0**32
        for place, number in enumerate(volume):
            chunks = self._chunks_that_count(maps, int(number), bool(anywhere[place]), words[place, 1])
            if not len(chunks):  # nothing but air, or no label: anywhere
                continue
            chunk = chunks[order.below(words[place, 2], len(chunks))]
            start = chunk * maps.chunk_voxels
            stop = np.minimum(start + maps.chunk_voxels, self.shapes[number])
            ends = np.stack([start, stop - extent[place]])
            first[place], last[place] = np.clip([ends.min(axis=0), ends.max(axis=0)], 0, last_legal[place])
        return first, last

    def _chunks_that_count(
        self, maps: ChunkMaps, volume: int, anywhere: bool, word: NDArray[np.uint32]
    ) -> NDArray[np.int64]:
        """Grid places [n, 3]; of none, the box may lie anywhere."""
        row, shape = int(self._volumes.rows[volume]), self.shapes[volume]
        if self._config.origins == "occupied":
            return maps.occupied(row, shape)
        assert self._volumes.overlay is not None, "checked by the constructor"
        classes = [] if anywhere else maps.labelled(row, self._volumes.overlay, shape)
        # Every class that the volume has is as likely: a small organ is seen as often as a large one.
        return classes[int(order.below(word, len(classes)))] if classes else np.zeros((0, 3), dtype=np.int64)

    def substitutes(
        self, seed: int, index: NDArray[np.int64], volume: NDArray[np.int64], attempt: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Volumes [n] and origins [n, 3] to read instead of unreadable `volume` [n], for attempt 1, 2 ...

        Each sample tries the other volumes in an order of its own, none twice before all were tried. Neighbours in the
        manifest would not do: they may lie in the same damaged pack.
        """
        others = self.num_volumes - 1
        if others:
            seeds = order.draw_seeds(seed, index, order.SUBSTITUTE)
            turn = np.array([(attempt - 1) % others])
            step = np.array([order.permuted(turn, others, int(own), epoch=0)[0] for own in seeds], dtype=np.int64)
            volume = (volume + 1 + step) % self.num_volumes
        return volume, self.origins(seed, index, volume, attempt)

    @cached_property
    def digest(self) -> str:
        """Hash of what the origins depend on: shapes, and boxes and spacings where they matter."""
        digest = hashlib.sha256(self.shapes.astype("<i8").tobytes())
        if self._config.origins == "foreground":
            digest.update(self.foreground_boxes.astype("<i8").tobytes())
        if self.target_spacing_mm is not None and self._volumes.spacing_mm is not None:
            digest.update(self._volumes.spacing_mm.astype("<f8").tobytes())
        return digest.hexdigest()[:16]


def read_volumes(
    manifest: Manifest,
    indices: NDArray[np.int64],
    config: StreamConfig,
    store: Path | None = None,
    overlay: str | None = None,
) -> Volumes:
    """What a plan of the volumes `indices` [N] needs to know, and nothing else.

    Args:
        manifest: with the columns that `config` asks for.
        indices: its rows.
        config: how crops are drawn.
        store: the store's folder, where the maps of chunks lie.
        overlay: whose classes `origins: labelled` looks for.

    Raises:
        DataError: the volumes differ in their number of channels, or the store has no maps of its chunks.
        ConfigError: weights go by what the manifest does not have.
    """
    shapes = np.asarray(manifest.column("shape"), dtype=np.int64)[indices].reshape(-1, 4)  # C, Z, Y, X
    boxes = np.asarray(manifest.column("foreground_box"), dtype=np.int64)[indices].reshape(-1, 3, 2)
    channels = np.unique(shapes[:, 0])
    if len(channels) > 1:
        raise DataError(
            f"the selected volumes have {', '.join(map(str, channels))} channels, and a run takes one number of "
            "channels: select one kind by stream.filter, for example shape[0] == 1"
        )
    maps = None
    if config.origins in ("occupied", "labelled"):
        assert store is not None, "maps of chunks lie in the store"
        maps = load_chunk_maps(store, manifest)
    kinds = None
    if config.weights is not None:
        attribute = parse_attribute(config.weights.by, "stream.weights.by")
        kinds = attribute.values(manifest).take(pa.array(indices)).to_numpy(zero_copy_only=False).astype(str)
    spacing_mm = None if config.target_spacing_mm is None else manifest.column("spacing_mm")[indices]
    return Volumes(
        shapes=shapes[:, 1:],
        foreground_boxes=boxes,
        spacing_mm=spacing_mm,
        maps=maps,
        rows=indices,
        overlay=overlay,
        kinds=kinds,
    )
