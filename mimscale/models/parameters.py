"""Numbers in each weight of the parts that networks are made of. Without torch, for login nodes.

D embedding | L patches a crop | F feature_size
"""

import math

from mimscale.models.config import UnetrConfig, VitConfig, unetr_halvings, upsampling_strides
from mimscale.models.flops import CropShape


def linear_sizes(inputs: int, outputs: int) -> list[int]:
    """A matrix and its bias."""
    return [inputs * outputs, outputs]


def block_sizes(vit: VitConfig) -> list[int]:
    """A transformer block."""
    dim, rise = vit.dim, vit.mlp_dim * (2 if vit.mlp == "swiglu" else 1)
    attention = linear_sizes(dim, 3 * dim) + linear_sizes(dim, dim)
    mlp = linear_sizes(dim, rise) + linear_sizes(vit.mlp_dim, dim)
    return [*4 * [dim], *attention, *mlp, *(2 * [dim] if vit.layer_scale is not None else [])]


def vit_sizes(vit: VitConfig, shape: CropShape) -> list[int]:
    """The vision transformer: embedding, position table, blocks, norm."""
    projection = linear_sizes(shape.numbers_a_patch, vit.dim)
    table = [shape.patches * vit.dim] if vit.learns_positions else []
    return [*projection, *table, *vit.depth * block_sizes(vit), vit.dim, vit.dim]


def residual_sizes(inputs: int, outputs: int) -> list[int]:
    """Two convolutions of 3^3, and one of 1^3 on the shortcut where the width changes; no biases, no norm weights."""
    shortcut = [inputs * outputs] if inputs != outputs else []
    return [27 * inputs * outputs, 27 * outputs * outputs, *shortcut]


def unetr_head_sizes(vit: VitConfig, unetr: UnetrConfig, shape: CropShape) -> list[int]:
    """All of a UNETR but its encoder."""
    strides = upsampling_strides(unetr_halvings(shape.patch_voxels))
    levels = len(strides)
    F, D = unetr.feature_size, vit.dim
    widths = [F * 2**level for level in range(levels)] + [D]
    sizes = [*residual_sizes(shape.channels, F), *linear_sizes(F, unetr.num_classes)]
    for level in range(1, levels):
        coarsest, *others = strides[level:][::-1]
        width = widths[level]
        sizes.append(D * width * math.prod(coarsest))
        for stride in others:
            sizes += [width * width * math.prod(stride), *residual_sizes(width, width)]
    for level in range(levels):
        sizes.append(widths[level + 1] * widths[level] * math.prod(strides[level]))
        sizes += residual_sizes(2 * widths[level], widths[level])
    return sizes
