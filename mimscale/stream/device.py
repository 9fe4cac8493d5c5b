"""What happens to a batch on the training device: the scanner's numbers become normalised floats.

B samples | C channels | Z Y X crop, voxels
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from mimscale.stream.batch import Batch


class OnDevice:
    """Batches on the training device. On CUDA the copy has a stream of its own, and runs beside the step before.

    A trainer that does not wait for its device asks for the next batch while the device still computes on the last one.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        """Take batches in (pinned) memory of the host."""
        self._batches = batches
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch. Errors as those of the batches."""
        batch = next(self._batches)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in moved.tensors().values():
                tensor.record_stream(computing)  # or the copy stream could reuse the memory too early
        return moved


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What the host has just made (indices, masks, matrices) on the training device, without waiting for it.

    From page-locked memory: a copy from any other may make the host wait for all that the device was given before.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalise(batch: Batch) -> tuple[Tensor, Tensor]:
    """Normalise a batch on the device where it is: image [B, C, Z, Y, X] float32 and valid [B, 1, Z, Y, X] bool.

    image = (clip(raw, clip_low, clip_high) - shift) * scale, by each sample's own row of the store's contract. What
    lies outside of the volume is the volume's own air, normalised like any voxel, so that a model sees air and not a
    made-up value; `valid` is False there, to keep it out of the loss.
    """
    low, high, shift, scale = batch.normalisation[:, :, None, None, None, :].unbind(-1)  # each [B, C, 1, 1, 1]
    image = batch.volume.to(torch.float32)
    image = image.clamp(low, high).sub_(shift).mul_(scale)
    if batch.grid is None or batch.crop_voxels is None:
        return image, valid_voxels(batch.inside, tuple(batch.volume.shape[2:]))
    # The contract first: a clip after the interpolation would let metal shine into its neighbours.
    return resample_linear(image, batch.grid, batch.crop_voxels), _valid_at(batch.grid, batch.inside, batch.crop_voxels)


def labels(batch: Batch) -> Tensor:
    """The classes of a batch's voxels, on the grid of `normalise`: [B, Z, Y, X] uint8; 255 = ignore.

    Raises:
        ValueError: the batch was read without labels.
    """
    if batch.label is None:
        raise ValueError("the batch was read without labels")
    if batch.grid is None or batch.crop_voxels is None:
        return batch.label
    return resample_nearest(batch.label[:, None], batch.grid, batch.crop_voxels)[:, 0]


def without_excluded(valid: Tensor, excluded: Tensor | None) -> Tensor:
    """Valid voxels [B, 1, Z, Y, X] but for those that an overlay [B, Z, Y, X] excludes, or does not know: above 0."""
    return valid if excluded is None else valid & (excluded == 0)[:, None]


def resample_linear(image: Tensor, grid: Tensor, crop_voxels: tuple[int, int, int]) -> Tensor:
    """Interpolate [B, C, Z, Y, X] linearly along each axis -> [B, C, *crop_voxels].

    Args:
        image: floats.
        grid: [B, 3, 2] float64; voxel j of the crop lies at grid[..., 0] + j * grid[..., 1], in voxels of `image`.
        crop_voxels: edges of the result.
    """
    for axis, edge in enumerate(crop_voxels):
        image = resample_axis(image, places(grid, axis, edge), axis)
    return image


def resample_axis(image: Tensor, place: Tensor, axis: int) -> Tensor:
    """Interpolate [B, C, Z, Y, X] linearly along an axis (0 for Z to 2 for X), at places [B, n] float64 on it."""
    edge, low = place.shape[1], place.floor()
    last = image.shape[2 + axis] - 1
    below, above = (
        _taken(image, index.long().clamp(0, last), axis)  # the voxel beyond the last one has no weight
        for index in (low, low + 1)
    )
    weight = (place - low).to(image.dtype).view([len(place), 1] + [edge if other == axis else 1 for other in range(3)])
    return torch.lerp(below, above, weight)


def resample_nearest(image: Tensor, grid: Tensor, crop_voxels: tuple[int, int, int]) -> Tensor:
    """The voxel of [B, C, Z, Y, X] in which each voxel of the crop has its centre -> [B, C, *crop_voxels]."""
    for axis, edge in enumerate(crop_voxels):
        image = _taken(image, _nearest(grid, axis, edge).clamp(0, image.shape[2 + axis] - 1), axis)
    return image


def places(grid: Tensor, axis: int, edge: int) -> Tensor:
    """Where the crop's voxels lie along an axis: [B, edge] float64."""
    first, step = grid[:, axis, :1], grid[:, axis, 1:]
    return first + step * torch.arange(edge, device=grid.device, dtype=grid.dtype)


def _nearest(grid: Tensor, axis: int, edge: int) -> Tensor:
    return (places(grid, axis, edge) + 0.5).floor().long()


def _taken(image: Tensor, index: Tensor, axis: int) -> Tensor:
    """Planes `index` [B, n] of [B, C, Z, Y, X] along an axis, for each sample its own."""
    shape = list(image.shape)
    shape[2 + axis] = index.shape[1]
    view = index.view([len(index), 1] + [index.shape[1] if other == axis else 1 for other in range(3)])
    return image.gather(2 + axis, view.expand(shape))


def _valid_at(grid: Tensor, inside: Tensor, crop_voxels: tuple[int, int, int]) -> Tensor:
    """[B, 1, *crop_voxels], True where the centre of a crop's voxel lies in the volume."""
    valid = torch.ones((len(inside), 1, 1, 1, 1), dtype=torch.bool, device=inside.device)
    for axis, edge in enumerate(crop_voxels):
        place = _nearest(grid, axis, edge)
        along = (place >= inside[:, axis, :1]) & (place < inside[:, axis, 1:])
        valid = valid & along.view([len(inside), 1] + [edge if other == axis else 1 for other in range(3)])
    return valid


def valid_voxels(inside: Tensor, size: tuple[int, ...]) -> Tensor:
    """Boxes [B, 3, 2] (start, stop) -> mask [B, 1, Z, Y, X], True inside of the box."""
    valid = torch.ones((len(inside), 1, 1, 1, 1), dtype=torch.bool, device=inside.device)
    for axis, edge in enumerate(size):
        place = torch.arange(edge, device=inside.device)
        along = (place >= inside[:, axis, :1]) & (place < inside[:, axis, 1:])  # [B, edge]
        valid = valid & along.view([len(inside), 1] + [edge if other == axis else 1 for other in range(3)])
    return valid
