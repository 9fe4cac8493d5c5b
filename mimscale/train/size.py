"""How large a run is: weights, products, a checkpoint. Estimates for login nodes, without torch.

D embedding | E embedding of the decoder | L patches a crop | F feature_size
"""

import math
from dataclasses import replace

from mimscale.models.config import VitConfig, mask_grid, patch_grid, unetr_halvings, upsampling_strides
from mimscale.models.flops import (
    CropShape,
    Product,
    answered_patches,
    mae_products,
    probe_products,
    repeated,
    simclr_products,
    simmim_products,
    unetr_products,
)
from mimscale.models.masking import hidden_units
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig

BYTES_OF_ADAM = 8  # two moments in fp32
BYTES_OF_MASTER = 4  # ZeRO's own fp32 copy of the weights
BYTES_OF_FP32_WEIGHTS = 4  # weights.safetensors
HASHED_MB_PER_S = 1_000.0  # every file of a checkpoint is hashed


def count_parameters(config: RunConfig, channels: int = 1) -> int:
    """Weights of the model that a run trains."""
    return sum(parameter_sizes(config, channels))


def parameter_sizes(config: RunConfig, channels: int = 1) -> list[int]:
    """Numbers in each weight of the model that a run trains, in no particular order."""
    sizes = _vit(config, channels)
    numbers_a_patch = math.prod(config.patch_voxels) * channels
    if isinstance(config, PretrainConfig):
        sizes += _pretraining_head(config, numbers_a_patch)
    if isinstance(config, FinetuneConfig):
        linear = config.head == "linear"
        sizes += _linear(config.model.dim, config.unetr.num_classes) if linear else _unetr_head(config, channels)
    return sizes


def visible_patches(config: PretrainConfig, ratio: float) -> int:
    """Patches of a crop that the encoder sees when `ratio` of the mask units is hidden."""
    L = math.prod(patch_grid(config.crop_voxels, config.patch_voxels))
    units = math.prod(mask_grid(config.crop_voxels, config.patch_voxels, config.mask))
    hidden = hidden_units(units, replace(config.mask, ratio=ratio, ratio_range=None), 0)
    return L // units * (units - hidden)


def visible_and_decoded(config: PretrainConfig, ratio: float) -> tuple[int, int]:
    """Patches that the encoder sees, and those that a decoder works on: besides these the hidden ones it predicts."""
    visible = visible_patches(config, ratio)
    hidden = math.prod(patch_grid(config.crop_voxels, config.patch_voxels)) - visible
    return visible, visible + max(1, round(config.mask.predicted_share * hidden))


def run_products(config: RunConfig, channels: int = 1) -> list[Product]:
    """The matrix products of one sample; with a range of mask ratios, at its middle."""
    shape = CropShape(crop_voxels=config.crop_voxels, patch_voxels=config.patch_voxels, channels=channels)
    if isinstance(config, FinetuneConfig):
        if config.head == "linear":
            return probe_products(config.model, config.unetr, shape)
        return unetr_products(config.model, config.unetr, shape)
    assert isinstance(config, PretrainConfig)
    ratios = config.mask.ratio_range or (config.mask.ratio,)
    ratio = sum(ratios) / len(ratios)
    match config.method:
        case "mae":
            visible, decoded = visible_and_decoded(config, ratio)
            products = mae_products(config.model, config.mae, shape, visible_patches=visible, decoded_patches=decoded)
            return repeated(products, config.mask.repeats)
        case "simmim":
            answered = answered_patches(config.simmim, *visible_and_decoded(config, ratio))
            products = simmim_products(config.model, config.simmim, shape, answered_patches=answered)
            return repeated(products, config.mask.repeats)
        case "simclr":
            return repeated(simclr_products(config.model, config.simclr, shape), 2)


def checkpoint_bytes(config: RunConfig) -> int:
    """About what one checkpoint takes on disk, all files together."""
    return _weight_file_bytes(config) + _state_bytes(config)


def save_seconds(config: RunConfig, nodes: int, write_mb_per_s: float) -> float:
    """About how long the nodes write and hash a checkpoint: the state side by side, the weights on the first alone."""
    first_node = _weight_file_bytes(config) + _state_bytes(config) / nodes
    return first_node / 1e6 * (1 / write_mb_per_s + 1 / HASHED_MB_PER_S)


def _weight_file_bytes(config: RunConfig) -> int:
    return count_parameters(config) * BYTES_OF_FP32_WEIGHTS


def _state_bytes(config: RunConfig) -> int:
    return count_parameters(config) * (BYTES_OF_ADAM + BYTES_OF_MASTER)


def _linear(inputs: int, outputs: int) -> list[int]:
    return [inputs * outputs, outputs]


def _block(vit: VitConfig) -> list[int]:
    dim, rise = vit.dim, vit.mlp_dim * (2 if vit.mlp == "swiglu" else 1)
    attention, mlp = _linear(dim, 3 * dim) + _linear(dim, dim), _linear(dim, rise) + _linear(vit.mlp_dim, dim)
    return [*4 * [dim], *attention, *mlp, *(2 * [dim] if vit.layer_scale is not None else [])]


def _pretraining_head(config: PretrainConfig, numbers_a_patch: int) -> list[int]:
    """Everything but the encoder."""
    D = config.model.dim
    match config.method:
        case "mae":
            E, depth = config.mae.decoder_dim, config.mae.decoder_depth
            blocks = depth * _block(VitConfig(dim=E, heads=config.mae.decoder_heads)) + (2 * [E] if depth else [])
            return [*_linear(D, E), E, *blocks, *_linear(E, numbers_a_patch)]
        case "simmim":
            middle = _linear(D, D) if config.simmim.head == "mlp" else []
            return [D, *middle, *_linear(D, numbers_a_patch)]
        case "simclr":
            width = config.simclr.hidden_dim
            return _linear(D, width) + _linear(width, config.simclr.projection_dim)


def _vit(config: RunConfig, channels: int) -> list[int]:
    vit: VitConfig = config.model
    table = math.prod(patch_grid(config.crop_voxels, config.patch_voxels)) * vit.dim
    projection = _linear(math.prod(config.patch_voxels) * channels, vit.dim)
    return [*projection, *([table] if vit.positions == "learned" else []), *vit.depth * _block(vit), vit.dim, vit.dim]


def _residual(inputs: int, outputs: int) -> list[int]:
    shortcut = [inputs * outputs] if inputs != outputs else []
    return [27 * inputs * outputs, 27 * outputs * outputs, *shortcut]


def _unetr_head(config: FinetuneConfig, channels: int) -> list[int]:
    strides = upsampling_strides(unetr_halvings(config.patch_voxels))
    levels = len(strides)
    F, D = config.unetr.feature_size, config.model.dim
    widths = [F * 2**level for level in range(levels)] + [D]
    sizes = [*_residual(channels, F), *_linear(F, config.unetr.num_classes)]
    for level in range(1, levels):
        coarsest, *others = strides[level:][::-1]
        width = widths[level]
        sizes.append(D * width * math.prod(coarsest))
        for stride in others:
            sizes += [width * width * math.prod(stride), *_residual(width, width)]
    for level in range(levels):
        sizes.append(widths[level + 1] * widths[level] * math.prod(strides[level]))
        sizes += _residual(2 * widths[level], widths[level])
    return sizes
