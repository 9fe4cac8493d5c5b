"""Whole volumes at the spacing that a network was trained at, and its answer back on the grid of the store.

Both ways are linear, as in training. Logits come back, not classes: between two voxels the likelier class wins.

    C channels | K outputs | Z Y X volume, voxels | n some planes along Z
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mimscale.evaluate.planes import STRIPE_BYTES, Planes, Rolling
from mimscale.stream.device import places, resample_axis

Zyx = tuple[int, int, int]
SpacingMm = tuple[float, float, float]
# A spacing of 0.7 mm may stand there as 0.69999999: a hair must not cost a voxel.
_HAIR = 1e-3


def target_voxels(size_voxels: Sequence[int], spacing_mm: SpacingMm, target_mm: SpacingMm | None) -> Zyx:
    """Voxels at the target spacing that cover `size_voxels` of the store."""
    return _scaled(size_voxels, spacing_mm, target_mm or spacing_mm)


def stored_voxels(size_voxels: Sequence[int], spacing_mm: SpacingMm, target_mm: SpacingMm | None) -> Zyx:
    """Voxels of the store that cover `size_voxels` at the target spacing."""
    return _scaled(size_voxels, target_mm or spacing_mm, spacing_mm)


class AtSpacing:
    """An image, interpolated linearly to another spacing. Both grids begin at the edge of their first voxels.

    Args:
        image: at `from_mm`.
        from_mm: voxel edges [Z, Y, X] of the image.
        to_mm: those of the result.
        size_voxels: [Z, Y, X] of the result; beyond the image's last centres its border goes on.
    """

    def __init__(self, image: Planes, from_mm: SpacingMm, to_mm: SpacingMm, size_voxels: Zyx) -> None:
        self._image = image
        self._size = size_voxels
        self._places = _places(from_mm, to_mm, size_voxels)

    @property
    def shape(self) -> tuple[int, ...]:
        """C, Z, Y, X."""
        return (self._image.shape[0], *self._size)

    def planes(self, start: int, stop: int) -> Tensor:
        """See `Planes`."""
        low, high = _needed(self._places[0], start, stop, self._image.shape[1])
        return _interpolated(self._image.planes(low, high), self._places, start, stop, low)


def at_spacing(
    stream: Iterator[Tensor], shape: Sequence[int], from_mm: SpacingMm, to_mm: SpacingMm, size_voxels: Zyx
) -> Iterator[Tensor]:
    """What `AtSpacing` is for an image, for a stream of planes [K, n, Y, X] that are [K, Z, Y, X] = `shape` in all."""
    rolling = Rolling(stream, shape)
    there = _places(from_mm, to_mm, size_voxels)
    z, y, x = size_voxels
    stripe = max(1, STRIPE_BYTES // (4 * shape[0] * y * x))
    for start in range(0, z, stripe):
        stop = min(start + stripe, z)
        low, high = _needed(there[0], start, stop, shape[1])
        yield _interpolated(rolling.planes(low, high), there, start, stop, low)


def _scaled(size_voxels: Sequence[int], from_mm: SpacingMm, to_mm: SpacingMm) -> Zyx:
    z, y, x = (max(1, math.ceil(edge * a / b - _HAIR)) for edge, a, b in zip(size_voxels, from_mm, to_mm, strict=True))
    return z, y, x


def _places(from_mm: SpacingMm, to_mm: SpacingMm, size_voxels: Zyx) -> tuple[Tensor, Tensor, Tensor]:
    """Where the voxels of the new grid lie on the old one, along each axis: [1, n] float64."""
    step = torch.tensor(to_mm, dtype=torch.float64) / torch.tensor(from_mm, dtype=torch.float64)
    grid = torch.stack([0.5 * step - 0.5, step], dim=-1)[None]  # [1, 3, 2]
    z, y, x = (places(grid, axis, edge) for axis, edge in enumerate(size_voxels))
    return z, y, x


def _needed(place: Tensor, start: int, stop: int, size: int) -> tuple[int, int]:
    """First and last + 1 old plane that the new planes [start, stop) are made of."""
    low, high = (math.floor(place[0, at].item()) for at in (start, stop - 1))
    return min(max(low, 0), size - 1), min(max(high + 2, 1), size)


def _interpolated(part: Tensor, there: tuple[Tensor, Tensor, Tensor], start: int, stop: int, low: int) -> Tensor:
    """New planes [start, stop) of old ones from `low` on: [C, n, Y, X]."""
    z, y, x = there
    image = part[None]
    # Taking whole planes away from a place loses none of its bits: the weights are those of the whole volume.
    for axis, place in enumerate((z[:, start:stop] - low, y, x)):
        image = resample_axis(image, place, axis)
    return image[0]
