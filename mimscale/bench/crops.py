"""Which crops a benchmark reads, and how random a way of drawing them is: pure functions.

K crops a call | Z Y X voxels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
_CALLS_SIMULATED = 100


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way of drawing crops from one volume."""

    crops: int = 1  # of a call: they come from one decode
    align_voxels: int = 1  # origins are multiples of this; 0: of the chunk edge
    repeated: bool = False  # one crop, `crops` masks on it


MODES = {
    "random": Mode(),
    "aligned_16": Mode(align_voxels=16),
    "grid": Mode(align_voxels=0),
    "region_4": Mode(crops=4),
    "masks_4": Mode(crops=4, repeated=True),
}


def draw(
    mode: Mode, shapes: Sequence[Triple], crop: Triple, chunk: int, seed: int, number: int
) -> tuple[int, list[Triple]]:
    """Call `number`: which of the volumes of `shapes`, and the first voxel of each crop that is read from it.

    Crops of a region: the region lies on the chunk grid and is a chunk larger than a crop; the offset of a crop is below
    a chunk edge. Each crop alone is then as likely to lie anywhere as with `random`.
    """
    random = np.random.Generator(np.random.Philox(key=seed, counter=number << 64))
    volume = int(random.integers(len(shapes)))
    last = np.maximum(np.array(shapes[volume]) - crop, 0)
    if mode.crops > 1 and not mode.repeated:
        corner = random.integers(last + 1) // chunk * chunk
        origins = corner + random.integers(np.minimum(last - corner, chunk - 1) + 1, size=(mode.crops, 3))
    else:
        step = mode.align_voxels or chunk
        origins = random.integers(last // step + 1)[None] * step
    return volume, [(int(z), int(y), int(x)) for z, y, x in origins]


def chunks_of(origins: Sequence[Triple], crop: Triple, chunk: int) -> set[Triple]:
    """Corners, in chunks, of all chunks that crops at `origins` touch."""
    touched: set[Triple] = set()
    for origin in origins:
        z, y, x = (range(start // chunk, -(-(start + edge) // chunk)) for start, edge in zip(origin, crop, strict=True))
        touched.update(product(z, y, x))
    return touched


def randomness(mode: Mode, shapes: Sequence[Triple], crop: Triple, chunk: int) -> dict[str, float]:
    """What a mode costs, over simulated calls.

    Returns:
        `overlap`: the part of its voxels that a crop shares with another of the same call, on average over pairs;
        `distinct`: voxels that are in any crop of a call, for each voxel that is trained on.
    """
    overlaps, distinct = [], []
    for number in range(_CALLS_SIMULATED):
        _, origins = draw(mode, shapes, crop, chunk, seed=0, number=number)
        if mode.repeated:
            origins = origins * mode.crops
        overlaps += [_shared(one, other, crop) for one, other in combinations(origins, 2)]
        distinct.append(_union(np.array(origins), crop) / (len(origins) * int(np.prod(crop))))
    return {"overlap": round(float(np.mean(overlaps or [0])), 3), "distinct": round(float(np.mean(distinct)), 3)}


def _shared(one: Triple, other: Triple, crop: Triple) -> float:
    return float(np.prod([max(0, edge - abs(a - b)) / edge for a, b, edge in zip(one, other, crop, strict=True)]))


def _union(origins: NDArray[np.int64], crop: Triple) -> int:
    first = origins.min(axis=0)
    seen = np.zeros(origins.max(axis=0) - first + crop, dtype=bool)
    for z, y, x in origins - first:
        seen[z : z + crop[0], y : y + crop[1], x : x + crop[2]] = True
    return int(seen.sum())
