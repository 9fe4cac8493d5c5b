"""AdamW parameter groups and the learning rate of a step.

The rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mimscale.train.config import OptimConfig


@dataclass(frozen=True)
class Stage:
    """A part of a run with one linear warm-up and one half cosine."""

    start: int  # its first step
    stop: int  # the step after its last
    warmup_steps: int
    peak: float  # rate after the warm-up
    trains_encoder: bool


def stages(config: OptimConfig, steps: int) -> list[Stage]:
    """The table of the schedule: the stages of a run of `steps`, in order, without gaps."""
    match config.schedule:
        case "full":
            return [Stage(0, steps, config.warmup_steps, config.lr, True)]
        case "low_peak":
            return [Stage(0, steps, config.warmup_steps, config.lr / 10, True)]
        case "frozen":
            return [Stage(0, steps, config.warmup_steps, config.lr, False)]
        case "sawtooth":
            # The head has half of its stage to rise and half to fall; then both rise together (Wald et al. 2024,
            # arXiv:2412.17041).
            head_steps = min(config.head_steps, steps)
            alone = Stage(0, head_steps, head_steps // 2, config.lr, False)
            return [alone, Stage(head_steps, steps, config.warmup_steps, config.lr, True)]


def stage_at(config: OptimConfig, step: int, steps: int) -> Stage:
    """The stage of optimizer step `step` (0-based); beyond the last step, the last one."""
    table = stages(config, steps)
    return next((stage for stage in table if step < stage.stop), table[-1])


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: in each stage a linear rise, then half a cosine down.

    The cosine is that of Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5.
    """
    stage = stage_at(config, step, steps)
    inside = step - stage.start
    if inside < stage.warmup_steps:
        return stage.peak * (inside + 1) / stage.warmup_steps
    done = (inside - stage.warmup_steps) / max(1, stage.stop - stage.start - stage.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return stage.peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def group_rate(group: dict[str, Any], config: OptimConfig, step: int, steps: int) -> float:
    """Rate of one of `parameter_groups`: 0 for the encoder in a stage that trains the head alone."""
    if group["is_encoder"] and not stage_at(config, step, steps).trains_encoder:
        return 0.0
    rate: float = learning_rate(config, step, steps) * group["lr_scale"]
    return rate


def lr_scale(name: str, config: OptimConfig, depth: int) -> float:
    """Factor on the rate of one parameter.

    Encoder blocks fall by `layer_decay` from each block to the one below it, the embedding being below the first
    (Bao et al. 2022, arXiv:2106.08254, sec. 3.2). Everything but the encoder has `head_lr_ratio`.
    """
    if not name.startswith("encoder."):
        return config.head_lr_ratio
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block:
        layer = int(block.group(1)) + 1
    elif name.startswith("encoder.norm"):
        layer = depth + 1
    else:
        layer = 0
    return config.layer_decay ** (depth + 1 - layer)


def adamw(model: nn.Module, config: OptimConfig, depth: int) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, one pass over the memory of weights, gradients and moments a step.

    torch's default takes several passes, and on a CPU five times as long.
    """
    groups = parameter_groups(model, config, depth)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def parameter_groups(model: nn.Module, config: OptimConfig, depth: int) -> list[dict[str, Any]]:
    """Groups for AdamW, one for each rate factor, part of the model and decay, in a fixed order.

    Vectors (biases, norms, layer scales), tokens and position tables are not decayed: decay pulls them towards a value
    that means nothing.
    """
    grouped: dict[tuple[float, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = parameter.ndim > 1 and not name.endswith(("token", "positions", "position_bias_table"))
        # Only a schedule tells encoder and head apart: one that does not leaves them in one group.
        is_encoder = config.schedule == "sawtooth" and name.startswith("encoder.")
        grouped[lr_scale(name, config, depth), is_encoder, is_decayed].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "lr_scale": scale,
            "is_encoder": is_encoder,
        }
        for (scale, is_encoder, is_decayed), parameters in sorted(grouped.items(), key=lambda item: item[0])
    ]
