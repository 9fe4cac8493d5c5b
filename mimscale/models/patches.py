"""Volumes to patches and back.

B batch | C channels | Z Y X volume, voxels | pz py px patch edges, voxels
L patches a volume = Z/pz * Y/py * X/px, Z slowest | M patches of them that are chosen
P numbers a patch = pz * py * px * C, channel fastest
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimscale.models.config import patch_grid


def patchify(volume: Tensor, patch_voxels: Sequence[int]) -> Tensor:
    """Cut a volume into patches: [B, C, Z, Y, X] -> [B, L, P]. `unpatchify` is the exact inverse.

    Raises:
        ValueError: an edge of the volume is not a multiple of the patch's.
    """
    B, C, *crop_voxels = volume.shape
    z, y, x = patch_grid(crop_voxels, patch_voxels)
    pz, py, px = patch_voxels
    patches = volume.reshape(B, C, z, pz, y, py, x, px)
    patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1)  # [B, z, y, x, pz, py, px, C]
    return patches.reshape(B, z * y * x, pz * py * px * C)


def unpatchify(patches: Tensor, patch_voxels: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Put patches together: [B, L, P] -> [B, C, Z, Y, X], with `grid` patches along Z, Y, X.

    Raises:
        ValueError: the grid does not hold L patches.
    """
    B, L, P = patches.shape
    z, y, x = grid
    pz, py, px = patch_voxels
    if z * y * x != L:
        raise ValueError(f"{L} patches do not fill a grid of {list(grid)}")
    C = P // (pz * py * px)
    volume = patches.reshape(B, z, y, x, pz, py, px, C)
    volume = volume.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, z, pz, y, py, x, px]
    return volume.reshape(B, C, z * pz, y * py, x * px)


def chosen_indices(chosen: Tensor) -> Tensor:
    """The places of True, in the order of the grid: bool [B, L] with as many in each row -> int64 [B, M].

    On the CPU, where masks are drawn: how many there are decides shapes, and the device need not be waited for.
    """
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : sum(chosen[0].tolist())]


def take(values: Tensor, indices: Tensor | None) -> Tensor:
    """Some patches or tokens: [B, L, P] at indices [B, M] -> [B, M, P]; None takes all."""
    return values if indices is None else values.gather(1, indices[:, :, None].expand(-1, -1, values.shape[2]))


def put(values: Tensor, indices: Tensor | None, count: int) -> Tensor:
    """The inverse of `take`: [B, M, P] -> [B, `count`, P], 0 where nothing was taken."""
    if indices is None:
        return values
    empty = values.new_zeros(values.shape[0], count, values.shape[2])
    return empty.scatter(1, indices[:, :, None].expand(-1, -1, values.shape[2]), values)


def tokens_to_grid(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens of a whole volume as a feature volume: [B, L, D] -> [B, D, z, y, x]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def hidden_voxels(hidden: Tensor, patch_voxels: Sequence[int], grid: Sequence[int]) -> Tensor:
    """A mask of patches as a mask of voxels: [B, L] -> [B, 1, Z, Y, X]."""
    pz, py, px = patch_voxels
    every_voxel = hidden[:, :, None].expand(-1, -1, pz * py * px)
    return unpatchify(every_voxel, patch_voxels, grid)
