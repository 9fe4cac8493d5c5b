"""The parts of networks on a 3D Swin transformer (`mimscale.models.swin`, `.upernet`), counted. Without torch.

T tokens of a stage | D embedding of a stage | W windows | N tokens a window
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from mimscale.models.config import POOLED_EDGES, SwinConfig, UpernetConfig, Zyx, patch_grid
from mimscale.models.flops import CropShape, Product
from mimscale.models.tally import Tally, checkpointed, convolution, linear, residual_block, tallied, transposed


def swin_tally(swin: SwinConfig, shape: CropShape) -> Tally:
    """The encoder; what its states are normed for is tallied where they are used."""
    grid = patch_grid(shape.crop_voxels, shape.patch_voxels)
    voxels, tokens = math.prod(shape.crop_voxels), math.prod(grid)
    embedding = Product(part="encoder", rows=tokens, inner=shape.numbers_a_patch, columns=swin.dim, of_image=True)
    parts = [
        Tally(
            sizes=(shape.numbers_a_patch * swin.dim, swin.dim),
            products=(embedding,),
            numbers=voxels * shape.channels,
        )
    ]
    for stage, (depth, heads) in enumerate(zip(swin.depths, swin.heads, strict=True)):
        dim = swin.dim * 2**stage
        parts += [_block(swin, grid, dim, heads, shifted=place % 2 == 1) for place in range(depth)]
        parts.append(_merging(math.prod(grid), dim))
        z, y, x = (edge // 2 for edge in grid)
        grid = (z, y, x)
    return tallied(parts)


def state_shapes(swin: SwinConfig, shape: CropShape) -> list[tuple[int, int]]:
    """T and D of the embedding and of each stage."""
    tokens = shape.patches
    return [(tokens // 8**stage, swin.dim * 2**stage) for stage in range(swin.layers + 1)]


def simmim_head(swin: SwinConfig, shape: CropShape) -> Tally:
    """Mask token and linear layer from the last state to voxels."""
    tokens, dim = state_shapes(swin, shape)[-1]
    cell = math.prod(swin.cell_voxels(shape.crop_voxels, shape.patch_voxels))
    return Tally(sizes=(swin.dim,), numbers=2 * tokens * dim, fp32=2 * tokens) + linear(
        "head", tokens, dim, cell * shape.channels
    )


def swin_unetr_head(swin: SwinConfig, shape: CropShape, outputs: int) -> Tally:
    """Decoder of residual blocks on all states, as `mimscale.models.swin.SwinUnetr` has it."""
    voxels, states = math.prod(shape.crop_voxels), state_shapes(swin, shape)
    levels = [(voxels, swin.dim), *states]  # of the image, then of each state
    strides: list[Zyx] = [shape.patch_voxels, *swin.layers * [(2, 2, 2)]]
    parts = [residual_block("decoder", voxels, shape.channels, swin.dim, of_image=True), _shared(states)]
    for place, (tokens, dim) in enumerate(states):
        parts.append(_normed(tokens, dim, read=place != swin.layers - 1))
        if place != swin.layers - 1:
            parts.append(residual_block("decoder", tokens, dim, dim))
    for level in reversed(range(len(strides))):
        (rows, width), (below, inputs) = levels[level], levels[level + 1]
        parts.append(transposed("decoder", below, inputs, width, strides[level], bias=False))
        parts.append(Tally(numbers=2 * rows * width))  # side by side with the skip
        parts.append(residual_block("decoder", rows, 2 * width, width))
    # Of the finest features, before and behind the norm, and of what their first convolution is given.
    last = Tally(gradients=3 * voxels * swin.dim)
    return tallied([*parts, linear("decoder", voxels, swin.dim, outputs), last])


def upernet_head(swin: SwinConfig, upernet: UpernetConfig, shape: CropShape, outputs: int) -> Tally:
    """Context and pyramid, as `mimscale.models.upernet.Upernet` has them."""
    states, width = state_shapes(swin, shape), upernet.width
    coarsest, widest = states[-1]
    parts = [_shared(states), *(_normed(tokens, dim, read=True) for tokens, dim in states)]
    for edge in POOLED_EDGES:
        cells = edge**3
        parts += [linear("decoder", cells, widest, width), Tally(numbers=cells * (widest + width))]
    context = widest + len(POOLED_EDGES) * width
    parts += [Tally(numbers=coarsest * context), _conv_norm(coarsest, context, width, 3)]
    for tokens, dim in states[:-1]:
        parts += [_conv_norm(tokens, dim, width, 1), Tally(numbers=tokens * width), _conv_norm(tokens, width, width, 3)]
    finest, together = states[0][0], len(states) * width
    parts += [Tally(numbers=finest * together), _conv_norm(finest, together, width, 3)]
    return tallied([*parts, linear("decoder", finest, width, outputs)])


def _conv_norm(rows: int, inputs: int, outputs: int, edge: int) -> Tally:
    conv = convolution("decoder", rows, inputs, outputs, (edge, edge, edge), bias=False)
    return conv + Tally(sizes=(outputs, outputs), numbers=2 * rows * outputs)


def _normed(tokens: int, dim: int, *, read: bool) -> Tally:
    """A state as others get it: what the norm was given, statistics, and what it gave if that is kept by a reader."""
    return Tally(numbers=tokens * dim * (2 if read else 1), fp32=2 * tokens)


def _shared(states: Sequence[tuple[int, int]]) -> Tally:
    """What the norm of the first state is given is what the first block keeps too; later ones get copies."""
    tokens, dim = states[0]
    return Tally(numbers=-tokens * dim)


def _block(swin: SwinConfig, grid: Zyx, dim: int, heads: int, *, shifted: bool) -> Tally:
    """Attention inside windows, then an MLP."""
    window, tokens = _window(swin.window, grid), math.prod(grid)
    inside = math.prod(window)  # N
    padded = math.prod(-(-edge // step) * step for edge, step in zip(grid, window, strict=True))
    windows, hidden = padded // inside, int(dim * swin.mlp_ratio)
    scores = Product(
        part="encoder", rows=inside, inner=dim // heads, columns=inside, count=windows * heads, of_weight=False
    )
    table = math.prod(2 * edge - 1 for edge in swin.window) * heads
    weights = windows * heads * inside**2
    # A mask of shifted windows is fp32, and so is what is added to it.
    masked = shifted and any(edge > step for edge, step in zip(grid, swin.window, strict=True))
    mixed = linear("encoder", padded, dim, 3 * dim) + Tally(
        sizes=(table,),
        products=(scores, replace(scores, inner=inside, columns=dim // heads)),
        numbers=5 * padded * dim + (0 if masked else weights),
        fp32=2 * tokens + (weights if masked else 0),
        narrowed=weights if masked else 0,
        int64=inside**2,
    )
    out = linear("encoder", padded, dim, dim)
    rise = linear("encoder", tokens, dim, hidden) + Tally(numbers=tokens * (dim + 2 * hidden), fp32=2 * tokens)
    fall = linear("encoder", tokens, hidden, dim)
    norms, inputs = Tally(sizes=4 * (dim,)), 2 * tokens * dim
    if not swin.checkpoint_activations:
        return tallied([norms, Tally(numbers=inputs), mixed, out, rise, fall])
    # Each half is computed again up to the input of its last product. The mask of shifted windows is kept for it once,
    # whatever the micro-batch, and is left out here.
    return tallied(
        [
            norms,
            checkpointed(mixed, kept=inputs // 2, fp32_work=2 * weights),
            out,
            checkpointed(rise, kept=inputs // 2),
            fall,
        ]
    )


def _merging(tokens: int, dim: int) -> Tally:
    """Eight neighbours side by side, normed, and brought to twice the width; what it gives, and its copy."""
    after = tokens // 8
    reduced = linear("encoder", after, 8 * dim, 2 * dim, bias=False)
    return reduced + Tally(sizes=(8 * dim, 8 * dim), numbers=2 * tokens * dim, fp32=2 * after)


def _window(window: Sequence[int], grid: Sequence[int]) -> Zyx:
    """A window is never larger than what it is laid on."""
    z, y, x = (min(step, edge) for step, edge in zip(window, grid, strict=True))
    return z, y, x
