"""The parts of a light head on a ViT (`mimscale.models.primus`), counted. Without torch."""

import math

from mimscale.models.activations import block_numbers, vit_extra_numbers
from mimscale.models.config import VitConfig, unetr_halvings, upsampling_strides
from mimscale.models.flops import CropShape, encoder_products
from mimscale.models.parameters import vit_sizes
from mimscale.models.tally import Tally, tallied, transposed


def head_widths(dim: int, outputs: int, steps: int) -> list[int]:
    """Channels from the tokens to the outputs: each step leaves the same share of them, in multiples of 8."""
    share = (2 * outputs / dim) ** (1 / steps)
    between = [max(8, 8 * round(dim * share**step / 8)) for step in range(1, steps)]
    return [dim, *between, outputs]


def vit_tally(vit: VitConfig, shape: CropShape) -> Tally:
    """The encoder on the whole crop, up to its tokens."""
    L, extra = shape.patches, vit_extra_numbers(vit)
    numbers, fp32 = block_numbers(L, vit.dim, vit.heads, vit.mlp_dim, extra_numbers=extra)
    block, ends = Tally(numbers=numbers, fp32=fp32), L * (shape.numbers_a_patch + 2 * vit.dim)
    weights = Tally(sizes=tuple(vit_sizes(vit, shape)), products=tuple(encoder_products(vit, shape, tokens=L)))
    if vit.checkpoint_activations:
        inputs = vit.depth * L * vit.dim
        return weights + Tally(numbers=ends + inputs, fp32=2 * L, recomputed=(block,))
    return tallied([weights, Tally(numbers=ends, fp32=2 * L), *vit.depth * [block]])


def primus_head(vit: VitConfig, shape: CropShape, outputs: int) -> Tally:
    """One transposed convolution for each doubling of the resolution, with norm and GELU behind all but the last."""
    strides = upsampling_strides(unetr_halvings(shape.patch_voxels))[::-1]  # coarsest first
    widths, rows, parts = head_widths(vit.dim, outputs, len(strides)), shape.patches, []
    for step, stride in enumerate(strides):
        parts.append(transposed("head", rows, widths[step], widths[step + 1], stride))
        rows *= math.prod(stride)
        if step < len(strides) - 1:
            width = widths[step + 1]  # kept: both sides of norm and GELU
            parts.append(Tally(sizes=(width, width), numbers=3 * rows * width, fp32=2 * rows))
    return tallied(parts)
