"""Where a token stands in the patch grid, told to a transformer.

z y x grid, patches | L tokens of a whole grid, Z slowest | K tokens that are present | D embedding
H numbers of one head
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WAVELENGTH_BASE = 10_000.0  # Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; Su et al. 2021, arXiv:2104.09864


def grid_coordinates(grid: Sequence[int]) -> Tensor:
    """Indices along Z, Y, X of every patch: [L, 3] int64."""
    axes = [torch.arange(edge) for edge in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def pairs_per_axis(dim: int) -> tuple[int, int, int]:
    """How many (sine, cosine) pairs of `dim` numbers speak for Z, Y and X.

    With a `dim` that is no multiple of 6, Z and then Y have one pair more than X, and an odd last number is left over.
    """
    pairs = dim // 2
    return (pairs + 2) // 3, (pairs + 1) // 3, pairs // 3


def angles(coordinates: Tensor, dim: int) -> Tensor:
    """The angle of every pair, in radians: [..., 3] -> [..., dim // 2] fp32, the pairs of Z, then Y, then X."""
    parts = []
    for axis, pairs in enumerate(pairs_per_axis(dim)):
        exponents = torch.arange(pairs, device=coordinates.device, dtype=torch.float32) / max(pairs, 1)
        frequencies = torch.exp(-math.log(WAVELENGTH_BASE) * exponents)
        parts.append(coordinates[..., axis, None].float() * frequencies)
    return torch.cat(parts, dim=-1)


def sincos_table(grid: Sequence[int], dim: int) -> Tensor:
    """Fixed positions of any grid and any dim: [z, y, x, dim] fp32. An odd dim leaves its last column zero."""
    turns = angles(grid_coordinates(grid), dim)
    table = torch.cat([turns.sin(), turns.cos()], dim=-1)
    return F.pad(table, (0, dim - table.shape[-1])).reshape(*grid, dim)


def add_positions(tokens: Tensor, table: Tensor, present: Tensor | None = None) -> Tensor:
    """Add to tokens [B, K, D] the rows of a table [z, y, x, D] that `present` [B, K] names by index, None for all."""
    rows = table.flatten(0, 2)  # [L, D]
    return tokens + (rows if present is None else rows[present]).to(tokens.dtype)


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of queries or keys by their position's angles, so that attention sees differences of positions.

    [B, heads, K, H], [B or 1, K, H // 2] -> [B, heads, K, H]. Computed in fp32: in bf16 an angle of 20 is 0.06 off.
    """
    half = turns.shape[-1]
    sine, cosine = turns.sin()[:, None], turns.cos()[:, None]
    exact = heads.float()
    first, second, rest = exact[..., :half], exact[..., half : 2 * half], exact[..., 2 * half :]
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], dim=-1)
    return turned.to(heads.dtype)


def resize_table(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A learned table on another grid, trilinear between the centres of patches: [z, y, x, D] -> [*grid, D]."""
    volume = table.float().permute(3, 0, 1, 2)[None]  # [1, D, z, y, x]
    volume = F.interpolate(volume, size=tuple(grid), mode="trilinear", align_corners=False)
    return volume[0].permute(1, 2, 3, 0).to(table.dtype).contiguous()
