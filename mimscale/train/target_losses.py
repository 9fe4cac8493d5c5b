"""Losses of targets of whole volumes: one number a sample and target, so that missing ones can be left out.

B samples | T targets | K outputs of the network, those of all targets side by side
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A target, and the outputs that belong to it."""

    name: str
    classes: tuple[str, ...]  # empty for a number
    outputs: slice


def tasks_of(targets: Sequence[tuple[str, Sequence[str]]]) -> list[Task]:
    """Targets as (name, classes) -> their places among the outputs: as many as classes, or one for a number."""

    def placed() -> Iterator[Task]:
        start = 0
        for name, classes in targets:
            stop = start + max(1, len(classes))
            yield Task(name, tuple(classes), slice(start, stop))
            start = stop

    return list(placed())


def target_losses(
    outputs: Tensor, values: Tensor, tasks: Sequence[Task], regression: Literal["smooth_l1", "l2"]
) -> Tensor:
    """The loss of each sample and target, in fp32: cross-entropy of classes, of numbers smooth L1 or the square.

    Smooth L1 is half the square up to one standard deviation and linear from there on (Girshick 2015,
    arXiv:1504.08083, eq. 3).

    Args:
        outputs: [B, K].
        values: float [B, T]: numbers of classes, or numbers in standard deviations; any where there is none.
        tasks: [T].
        regression: loss of numbers.

    Returns:
        [B, T].
    """
    losses = []
    for number, task in enumerate(tasks):
        own, value = outputs[:, task.outputs].float(), values[:, number]
        if task.classes:
            losses.append(F.cross_entropy(own, value.long(), reduction="none"))
        elif regression == "smooth_l1":
            losses.append(F.smooth_l1_loss(own[:, 0], value, reduction="none"))
        else:
            losses.append((own[:, 0] - value).square())
    return torch.stack(losses, dim=1)
