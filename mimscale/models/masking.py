"""Which patches are hidden, as a pure function of each sample's seed.

Nothing depends on the batch that a sample travels in, on ranks, workers or torch's generators: so masks are the same on
every world size, after every restart, and in every validation. No torch here: loader workers may draw masks as well.

    B batch | L patches a crop, Z slowest | U mask units a crop | N boxes
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mimscale.models.config import MaskConfig, Zyx, mask_grid
from mimscale.stream.order import MASK, below, draw

# Independent draws for one seed. Never renumber: the same seed would give other masks.
_UNITS, _RATIO, _BOX_SIZE, _BOX_PLACE, _CELL, _PREDICTED = range(6)
# Boxes dropped on a crop until enough is hidden. Their edges are a quarter to a half of the grid's, so one covers a
# twentieth of it; what 200 leave open (one unit in 10 000) is hidden last.
_BOXES = 200
_CELL_EDGE = 2  # units


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
        config: ratio, unit and style.
        ratio_seed: draws the ratio from `config.ratio_range`, if there is one; the same for a whole global batch.

    Raises:
        ValueError: crop, unit and patch do not divide.
    """
    grid = mask_grid(crop_voxels, patch_voxels, config)
    num_units = grid[0] * grid[1] * grid[2]
    key = np.asarray(seeds, dtype=np.uint64)
    turn = _noise(key, num_units, _UNITS)  # [B, U]: the units with the lowest are hidden
    if config.style != "random":
        # The style says which units come first, chance decides among equals; so any ratio is met exactly.
        first = _boxes_until_covered(key, grid) if config.style == "block" else _turn_in_cell(key, grid)
        turn = first.astype(np.uint64) << np.uint64(56) | turn >> np.uint64(8)
    hidden = _lowest(turn, hidden_units(num_units, config, ratio_seed))
    blocks = hidden.reshape(len(seeds), *grid)
    for axis, (edge, patch) in enumerate(zip(config.unit_voxels or patch_voxels, patch_voxels, strict=True), start=1):
        blocks = np.repeat(blocks, edge // patch, axis=axis)  # a unit's patches share its fate
    return blocks.reshape(len(seeds), -1)


def draw_predicted(seeds: Sequence[int], hidden: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """A random part of the hidden patches of each sample, at least one: bool [B, L] -> bool [B, L].

    Which part is predicted in a step is the decoder's mask of Wang et al. 2023, arXiv:2303.16727, sec. 3.2.
    """
    count = max(round(share * int(hidden[0].sum())), 1)
    noise = _noise(np.asarray(seeds, dtype=np.uint64), hidden.shape[1], _PREDICTED)
    return _lowest(np.where(hidden, noise >> np.uint64(1), np.uint64(2**64 - 1)), count)


def hidden_units(num_units: int, config: MaskConfig, ratio_seed: int) -> int:
    """How many of `num_units` units are hidden: the ratio, rounded, but at least one unit stays and one goes."""
    ratio = config.ratio
    if config.ratio_range is not None:
        low, high = config.ratio_range
        ratio = low + (high - low) * int(draw(ratio_seed, 0, MASK, _RATIO)[0]) / 2**32
    return min(max(round(ratio * num_units), 1), num_units - 1)


def _noise(key: NDArray[np.uint64], count: int, purpose: int) -> NDArray[np.uint64]:
    """64 random bits for each sample and index: [B, count]."""
    words = draw(key[:, None], np.arange(count), MASK, purpose).astype(np.uint64)
    return np.asarray(words[..., 0] << np.uint64(32) | words[..., 1])


def _lowest(turn: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """True at the `count` lowest of each row.

    Of noise, that is a uniform random subset of exact size (He et al. 2022, arXiv:2111.06377, sec. 3).
    """
    lowest = turn.argsort(axis=1, kind="stable")[:, :count]
    chosen = np.zeros(turn.shape, dtype=np.bool_)
    np.put_along_axis(chosen, lowest, True, axis=1)
    return chosen


def _boxes_until_covered(key: NDArray[np.uint64], grid: Zyx) -> NDArray[np.int64]:
    """How many random boxes fall before one covers a unit: [B, U].

    A box may hang over the border, so that a unit there is covered as often as one in the middle.
    """
    sizes = draw(key[:, None], np.arange(_BOXES), MASK, _BOX_SIZE)  # [B, N, 4]
    places = draw(key[:, None], np.arange(_BOXES), MASK, _BOX_PLACE)
    covered = np.ones((len(key), _BOXES, 1, 1, 1), dtype=np.bool_)
    for axis, edge in enumerate(grid):
        smallest = -(-edge // 4)
        size = smallest + below(sizes[..., axis], max(edge // 2 - smallest, 0) + 1)  # [B, N]
        start = below(places[..., axis], edge + size - 1) - size + 1
        unit = np.arange(edge)
        along = (unit >= start[..., None]) & (unit < (start + size)[..., None])  # [B, N, edge]
        shape = [len(key), _BOXES] + [edge if other == axis else 1 for other in range(3)]
        covered = covered & along.reshape(shape)
    flat = covered.reshape(len(key), _BOXES, -1)
    return np.asarray(np.where(flat.any(axis=1), flat.argmax(axis=1), _BOXES))


def _turn_in_cell(key: NDArray[np.uint64], grid: Zyx) -> NDArray[np.int64]:
    """When a unit's place in its cell of 2 x 2 x 2 has its turn, the same in all cells of a sample: [B, U]."""
    turns = _noise(key, _CELL_EDGE**3, _CELL).argsort(axis=1).argsort(axis=1)  # [B, 8]
    z, y, x = np.meshgrid(*(np.arange(edge) % _CELL_EDGE for edge in grid), indexing="ij")
    place = (z * _CELL_EDGE + y) * _CELL_EDGE + x
    return np.asarray(turns[:, place.ravel()])
