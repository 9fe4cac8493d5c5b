"""Whole volumes at the spacing that a network was trained at, and its answer back on the grid of the store.

C channels | K classes | Z Y X volume, voxels
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimscale.stream.device import resample_linear

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


def predict_at_spacing(
    image: Tensor, spacing_mm: SpacingMm, target_mm: SpacingMm | None, predict: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits [K, Z, Y, X] of an image [C, Z, Y, X] on its own grid, by a network that sees another spacing.

    Both ways are linear, as in training. Logits come back, not classes: between two voxels the likelier class wins.

    Args:
        image: normalised, at `spacing_mm`.
        spacing_mm: of the image, [Z, Y, X].
        target_mm: what the network was trained at; None: the image's own.
        predict: [C, Z, Y, X] -> [K, Z, Y, X] at the target spacing.
    """
    if target_mm is None:
        return predict(image)
    z, y, x = image.shape[1:]
    return _resampled(predict(at_spacing(image, spacing_mm, target_mm)), target_mm, spacing_mm, (z, y, x))


def at_spacing(image: Tensor, spacing_mm: SpacingMm, target_mm: SpacingMm | None) -> Tensor:
    """An image [C, Z, Y, X] at the target spacing, `target_voxels` of it; as it is where there is none."""
    if target_mm is None:
        return image
    return _resampled(image, spacing_mm, target_mm, target_voxels(image.shape[1:], spacing_mm, target_mm))


def _resampled(image: Tensor, from_mm: SpacingMm, to_mm: SpacingMm, size_voxels: Zyx) -> Tensor:
    """Both grids begin at the same edge of their first voxels; beyond the last centres the border goes on."""
    step = torch.tensor(to_mm, dtype=torch.float64) / torch.tensor(from_mm, dtype=torch.float64)
    grid = torch.stack([0.5 * step - 0.5, step], dim=-1)[None]  # [1, 3, 2]
    return resample_linear(image[None], grid, size_voxels)[0]


def _scaled(size_voxels: Sequence[int], from_mm: SpacingMm, to_mm: SpacingMm) -> Zyx:
    z, y, x = (max(1, math.ceil(edge * a / b - _HAIR)) for edge, a, b in zip(size_voxels, from_mm, to_mm, strict=True))
    return z, y, x
