"""Where a crop of a volume may lie, and the draw of one: pure functions of the seed and the sample index."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import ConfigError, DataError
from mimscale.store.manifest import Manifest
from mimscale.stream import order
from mimscale.stream.config import StreamConfig


@dataclass(frozen=True)
class Samples:
    """What to read, and the seed that belongs to it."""

    volume: NDArray[np.int64]  # [n] index into the plan's volumes
    origin: NDArray[np.int64]  # [n, 3] first voxel Z, Y, X; negative where the volume is smaller than the crop
    seed: NDArray[np.uint64]  # [n] for masks and augmentation


class CropSpace:
    """Where crops of each volume may lie, and the draw of one: pure in (seed, index, attempt)."""

    def __init__(
        self,
        shapes: NDArray[np.int64],
        foreground_boxes: NDArray[np.int64],
        crop_voxels: Sequence[int],
        config: StreamConfig,
    ) -> None:
        """Remember `shapes` [N, 3], `foreground_boxes` [N, 3, 2] (start, stop), all Z, Y, X in voxels."""
        self.shapes = np.ascontiguousarray(shapes, dtype=np.int64)
        self.crop_voxels = np.asarray(tuple(crop_voxels), dtype=np.int64)
        self.foreground_boxes = np.ascontiguousarray(foreground_boxes, dtype=np.int64)
        self._config = config
        if self.shapes.ndim != 2 or self.shapes.shape[1] != 3 or self.shapes.min(initial=1) < 1:
            raise ValueError(f"shapes must be [N, 3] of positive voxels, got {self.shapes.shape}")
        if self.foreground_boxes.shape != (len(self.shapes), 3, 2):
            raise ValueError(f"foreground boxes must be [{len(self.shapes)}, 3, 2], got {self.foreground_boxes.shape}")
        if self.crop_voxels.shape != (3,) or self.crop_voxels.min() < 1:
            raise ConfigError(f"crop_voxels={list(crop_voxels)}: expected three positive numbers Z, Y, X")
        if not len(self.shapes):
            raise DataError("no volume to draw samples from: the selected split or modality of the store is empty")

    @property
    def num_volumes(self) -> int:
        """N."""
        return len(self.shapes)

    def origins(
        self, seed: int, index: NDArray[np.int64], volume: NDArray[np.int64], attempt: int = 0
    ) -> NDArray[np.int64]:
        """Crop origins [n, 3] of samples `index` [n] in `volume` [n].

        Uniform over the multiples of `align_voxels`, and the last position that still fits, so that the far border of a
        volume is seen too. Along an axis where the volume is smaller than the crop, it lies in the crop's middle.
        """
        room = self.shapes[volume] - self.crop_voxels  # [n, 3] the last legal origin; negative: the volume is smaller
        last_legal = np.maximum(room, 0)
        first, last = np.zeros_like(last_legal), last_legal
        if self._config.origins == "foreground":
            # Origins whose crop has its middle in the box. A volume without foreground has an empty box: anywhere then.
            boxes = self.foreground_boxes[volume]
            has_foreground = (boxes[..., 1] > boxes[..., 0]).all(axis=1, keepdims=True)
            centred = np.clip(boxes - (self.crop_voxels // 2)[:, None] - np.array([0, 1]), 0, last_legal[..., None])
            first = np.where(has_foreground, centred[..., 0], first)
            last = np.where(has_foreground, centred[..., 1], last)
        step = self._config.align_voxels
        first = first // step * step
        choices = -(-(last - first) // step) + 1
        words = order.draw(seed, index, order.ORIGIN, attempt)[..., :3]
        drawn = np.minimum(first + step * order.below(words, choices), last_legal)
        return np.where(room < 0, -(-room // 2), drawn)

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
        """Hash of the shapes, and of the boxes where they matter."""
        digest = hashlib.sha256(self.shapes.astype("<i8").tobytes())
        if self._config.origins == "foreground":
            digest.update(self.foreground_boxes.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def manifest_geometry(manifest: Manifest, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shapes [n, 3] and foreground boxes [n, 3, 2] of the volumes `indices`, Z, Y, X in voxels.

    Raises:
        DataError: the volumes differ in their number of channels.
    """
    shapes = np.asarray(manifest.column("shape"), dtype=np.int64)[indices].reshape(-1, 4)  # C, Z, Y, X
    boxes = np.asarray(manifest.column("foreground_box"), dtype=np.int64)[indices].reshape(-1, 3, 2)
    channels = np.unique(shapes[:, 0])
    if len(channels) > 1:
        raise DataError(
            f"the selected volumes have {', '.join(map(str, channels))} channels, and a run takes one number of "
            "channels: select one modality"
        )
    return shapes[:, 1:], boxes
