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
HASHED_MB_PER_S = 1_000.0  # every file of a checkpoint is read back and hashed


def count_parameters(config: RunConfig, channels: int = 1) -> int:
    """Weights of the model that a run trains."""
    total = _vit(config, channels)
    numbers_a_patch = math.prod(config.patch_voxels) * channels
    if isinstance(config, PretrainConfig):
        total += _pretraining_head(config, numbers_a_patch)
    if isinstance(config, FinetuneConfig):
        linear = config.head == "linear"
        total += _linear(config.model.dim, config.unetr.num_classes) if linear else _unetr_head(config, channels)
    return total


def checkpoint_bytes(config: RunConfig) -> int:
    """About what one checkpoint takes on disk, all files together."""
    return _weight_file_bytes(config) + _shard_bytes(config)


def save_seconds(config: RunConfig, nodes: int, write_mb_per_s: float) -> float:
    """About how long the nodes write and hash a checkpoint: shards side by side, the weights on the first alone."""
    first_node = _weight_file_bytes(config) + _shard_bytes(config) / nodes
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
    own = 0 if config.engine.zero_stage == 3 else 4
    return count_parameters(config) * (BYTES_OF_FP32_WEIGHTS + own)


def _shard_bytes(config: RunConfig) -> int:
    master = BYTES_OF_MASTER if config.engine.zero_stage else 0
    return count_parameters(config) * (BYTES_OF_ADAM + master)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block(vit: VitConfig) -> int:
    dim, rise = vit.dim, vit.mlp_dim * (2 if vit.mlp == "swiglu" else 1)
    attention, mlp = _linear(dim, 3 * dim) + _linear(dim, dim), _linear(dim, rise) + _linear(vit.mlp_dim, dim)
    return 4 * dim + attention + mlp + (2 * dim if vit.layer_scale is not None else 0)


def _pretraining_head(config: PretrainConfig, numbers_a_patch: int) -> int:
    """Everything but the encoder."""
    D = config.model.dim
    match config.method:
        case "mae":
            E, depth = config.mae.decoder_dim, config.mae.decoder_depth
            blocks = depth * _block(VitConfig(dim=E, heads=config.mae.decoder_heads)) + (2 * E if depth else 0)
            return _linear(D, E) + E + blocks + _linear(E, numbers_a_patch)
        case "simmim":
            middle = _linear(D, D) if config.simmim.head == "mlp" else 0
            return D + middle + _linear(D, numbers_a_patch)
        case "simclr":
            return _linear(D, config.simclr.hidden_dim) + _linear(
                config.simclr.hidden_dim, config.simclr.projection_dim
            )


def _vit(config: RunConfig, channels: int) -> int:
    vit: VitConfig = config.model
    table = math.prod(patch_grid(config.crop_voxels, config.patch_voxels)) * vit.dim
    projection = _linear(math.prod(config.patch_voxels) * channels, vit.dim)
    return projection + (table if vit.positions == "learned" else 0) + vit.depth * _block(vit) + 2 * vit.dim


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
    if isinstance(config, PretrainConfig) and config.method == "mae":
        tokens = L * (1 - (config.mask.ratio_range[0] if config.mask.ratio_range else config.mask.ratio))
    kept_blocks = 1 + vit.depth / NUMBERS_OF_BLOCK if vit.checkpoint_activations else vit.depth
    numbers = 2 * voxels + tokens * vit.dim * NUMBERS_OF_BLOCK * kept_blocks
    if isinstance(config, PretrainConfig):
        if config.method == "mae":
            numbers += L * config.mae.decoder_dim * NUMBERS_OF_BLOCK * config.mae.decoder_depth
        if config.method == "simclr":
            numbers *= 2  # two views
        else:
            numbers = (numbers + 2 * voxels) * config.mask.repeats
    if isinstance(config, FinetuneConfig) and config.head == "linear":
        numbers += 2 * config.unetr.num_classes * voxels
    elif isinstance(config, FinetuneConfig):
        # A level has twice the channels of the one above it and an eighth of the voxels.
        numbers += (
            NUMBERS_OF_CONV_LEVEL * config.unetr.feature_size * voxels * 4 / 3 + config.unetr.num_classes * voxels
        )
    return config.micro_batch * numbers
