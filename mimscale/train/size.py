"""How large a run is: weights, FLOPs, a checkpoint. Estimates for login nodes, without torch.

D embedding | L patches a crop
"""

import math
from dataclasses import replace

from mimscale.models.config import mask_grid, patch_grid
from mimscale.models.flops import CropShape, Flops, answered_patches
from mimscale.models.masking import hidden_units
from mimscale.train.config import PretrainConfig, RunConfig

BYTES_OF_ADAM = 8  # two moments in fp32
BYTES_OF_MASTER = 4  # ZeRO's own fp32 copy of the weights
BYTES_OF_FP32_WEIGHTS = 4  # weights.safetensors
HASHED_MB_PER_S = 1_000.0  # every file of a checkpoint is hashed


def count_parameters(config: RunConfig, channels: int = 1) -> int:
    """Weights of the model that a run trains."""
    return sum(parameter_sizes(config, channels))


def parameter_sizes(config: RunConfig, channels: int = 1) -> list[int]:
    """Numbers in each weight of the model that a run trains, in no particular order."""
    return config.network.parameter_sizes(config, channels)


def run_flops(config: RunConfig, channels: int = 1) -> dict[str, Flops]:
    """Of one sample, by part of the network; with a range of mask ratios, at its middle."""
    return config.network.flops(config, channels)


def crop_shape(config: RunConfig, channels: int) -> CropShape:
    """What the network is fed."""
    return CropShape(crop_voxels=config.crop_voxels, patch_voxels=config.patch_voxels, channels=channels)


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


def voxels_of_loss(config: PretrainConfig, channels: int) -> tuple[int, int]:
    """Numbers that a network predicts which sees whole crops, and those of them that the loss asks for at the most."""
    assert config.target is not None, "the method predicts voxels"
    shape = crop_shape(config, channels)
    visible, decoded = visible_and_decoded(config, (config.mask.ratio_range or (config.mask.ratio,))[-1])
    asked = answered_patches(config.target, visible, decoded)
    return shape.patches * shape.numbers_a_patch, asked * shape.numbers_a_patch


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
