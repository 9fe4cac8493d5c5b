"""How large a run is: weights, products, a checkpoint. Estimates for login nodes, without torch.

D embedding | E embedding of the decoder | L patches a crop | F feature_size
"""

import math
from dataclasses import replace

from mimscale.models.config import VitConfig, mask_grid, patch_grid, unetr_halvings, upsampling_strides
from mimscale.models.flops import Product, mae_products, unetr_products
from mimscale.models.masking import hidden_units
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig

BYTES_OF_ADAM = 8  # two moments in fp32
BYTES_OF_MASTER = 4  # ZeRO's own fp32 copy of the weights
BYTES_OF_FP32_WEIGHTS = 4  # weights.safetensors
HASHED_MB_PER_S = 1_000.0  # every file of a checkpoint is read back and hashed


def count_parameters(config: RunConfig, channels: int = 1) -> int:
    """Weights of the model that a run trains."""
    return sum(parameter_sizes(config, channels))


def parameter_sizes(config: RunConfig, channels: int = 1) -> list[int]:
    """Numbers in each weight of the model that a run trains, in no particular order."""
    sizes = _vit(config, channels)
    numbers_a_patch = math.prod(config.patch_voxels) * channels
    if isinstance(config, PretrainConfig):
        E = config.mae.decoder_dim
        block = _block(E, 4.0, layer_scale=False)
        sizes += [*_linear(config.model.dim, E), E, *config.mae.decoder_depth * block, E, E]
        sizes += _linear(E, numbers_a_patch)
    if isinstance(config, FinetuneConfig):
        sizes += _unetr_head(config, channels)
    return sizes


def visible_patches(config: PretrainConfig, ratio: float) -> int:
    """Patches of a crop that the encoder sees when `ratio` of the mask units is hidden."""
    L = math.prod(patch_grid(config.crop_voxels, config.patch_voxels))
    units = math.prod(mask_grid(config.crop_voxels, config.patch_voxels, config.mask))
    hidden = hidden_units(units, replace(config.mask, ratio=ratio, ratio_range=None), 0)
    return L // units * (units - hidden)


def run_products(config: RunConfig, channels: int = 1) -> list[Product]:
    """The matrix products of one sample; with a range of mask ratios, at its middle."""
    crop, patch = config.crop_voxels, config.patch_voxels
    if isinstance(config, PretrainConfig):
        ratios = config.mask.ratio_range or (config.mask.ratio,)
        visible = visible_patches(config, sum(ratios) / len(ratios))
        return mae_products(
            config.model, config.mae, crop_voxels=crop, patch_voxels=patch, channels=channels, visible_patches=visible
        )
    assert isinstance(config, FinetuneConfig)
    return unetr_products(config.model, config.unetr, crop_voxels=crop, patch_voxels=patch, channels=channels)


def checkpoint_bytes(config: RunConfig, *, bf16: bool = False) -> int:
    """About what one checkpoint takes on disk, all files together; in bf16 a little less than in fp32."""
    return _weight_file_bytes(config, bf16) + _shard_bytes(config)


def save_seconds(config: RunConfig, nodes: int, write_mb_per_s: float, *, bf16: bool = False) -> float:
    """About how long the nodes write and hash a checkpoint: shards side by side, the weights on the first alone."""
    first_node = _weight_file_bytes(config, bf16) + _shard_bytes(config) / nodes
    return first_node / 1e6 * (1 / write_mb_per_s + 1 / HASHED_MB_PER_S)


def _weight_file_bytes(config: RunConfig, bf16: bool) -> int:
    own = 0 if config.engine.zero_stage == 3 else 2 if bf16 else 4  # of DeepSpeed, in the type that computes
    return count_parameters(config) * (BYTES_OF_FP32_WEIGHTS + own)


def _shard_bytes(config: RunConfig) -> int:
    master = BYTES_OF_MASTER if config.engine.zero_stage else 0
    return count_parameters(config) * (BYTES_OF_ADAM + master)


def _linear(inputs: int, outputs: int) -> list[int]:
    return [inputs * outputs, outputs]


def _block(dim: int, mlp_ratio: float, *, layer_scale: bool) -> list[int]:
    hidden = int(dim * mlp_ratio)
    attention, mlp = _linear(dim, 3 * dim) + _linear(dim, dim), _linear(dim, hidden) + _linear(hidden, dim)
    return [*4 * [dim], *attention, *mlp, *(2 * [dim] if layer_scale else [])]


def _vit(config: RunConfig, channels: int) -> list[int]:
    vit: VitConfig = config.model
    block = _block(vit.dim, vit.mlp_ratio, layer_scale=vit.layer_scale is not None)
    table = math.prod(patch_grid(config.crop_voxels, config.patch_voxels)) * vit.dim
    projection = _linear(math.prod(config.patch_voxels) * channels, vit.dim)
    return [*projection, *([table] if vit.positions == "learned" else []), *vit.depth * block, vit.dim, vit.dim]


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
