"""The matrix products of a training step, and the FLOPs that follow from them. Pure arithmetic, without torch.

What counts is what the step needs: the encoder multiplies visible patches only, the decoder its own tokens, and nothing
is counted twice because it is recomputed. These are the FLOPs of MFU (Chowdhery et al. 2022, arXiv:2204.02311, app. B).
Softmax, norms and losses are left out: they are limited by memory, and torch's counter leaves them out too.

K tokens that are computed | L patches a crop | P numbers a patch | D embedding | E embedding of the decoder
F feature_size | V voxels a crop
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mimscale.models.config import (
    MaeConfig,
    SimclrConfig,
    SimmimConfig,
    TargetConfig,
    UnetrConfig,
    VitConfig,
    Zyx,
    patch_grid,
    unetr_halvings,
    upsampling_strides,
)


@dataclass(frozen=True, kw_only=True)
class Product:
    """`count` products [rows, inner] x [inner, columns] in the forward pass of one sample.

    With B samples the rows of a product with a weight are B times as many; of one without, the count is.
    """

    part: str  # of the model: encoder, decoder, head
    rows: int
    inner: int
    columns: int
    count: int = 1
    of_weight: bool = True  # the right factor is a weight; else both are activations, as in attention
    of_image: bool = False  # the left factor comes straight from the image and needs no gradient
    recomputed: int = 0  # how often the backward pass does it again, to save memory

    @property
    def forward_flops(self) -> int:
        """A multiplication and an addition for each number of the left factor and column."""
        return 2 * self.count * self.rows * self.inner * self.columns

    @property
    def backward_flops(self) -> int:
        """One product for the gradient of each factor."""
        return self.forward_flops * (1 if self.of_image else 2)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one sample. A fused multiply-add counts as two."""

    forward: int
    backward: int
    recomputed: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            recomputed=self.recomputed + other.recomputed,
        )

    @property
    def training(self) -> int:
        """What a step needs: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What a GPU does: the numerator of HFU."""
        return self.training + self.recomputed


def count_flops(products: Iterable[Product]) -> Flops:
    """The sum of some products."""
    products = list(products)
    return Flops(
        forward=sum(product.forward_flops for product in products),
        backward=sum(product.backward_flops for product in products),
        recomputed=sum(product.recomputed * product.forward_flops for product in products),
    )


def flops_by_part(products: Iterable[Product]) -> dict[str, Flops]:
    """The sum of each part of the model, in the order in which data passes through them."""
    products = list(products)
    parts = dict.fromkeys(product.part for product in products)
    return {part: count_flops(product for product in products if product.part == part) for part in parts}


@dataclass(frozen=True, kw_only=True)
class CropShape:
    """What a model is fed."""

    crop_voxels: Zyx
    patch_voxels: Zyx
    channels: int

    @property
    def patches(self) -> int:
        """L."""
        return math.prod(patch_grid(self.crop_voxels, self.patch_voxels))

    @property
    def numbers_a_patch(self) -> int:
        """P."""
        return math.prod(self.patch_voxels) * self.channels


def repeated(products: Iterable[Product], times: int) -> list[Product]:
    """The same products for several masks or views of each sample."""
    return [replace(product, count=times * product.count) for product in products]


def encoder_products(vit: VitConfig, shape: CropShape, *, tokens: int) -> list[Product]:
    """The vision transformer on `tokens` of the crop's patches."""
    embedding = Product(part="encoder", rows=tokens, inner=shape.numbers_a_patch, columns=vit.dim, of_image=True)
    return [embedding, *block_products("encoder", vit, tokens)]


def block_products(part: str, vit: VitConfig, tokens: int, rows: int | None = None) -> list[Product]:
    """The transformer blocks; with `rows`, as many tokens are wanted of them: other queries have no answer.

    Fused attention keeps no scores, so its backward pass computes them again (Dao et al. 2022, arXiv:2205.14135,
    sec. 3.1). A checkpointed block is recomputed up to the last number that its gradients need, which is the input of
    its last product.
    """
    dim, heads, depth, checkpointed = vit.dim, vit.heads, vit.depth, vit.checkpoint_activations
    again = int(checkpointed)
    rows = tokens if rows is None else rows

    def linear(inner: int, columns: int, recomputed: int = again) -> Product:
        return Product(part=part, rows=rows, inner=inner, columns=columns, count=depth, recomputed=recomputed)

    def attention(inner: int, columns: int, recomputed: int) -> Product:
        return replace(linear(inner, columns, recomputed), count=depth * heads, of_weight=False)

    return [
        replace(linear(dim, 3 * dim), rows=tokens),
        attention(dim // heads, tokens, 1 + again),
        attention(tokens, dim // heads, again),
        linear(dim, dim),
        linear(dim, vit.mlp_dim * (2 if vit.mlp == "swiglu" else 1)),
        linear(vit.mlp_dim, dim, recomputed=0),
    ]


def mae_products(
    vit: VitConfig, mae: MaeConfig, shape: CropShape, *, visible_patches: int, decoded_patches: int
) -> list[Product]:
    """A masked autoencoder: the encoder on visible patches, the decoder on those that it decodes.

    The decoder's last block and the head answer for the patches that the loss covers.
    """
    E, K = mae.decoder_dim, visible_patches
    answered = answered_patches(mae, visible_patches, decoded_patches)
    products = [
        *encoder_products(vit, shape, tokens=K),
        Product(part="decoder", rows=K, inner=vit.dim, columns=E),
    ]
    if mae.decoder_depth:
        block = VitConfig(dim=E, heads=mae.decoder_heads, depth=1)
        if mae.decoder_depth > 1:
            products += block_products("decoder", replace(block, depth=mae.decoder_depth - 1), decoded_patches)
        products += block_products("decoder", block, decoded_patches, rows=answered)
    else:  # one attention whose weights follow from the positions: only the values have a gradient
        scores = Product(part="decoder", rows=shape.patches, inner=E, columns=K, of_weight=False)
        products += [scores, replace(scores, inner=K, columns=E)]
    return [*products, Product(part="head", rows=answered, inner=E, columns=shape.numbers_a_patch)]


def answered_patches(target: TargetConfig, visible_patches: int, decoded_patches: int) -> int:
    """Patches that the loss covers, of the visible ones and those that are predicted."""
    return decoded_patches - (visible_patches if target.loss_on == "masked" else 0)


def simmim_products(vit: VitConfig, simmim: SimmimConfig, shape: CropShape, *, answered_patches: int) -> list[Product]:
    """SimMIM: the encoder on all patches, and a light head on those that the loss covers."""
    to_voxels = Product(part="head", rows=answered_patches, inner=vit.dim, columns=shape.numbers_a_patch)
    middle = [replace(to_voxels, columns=vit.dim)] if simmim.head == "mlp" else []
    return [*encoder_products(vit, shape, tokens=shape.patches), *middle, to_voxels]


def simclr_products(vit: VitConfig, simclr: SimclrConfig, shape: CropShape) -> list[Product]:
    """One view for SimCLR: the encoder on all patches, and the projection of their mean."""
    first = Product(part="head", rows=1, inner=vit.dim, columns=simclr.hidden_dim)
    second = Product(part="head", rows=1, inner=simclr.hidden_dim, columns=simclr.projection_dim)
    return [*encoder_products(vit, shape, tokens=shape.patches), first, second]


def probe_products(vit: VitConfig, unetr: UnetrConfig, shape: CropShape) -> list[Product]:
    """A linear probe: the encoder on all patches, and one layer."""
    head = Product(part="head", rows=shape.patches, inner=vit.dim, columns=unetr.num_classes)
    return [*encoder_products(vit, shape, tokens=shape.patches), head]


def unetr_products(vit: VitConfig, unetr: UnetrConfig, shape: CropShape) -> list[Product]:
    """A UNETR: the encoder on all patches, and the convolutions of its decoder as the products that they are."""
    L, V, F = shape.patches, math.prod(shape.crop_voxels), unetr.feature_size
    strides = upsampling_strides(unetr_halvings(shape.patch_voxels))
    levels = len(strides)
    widths = [F * 2**level for level in range(levels)] + [vit.dim]
    voxels = [V]  # of each level
    for stride in strides:
        voxels.append(voxels[-1] // math.prod(stride))
    products = encoder_products(vit, shape, tokens=L) + _residual_block(V, shape.channels, F, of_image=True)
    for level in range(1, levels):  # tokens up to the skip of their level
        coarsest, *others = strides[level:][::-1]
        width, rows = widths[level], L
        products.append(_transposed(rows, vit.dim, width, coarsest))
        rows *= math.prod(coarsest)
        for stride in others:
            products.append(_transposed(rows, width, width, stride))
            rows *= math.prod(stride)
            products += _residual_block(rows, width, width)
    for level in reversed(range(levels)):
        products.append(_transposed(voxels[level + 1], widths[level + 1], widths[level], strides[level]))
        products += _residual_block(voxels[level], 2 * widths[level], widths[level])
    return [*products, Product(part="decoder", rows=V, inner=F, columns=unetr.num_classes)]


def _residual_block(voxels: int, inputs: int, outputs: int, *, of_image: bool = False) -> list[Product]:
    """Two convolutions of 3^3, and one of 1^3 on the shortcut where the width changes."""
    products = [
        Product(part="decoder", rows=voxels, inner=27 * inputs, columns=outputs, of_image=of_image),
        Product(part="decoder", rows=voxels, inner=27 * outputs, columns=outputs),
    ]
    if inputs != outputs:
        products.append(Product(part="decoder", rows=voxels, inner=inputs, columns=outputs, of_image=of_image))
    return products


def _transposed(voxels: int, inputs: int, outputs: int, stride: Zyx) -> Product:
    """A transposed convolution whose kernel is its stride: each voxel becomes a block of them."""
    return Product(part="decoder", rows=voxels, inner=inputs, columns=outputs * math.prod(stride))
