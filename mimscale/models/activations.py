"""What a forward pass keeps for the backward pass, by formula and without torch. Bytes of one sample.

The operations name what they keep: a linear layer and a norm their input, GELU its input, attention its queries, keys,
values and output. `width` is the bytes of a number in the precision of the model; losses are computed in fp32.

K tokens | D embedding | H hidden width of an MLP | L patches a crop | V voxels a crop | P numbers a patch
M patches that the loss covers
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mimscale.models.config import MaeConfig, UnetrConfig, VitConfig, patch_grid, unetr_halvings, upsampling_strides
from mimscale.models.flops import answered_patches

FP32_BYTES, INT64_BYTES = 4, 8


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one sample at the two moments when most is held."""

    kept: int  # when the forward pass is over
    transient: int = 0  # on top of it, while the loss is computed
    recomputed: int = (
        0  # held by one checkpointed block while the backward pass recomputes it; little else is left then
    )

    def times(self, count: int) -> "Activations":
        """Of several masks or views of a sample."""
        return Activations(kept=count * self.kept, transient=count * self.transient, recomputed=count * self.recomputed)


def block_bytes(tokens: int, dim: int, heads: int, hidden_dim: int, width: int, *, extra_numbers: int = 0) -> int:
    """A transformer block: inputs and outputs of two norms, queries, keys, values, mixed values, both sides of GELU.

    Each norm keeps two numbers a token and attention one a token and head, in fp32. `extra_numbers` a token come from
    layer scales and rotary positions.
    """
    numbers, fp32 = block_numbers(tokens, dim, heads, hidden_dim, extra_numbers=extra_numbers)
    return numbers * width + fp32 * FP32_BYTES


def block_numbers(tokens: int, dim: int, heads: int, hidden_dim: int, *, extra_numbers: int = 0) -> tuple[int, int]:
    """The same as numbers in the precision of the model, and in fp32."""
    return tokens * (8 * dim + 2 * hidden_dim + extra_numbers), tokens * (4 + heads)


def last_block_bytes(tokens: int, rows: int, dim: int, heads: int, hidden_dim: int, width: int) -> int:
    """A transformer block whose answer is wanted for `rows` of its tokens: keys and values are those of all."""
    numbers = 5 * tokens * dim + rows * (4 * dim + 2 * hidden_dim)  # the rows' queries once more, by themselves
    return numbers * width + (2 * tokens + (2 + heads) * rows) * FP32_BYTES


def _loss(answered: int, numbers_a_patch: int, width: int) -> tuple[int, int]:
    """What a loss keeps, the error and which numbers count (bool), and what it holds on top while it is computed.

    The latter are prediction, target, the error by its sign and weighted.
    """
    numbers = answered * numbers_a_patch
    return numbers * (FP32_BYTES + 1), numbers * (width + 3 * FP32_BYTES)


def encoder_activations(vit: VitConfig, *, numbers_a_patch: int, tokens: int, width: int) -> Activations:
    """The vision transformer on `tokens` patches."""
    block = block_bytes(tokens, vit.dim, vit.heads, vit.mlp_dim, width, extra_numbers=vit_extra_numbers(vit))
    ends = tokens * (numbers_a_patch + 2 * vit.dim) * width
    if not vit.checkpoint_activations:
        return Activations(kept=ends + vit.depth * block)
    inputs = vit.depth * tokens * vit.dim * width
    return Activations(kept=ends + inputs, recomputed=block)


def vit_extra_numbers(vit: VitConfig) -> int:
    """What each token of a block keeps beyond a plain transformer's."""
    extra = 2 * vit.dim if vit.layer_scale is not None else 0
    extra += 2 * vit.mlp_dim if vit.mlp == "swiglu" else 0  # the gate, before and after its own bend
    # Turned queries and keys, the sines and cosines of both, and mixed values once more in the order of tokens.
    return extra + (3 * vit.dim + 2 * (vit.dim // vit.heads) if vit.rotates else 0)


def mae_activations(
    vit: VitConfig,
    mae: MaeConfig,
    *,
    numbers_a_patch: int,
    visible_patches: int,
    decoded_patches: int,
    width: int,
) -> Activations:
    """A masked autoencoder with its loss."""
    P, E = numbers_a_patch, mae.decoder_dim
    N, M = decoded_patches, answered_patches(mae, visible_patches, decoded_patches)
    encoder = encoder_activations(vit, numbers_a_patch=P, tokens=visible_patches, width=width)
    decoder = 2 * M * E * width  # both sides of the last norm
    if mae.decoder_depth:
        decoder += (mae.decoder_depth - 1) * block_bytes(N, E, mae.decoder_heads, 4 * E, width)
        decoder += last_block_bytes(N, M, E, mae.decoder_heads, 4 * E, width)
    kept, transient = _loss(M, P, width)
    return Activations(
        kept=encoder.kept + decoder + kept,
        transient=transient,
        recomputed=max(0, encoder.recomputed - decoder - kept),
    )


def simmim_activations(
    vit: VitConfig, *, numbers_a_patch: int, patches: int, answered_patches: int, width: int
) -> Activations:
    """SimMIM with its loss."""
    encoder = encoder_activations(vit, numbers_a_patch=numbers_a_patch, tokens=patches, width=width)
    kept, transient = _loss(answered_patches, numbers_a_patch, width)
    return Activations(
        kept=encoder.kept + kept + answered_patches * vit.dim * width,  # the head's input
        transient=transient,
        recomputed=max(0, encoder.recomputed - kept),
    )


def unetr_activations(
    vit: VitConfig,
    unetr: UnetrConfig,
    *,
    crop_voxels: Sequence[int],
    patch_voxels: Sequence[int],
    channels: int,
    width: int,
) -> Activations:
    """A UNETR with its loss."""
    L, V, F = math.prod(patch_grid(crop_voxels, patch_voxels)), math.prod(crop_voxels), unetr.feature_size
    encoder = encoder_activations(vit, numbers_a_patch=math.prod(patch_voxels) * channels, tokens=L, width=width)
    strides = upsampling_strides(unetr_halvings(patch_voxels))
    levels = len(strides)
    voxels = [V]
    for stride in strides:
        voxels.append(voxels[-1] // math.prod(stride))
    numbers = L * vit.dim + _residual_numbers(V, channels, F)
    for level in range(1, levels):
        width_of_level, rows = F * 2**level, L
        numbers += L * vit.dim  # tokens as a volume
        coarsest, *others = strides[level:][::-1]
        rows *= math.prod(coarsest)
        for stride in others:
            rows *= math.prod(stride)
            numbers += rows * width_of_level + _residual_numbers(rows, width_of_level, width_of_level)
    for level in range(levels):
        width_of_level = F * 2**level  # features and skip side by side, then a residual block that halves them
        numbers += 2 * voxels[level] * width_of_level
        numbers += _residual_numbers(voxels[level], 2 * width_of_level, width_of_level)
    # Log-probabilities, probabilities, the classes as one number each.
    loss = V * unetr.num_classes * (2 * FP32_BYTES + INT64_BYTES)
    return Activations(
        kept=encoder.kept + numbers * width + loss,
        transient=V * unetr.num_classes * (width + 2 * FP32_BYTES),
        recomputed=max(0, encoder.recomputed - numbers * width - loss),
    )


def _residual_numbers(voxels: int, inputs: int, outputs: int) -> int:
    """Outputs of two convolutions and of the activations behind them; and of the shortcut's convolution."""
    return voxels * outputs * (5 if inputs != outputs else 4)
