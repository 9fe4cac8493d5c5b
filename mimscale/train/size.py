"""How large a run is: weights, a checkpoint, the memory of a rank. Estimates for login nodes, without torch.

D embedding | L patches a crop | K visible patches | P numbers a patch | F feature_size
"""

import math

from mimscale.models.config import VitConfig, patch_grid, unetr_halvings, upsampling_strides
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig

BYTES_OF_ADAM = 8  # two moments in fp32
BYTES_OF_MASTER = 4  # ZeRO's own fp32 copy of the weights
BYTES_OF_FP32_WEIGHTS = 4  # weights.safetensors
# Numbers that a transformer block keeps for its backward pass, a token and channel, without the attention matrix
# (Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.1: 34 bytes in 16 bits).
NUMBERS_OF_BLOCK = 17
NUMBERS_OF_CONV_LEVEL = 16  # feature maps that one level of UNETR keeps: two residual blocks with norms, and the skip
HASHED_MB_PER_S = 1_000.0  # every file of a checkpoint is hashed


def count_parameters(config: RunConfig, channels: int = 1) -> int:
    """Weights of the model that a run trains."""
    total = _vit(config, channels)
    numbers_a_patch = math.prod(config.patch_voxels) * channels
    if isinstance(config, PretrainConfig):
        E = config.mae.decoder_dim
        block = _block(E, 4.0, layer_scale=False)
        total += _linear(config.model.dim, E) + E + config.mae.decoder_depth * block + 2 * E
        total += _linear(E, numbers_a_patch)
    if isinstance(config, FinetuneConfig):
        total += _unetr_head(config, channels)
    return total


def checkpoint_bytes(config: RunConfig) -> int:
    """About what one checkpoint takes on disk, all files together."""
    return _weight_file_bytes(config) + _state_bytes(config)


def save_seconds(config: RunConfig, nodes: int, write_mb_per_s: float) -> float:
    """About how long the nodes write and hash a checkpoint: the state side by side, the weights on the first alone."""
    first_node = _weight_file_bytes(config) + _state_bytes(config) / nodes
    return first_node / 1e6 * (1 / write_mb_per_s + 1 / HASHED_MB_PER_S)


def memory_bytes(config: RunConfig, world_size: int, *, bf16: bool) -> int:
    """About what a rank needs on its device: weights, gradients, optimizer and what the backward pass keeps."""
    numbers, stage = count_parameters(config), config.engine.zero_stage
    width = 2 if bf16 else 4
    weights = numbers * width / (world_size if stage == 3 else 1)
    gradients = numbers * width / (world_size if stage >= 2 else 1)
    master = BYTES_OF_MASTER if bf16 or stage else 0
    optimizer = numbers * (BYTES_OF_ADAM + master) / (world_size if stage >= 1 else 1)
    return round(weights + gradients + optimizer + _activation_numbers(config) * width)


def _weight_file_bytes(config: RunConfig) -> int:
    return count_parameters(config) * BYTES_OF_FP32_WEIGHTS


def _state_bytes(config: RunConfig) -> int:
    return count_parameters(config) * (BYTES_OF_ADAM + BYTES_OF_MASTER)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block(dim: int, mlp_ratio: float, *, layer_scale: bool) -> int:
    hidden = int(dim * mlp_ratio)
    attention, mlp = _linear(dim, 3 * dim) + _linear(dim, dim), _linear(dim, hidden) + _linear(hidden, dim)
    return 4 * dim + attention + mlp + (2 * dim if layer_scale else 0)


def _vit(config: RunConfig, channels: int) -> int:
    vit: VitConfig = config.model
    block = _block(vit.dim, vit.mlp_ratio, layer_scale=vit.layer_scale is not None)
    table = math.prod(patch_grid(config.crop_voxels, config.patch_voxels)) * vit.dim
    projection = _linear(math.prod(config.patch_voxels) * channels, vit.dim)
    return projection + (table if vit.positions == "learned" else 0) + vit.depth * block + 2 * vit.dim


def _residual(inputs: int, outputs: int) -> int:
    return 27 * (inputs * outputs + outputs * outputs) + (inputs * outputs if inputs != outputs else 0)


def _unetr_head(config: FinetuneConfig, channels: int) -> int:
    strides = upsampling_strides(unetr_halvings(config.patch_voxels))
    levels = len(strides)
    F, D = config.unetr.feature_size, config.model.dim
    widths = [F * 2**level for level in range(levels)] + [D]
    total = _residual(channels, F) + _linear(F, config.unetr.num_classes)
    for level in range(1, levels):
        coarsest, *others = strides[level:][::-1]
        width = widths[level]
        total += D * width * math.prod(coarsest)
        total += sum(width * width * math.prod(stride) + _residual(width, width) for stride in others)
    for level in range(levels):
        total += widths[level + 1] * widths[level] * math.prod(strides[level])
        total += _residual(2 * widths[level], widths[level])
    return total


def _activation_numbers(config: RunConfig) -> float:
    L, vit = math.prod(patch_grid(config.crop_voxels, config.patch_voxels)), config.model
    voxels = math.prod(config.crop_voxels)
    tokens = float(L)
    if isinstance(config, PretrainConfig):
        tokens = L * (1 - (config.mask.ratio_range[0] if config.mask.ratio_range else config.mask.ratio))
    kept_blocks = 1 + vit.depth / NUMBERS_OF_BLOCK if vit.checkpoint_activations else vit.depth
    numbers = 2 * voxels + tokens * vit.dim * NUMBERS_OF_BLOCK * kept_blocks
    if isinstance(config, PretrainConfig):
        numbers += L * config.mae.decoder_dim * NUMBERS_OF_BLOCK * config.mae.decoder_depth + 2 * voxels
    if isinstance(config, FinetuneConfig):
        # A level has twice the channels of the one above it and an eighth of the voxels.
        numbers += (
            NUMBERS_OF_CONV_LEVEL * config.unetr.feature_size * voxels * 4 / 3 + config.unetr.num_classes * voxels
        )
    return config.micro_batch * numbers
