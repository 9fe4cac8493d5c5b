"""Where the windows of a volume lie: a function of its box, its id and the settings alone.

Z Y X volume, voxels | W windows
"""

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np

Zyx = tuple[int, int, int]


def covered_box(
    box: Sequence[Sequence[int]], size_voxels: Sequence[int], crop_voxels: Sequence[int]
) -> tuple[Zyx, Zyx]:
    """Start and stop of what windows are to cover: the box, inside of the volume and at least as large as a window.

    An empty box stands for the whole volume: somebody whose scan is all air still gets features.

    Args:
        box: start and stop along Z, Y, X.
        size_voxels: of the volume, at least as large as a window.
        crop_voxels: of a window.

    Raises:
        ValueError: the volume is smaller than a window.
    """
    if any(size < crop for size, crop in zip(size_voxels, crop_voxels, strict=True)):
        raise ValueError(f"a volume of {tuple(size_voxels)} voxels is smaller than a window of {tuple(crop_voxels)}")
    if any(stop <= start for start, stop in box):
        box = [(0, size) for size in size_voxels]
    edges = []
    for (start, stop), size, crop in zip(box, size_voxels, crop_voxels, strict=True):
        low, high = max(0, start), min(size, stop)
        missing = max(0, crop - (high - low))
        low = min(max(0, low - missing // 2), size - crop if missing else low)
        edges.append((low, max(high, low + crop)))
    (z0, z1), (y0, y1), (x0, x1) = edges
    return (z0, y0, x0), (z1, y1, x1)


def sliding_origins(start: Zyx, stop: Zyx, crop_voxels: Sequence[int], overlap: float) -> list[Zyx]:
    """First voxels of windows that cover [start, stop), Z first; the last along an axis ends with the box.

    Args:
        start: of the box.
        stop: of the box, which is at least as large as a window.
        crop_voxels: of a window.
        overlap: share of a window that the next one covers again, 0 to below 1.
    """
    axes = []
    for low, high, crop in zip(start, stop, crop_voxels, strict=True):
        step = max(1, int(crop * (1 - overlap)))
        count = math.ceil((high - low - crop) / step) + 1
        axes.append([min(low + number * step, high - crop) for number in range(count)])
    return [(z, y, x) for z, y, x in itertools.product(*axes)]


def drawn_origins(
    start: Zyx, stop: Zyx, crop_voxels: Sequence[int], *, count: int, volume_id: str, seed: int
) -> list[Zyx]:
    """First voxels of `count` windows, uniform in [start, stop); they depend on no other volume."""
    digest = hashlib.sha256(f"windows of {volume_id}".encode()).digest()
    random = np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])
    last = [high - crop for high, crop in zip(stop, crop_voxels, strict=True)]
    drawn = random.integers(start, last, size=(count, 3), endpoint=True)
    return [(int(z), int(y), int(x)) for z, y, x in drawn]
