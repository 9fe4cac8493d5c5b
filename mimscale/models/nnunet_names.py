"""Weights of our residual-encoder U-Net under the names of nnU-Net's (dynamic-network-architectures).

nnU-Net's networks hold each convolution under two names, and the encoder a second time inside the decoder; whoever
loads a state dict strictly asks for all of them. Its outputs (`decoder.seg_layers`) are those of its own classes and
stay as they are.
"""

import re
from typing import Any

from torch import Tensor

from mimscale.config import build_config
from mimscale.errors import CheckpointError
from mimscale.models.config import ResencConfig

_PARTS = {"conv": 0, "norm": 1}  # places in the sequence that is their second name


def to_nnunet(tensors: dict[str, Tensor], contract: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict for a `ResidualEncoderUNet` of the same stages, its outputs left out.

    Args:
        tensors: of a model of ours with a residual encoder; a decoder, where there is one, comes along.
        contract: its `model` says the strides.

    Raises:
        CheckpointError: the weights are of another encoder.
    """
    model = contract["model"]
    if "features" not in model:
        raise CheckpointError(f"model={model}: no residual encoder, so nnU-Net's has no place for it")
    config = build_config(ResencConfig, model, "model")
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem = re.fullmatch(r"encoder\.stem\.(conv|norm)\.(\w+)", name)
        block = re.fullmatch(r"encoder\.blocks\.(\d+)\.(\d+)\.(first|second|shortcut)\.(conv|norm)\.(\w+)", name)
        up = re.fullmatch(r"decoder\.ups\.(\d+)\.(\w+)", name)
        after = re.fullmatch(r"decoder\.blocks\.(\d+)\.(\d+)\.(conv|norm)\.(\w+)", name)
        if stem:
            places = _both(f"encoder.stem.convs.0.{{}}.{stem[2]}", stem[1])
        elif block:
            stage, number, part = int(block[1]), int(block[2]), block[3]
            strided = number == 0 and max(config.stage_strides[stage]) > 1
            inside = {"first": "conv1", "second": "conv2", "shortcut": f"skip.{int(strided)}"}[part]
            places = _both(f"encoder.stages.{stage}.blocks.{number}.{inside}.{{}}.{block[5]}", block[4])
        elif up:
            places = [f"decoder.transpconvs.{up[1]}.{up[2]}"]
        elif after:
            places = _both(f"decoder.stages.{after[1]}.convs.{after[2]}.{{}}.{after[4]}", after[3])
        else:
            continue  # an output of ours
        for place in places:
            theirs[place] = tensor
            if place.startswith("encoder."):
                theirs[f"decoder.{place}"] = tensor
    return theirs


def _both(pattern: str, part: str) -> list[str]:
    return [pattern.format(part), pattern.format(f"all_modules.{_PARTS[part]}")]
