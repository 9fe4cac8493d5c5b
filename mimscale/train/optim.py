"""AdamW parameter groups and the learning rate of a step.

The rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math
import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from mimscale.train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then a half cosine down to the minimum.

    The cosine is that of Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


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
    """Groups for AdamW, one for each pair of rate factor and decay, in a fixed order.

    Vectors (biases, norms, layer scales), tokens and position tables are not decayed: decay pulls them towards a value
    that means nothing.
    """
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = parameter.ndim > 1 and not name.endswith(("token", "positions"))
        grouped[lr_scale(name, config, depth), is_decayed].append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if is_decayed else 0.0, "lr_scale": scale}
        for (scale, is_decayed), parameters in sorted(grouped.items(), key=lambda item: item[0])
    ]
