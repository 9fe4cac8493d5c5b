"""Which patches are hidden, as a pure function of each sample's seed.

Nothing depends on the batch that a sample travels in, on ranks, workers or torch's generators: so masks are the same on
every world size, after every restart, and in every validation. No torch here: loader workers may draw masks as well.

    B batch | L patches a crop, Z slowest | U mask units a crop
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mimscale.models.config import MaskConfig, mask_grid
from mimscale.stream.order import MASK, draw

_RATIO_ATTEMPT = 1  # apart from the noise of units, should a batch's seed ever be a sample's seed too


def draw_masks(
    seeds: Sequence[int],
    crop_voxels: Sequence[int],
    patch_voxels: Sequence[int],
    config: MaskConfig,
    ratio_seed: int = 0,
) -> NDArray[np.bool_]:
    """Draw one mask a sample: bool [B, L], True where a patch is hidden, the same number in each row.

    Args:
        seeds: one 64-bit seed a sample.
        crop_voxels: Z, Y, X edges of the crop.
        patch_voxels: Z, Y, X edges of a patch.
        config: ratio and unit.
        ratio_seed: draws the ratio from `config.ratio_range`, if there is one; the same for a whole global batch.

    Raises:
        ValueError: crop, unit and patch do not divide.
    """
    grid = mask_grid(crop_voxels, patch_voxels, config)
    num_units = grid[0] * grid[1] * grid[2]
    words = draw(np.asarray(seeds, dtype=np.uint64)[:, None], np.arange(num_units), MASK).astype(np.uint64)
    noise = words[..., 0] << np.uint64(32) | words[..., 1]  # [B, U]
    # Hiding the units with the lowest noise draws a uniform random subset of exact size (He et al. 2022,
    # arXiv:2111.06377, sec. 3).
    lowest = noise.argsort(axis=1, kind="stable")[:, : hidden_units(num_units, config, ratio_seed)]
    hidden = np.zeros(noise.shape, dtype=np.bool_)
    np.put_along_axis(hidden, lowest, True, axis=1)
    blocks = hidden.reshape(len(seeds), *grid)
    for axis, (edge, patch) in enumerate(zip(config.unit_voxels or patch_voxels, patch_voxels, strict=True), start=1):
        blocks = np.repeat(blocks, edge // patch, axis=axis)  # a unit's patches share its fate
    return blocks.reshape(len(seeds), -1)


def hidden_units(num_units: int, config: MaskConfig, ratio_seed: int) -> int:
    """How many of `num_units` units are hidden: the ratio, rounded, but at least one unit stays and one goes."""
    ratio = config.ratio
    if config.ratio_range is not None:
        low, high = config.ratio_range
        ratio = low + (high - low) * int(draw(ratio_seed, 0, MASK, _RATIO_ATTEMPT)[0]) / 2**32
    return min(max(round(ratio * num_units), 1), num_units - 1)
