"""Augmentation on the device: what happens to a sample follows from its seed alone.

    B samples | C channels | Z Y X crop, voxels

The parameters are drawn on the host, from counter-based words of each sample's seed, so they are the same on every
number of ranks, with every micro-batch and after a resume. The voxels change where the batch already is: a batch of
crops is a few kernels there, and no loader process has to do it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mimscale.store.layout import IGNORE_VALUE
from mimscale.stream import order
from mimscale.stream.batch import Batch
from mimscale.stream.config import AugmentConfig
from mimscale.stream.device import to_device

# Which words of a sample's seed decide what. Never renumber: the same seed would give other samples.
_FLIP, _ROT90, _AFFINE, _ROTATE, _ZOOM, _TRANSLATE, _SCALE, _SHIFT, _GAMMA, _NOISE, _NOISE_SEED = range(11)
_WORDS_PER_VIEW = 64
_WORD_VALUES = 2.0**32


def augment_batch(
    batch: Batch, label: Tensor | None, image: Tensor, valid: Tensor, config: AugmentConfig, view: int = 0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A training batch as `config` changes it: image, label, valid, of the shapes that they have already.

    Args:
        batch: where the voxels come from.
        label: its labels on the grid of `image`, or None.
        image: its normalised voxels.
        valid: what lies in the stored volume.
        config: what may happen.
        view: which of a sample's independent draws.
    """
    return augment(image, label, valid, draw(batch.seeds, config, view), np.array(batch.spacing_mm))


@dataclass(frozen=True)
class Draws:
    """What happens to each sample. Neutral values (no flip, factor 1 ...) stand where nothing does."""

    flip: NDArray[np.bool_]  # [B, 3] along Z, Y, X
    quarter_turns: NDArray[np.int64]  # [B] from Y to X
    affine: NDArray[np.bool_]  # [B] whether `matrix` and `offset` are to be applied
    matrix: NDArray[np.float64]  # [B, 3, 3] place in the new crop -> place in the old one, both Z Y X from its middle
    offset: NDArray[np.float64]  # [B, 3] voxels, added to that
    scale: NDArray[np.float64]  # [B]
    shift: NDArray[np.float64]  # [B]
    gamma: NDArray[np.float64]  # [B]
    noise_std: NDArray[np.float64]  # [B]
    noise_seed: NDArray[np.uint64]  # [B]


def draw(seeds: list[int], config: AugmentConfig, view: int = 0) -> Draws:
    """Draw what happens to samples with these seeds; each `view` of a sample is an independent draw."""
    key = np.array(seeds, dtype=np.uint64)

    def words(what: int) -> NDArray[np.uint32]:
        """Four words for each sample: the first says whether, the others how much. [B, 4]"""
        return order.draw(key, np.full(len(key), view * _WORDS_PER_VIEW + what), order.AUGMENTATION)

    def happens(what: int, probability: float) -> NDArray[np.bool_]:
        return np.asarray(words(what)[:, 0] < probability * _WORD_VALUES)

    def symmetric(what: int, largest: float | tuple[float, float, float]) -> NDArray[np.float64]:
        """Uniform in [-largest, largest): [B, 3]."""
        return np.asarray((words(what)[:, 1:] / _WORD_VALUES * 2 - 1) * np.asarray(largest))

    def log_uniform(what: int, low: float, high: float) -> NDArray[np.float64]:
        """Between two numbers: [B]."""
        return np.asarray(low * (high / low) ** (words(what)[:, 1] / _WORD_VALUES))

    rotation = _rotations(np.deg2rad(symmetric(_ROTATE, config.rotate_deg)))
    zoom = log_uniform(_ZOOM, *config.zoom)
    noise_std = config.noise_std * words(_NOISE)[:, 1] / _WORD_VALUES
    return Draws(
        flip=words(_FLIP)[:, 1:] < np.array(config.flip_prob) * _WORD_VALUES,
        quarter_turns=np.where(happens(_ROT90, config.rot90_prob), 1 + order.below(words(_ROT90)[:, 1], 3), 0),
        affine=happens(_AFFINE, config.affine_prob),
        matrix=rotation / zoom[:, None, None],
        offset=symmetric(_TRANSLATE, config.translate_voxels),
        scale=np.where(happens(_SCALE, config.scale_prob), 1 + symmetric(_SCALE, config.scale_by)[:, 0], 1.0),
        shift=np.where(happens(_SHIFT, config.shift_prob), symmetric(_SHIFT, config.shift_by)[:, 0], 0.0),
        gamma=np.where(happens(_GAMMA, config.gamma_prob), log_uniform(_GAMMA, *config.gamma), 1.0),
        noise_std=np.where(happens(_NOISE, config.noise_prob), noise_std, 0.0),
        noise_seed=order.draw_seeds(key, np.full(len(key), view * _WORDS_PER_VIEW + _NOISE_SEED), order.AUGMENTATION),
    )


def augment(
    image: Tensor, label: Tensor | None, valid: Tensor, draws: Draws, spacing_mm: NDArray[np.float64] | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Apply `draws` to a batch on its device; the arguments themselves do not change.

    Labels move with the voxels, to the nearest one, and their values never change. What an affine map brings in from
    outside of the crop is unknown: the border is repeated there, labels are the ignore value and `valid` is False.

    Args:
        image: [B, C, Z, Y, X] normalised, float32 or float64.
        label: [B, Z, Y, X] uint8, or None.
        valid: [B, 1, Z, Y, X] bool, False outside of the stored volume.
        draws: what to do.
        spacing_mm: [B, 3] Z, Y, X, so that a rotation turns the anatomy and does not shear it; None: voxels are cubes.

    Returns:
        image, label and valid of the same shapes.

    Raises:
        ValueError: a quarter turn of a crop whose edges along Y and X differ.
    """
    image, label, valid = _moved(image, label, valid, draws)
    chosen = np.flatnonzero(draws.affine)
    if len(chosen):
        image, label, valid = _warped(image, label, valid, draws, chosen, spacing_mm)
    return _intensities(image, draws), label, valid


def _moved(image: Tensor, label: Tensor | None, valid: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None, Tensor]:
    """Flips and quarter turns: voxels change their places and nothing else."""
    chosen = np.flatnonzero(draws.flip.any(axis=1) | (draws.quarter_turns != 0)).tolist()
    if not chosen:
        return image, label, valid
    if draws.quarter_turns.any() and image.shape[-1] != image.shape[-2]:
        raise ValueError(f"quarter turns of a crop of {tuple(image.shape[2:])} voxels: its edges along Y and X differ")
    arrays = [None if array is None else array.clone() for array in (image, label, valid)]
    for sample in chosen:
        axes = [axis - 3 for axis in range(3) if draws.flip[sample, axis]]
        turns = int(draws.quarter_turns[sample])
        for old, new in zip((image, label, valid), arrays, strict=True):
            if old is not None and new is not None:
                new[sample] = old[sample].flip(axes).rot90(turns, (-2, -1))
    image, label, valid = arrays  # type: ignore[assignment]
    return image, label, valid


def _warped(
    image: Tensor,
    label: Tensor | None,
    valid: Tensor,
    draws: Draws,
    chosen: NDArray[np.int64],
    spacing_mm: NDArray[np.float64] | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Samples `chosen` [n] through their affine maps."""
    matrix = draws.matrix[chosen]
    if spacing_mm is not None:
        spacing = spacing_mm[chosen]
        matrix = matrix * spacing[:, None, :] / spacing[:, :, None]
    grid = _grid(matrix, draws.offset[chosen], image)  # [n, Z, Y, X, 3]
    index = to_device(torch.from_numpy(chosen), image.device)
    inside = (grid.abs() <= 1).all(dim=-1)  # [n, Z, Y, X]: 1 is the outer face of the last voxel

    def sampled(array: Tensor, mode: str) -> Tensor:
        return functional.grid_sample(array, grid, mode=mode, padding_mode="border", align_corners=False)

    image = image.index_copy(0, index, sampled(image[index], "bilinear"))
    kept = sampled(valid[index].to(image.dtype), "nearest").bool() & inside[:, None]
    valid = valid.index_copy(0, index, kept)
    if label is not None:
        moved = sampled(label[index][:, None].to(image.dtype), "nearest")[:, 0].to(label.dtype)
        label = label.index_copy(0, index, torch.where(inside, moved, IGNORE_VALUE).to(label.dtype))
    return image, label, valid


def _grid(matrix: NDArray[np.float64], offset: NDArray[np.float64], image: Tensor) -> Tensor:
    """Where each voxel of the new crop comes from: [n, Z, Y, X, 3], X first, the crop spanning [-1, 1]."""
    size = image.shape[2:]
    half = np.array(size) / 2.0
    # Along each axis, the middles of the voxels. Sums of products, not a matrix product: that may compute in TF32, a
    # twentieth of a voxel off, and in another way for another number of samples.
    z, y, x = ((torch.arange(edge, device=image.device, dtype=image.dtype) + 0.5) * (2 / edge) - 1 for edge in size)
    terms, start = (
        to_device(torch.from_numpy(numbers).to(image.dtype), image.device)[:, None, None, None]
        for numbers in (matrix * half / half[:, None], offset / half)
    )  # [n, 1, 1, 1, 3, 3] and [n, 1, 1, 1, 3]
    along = [
        terms[..., axis, 0] * z[:, None, None]
        + terms[..., axis, 1] * y[:, None]
        + terms[..., axis, 2] * x
        + start[..., axis]
        for axis in (2, 1, 0)
    ]
    return torch.stack(along, dim=-1)


def _intensities(image: Tensor, draws: Draws) -> Tensor:
    """Scale, shift, gamma and noise, each for the samples that it was drawn for."""
    chosen = (draws.scale != 1) | (draws.shift != 0) | (draws.gamma != 1) | (draws.noise_std > 0)
    if not chosen.any():
        return image
    image = image.clone()
    # One sample at a time: a batch of another size must not give another rounding.
    for sample in np.flatnonzero(chosen).tolist():
        crop = image[sample]  # [C, Z, Y, X]
        if draws.scale[sample] != 1 or draws.shift[sample] != 0:
            crop.mul_(float(draws.scale[sample])).add_(float(draws.shift[sample]))
        if draws.gamma[sample] != 1:
            low = crop.amin(dim=(1, 2, 3), keepdim=True)
            extent = crop.amax(dim=(1, 2, 3), keepdim=True).sub_(low).clamp_min_(torch.finfo(crop.dtype).tiny)
            crop.sub_(low).div_(extent).pow_(float(draws.gamma[sample])).mul_(extent).add_(low)
        if draws.noise_std[sample] > 0:
            generator = torch.Generator(crop.device).manual_seed(int(draws.noise_seed[sample]))
            crop.add_(torch.empty_like(crop).normal_(0, float(draws.noise_std[sample]), generator=generator))
    return image


def _rotations(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turns by `angles` [B, 3] about Z, then Y, then X: matrices [B, 3, 3] on Z Y X."""
    total = np.broadcast_to(np.eye(3), (len(angles), 3, 3))
    for axis in range(3):
        first, second = (other for other in range(3) if other != axis)
        turn = np.broadcast_to(np.eye(3), (len(angles), 3, 3)).copy()
        turn[:, first, first] = turn[:, second, second] = np.cos(angles[:, axis])
        turn[:, second, first] = np.sin(angles[:, axis])
        turn[:, first, second] = -np.sin(angles[:, axis])
        total = turn @ total
    return np.asarray(total)
