"""`mimscale pretrain` with SimCLR: two views of a crop are told from the crops of other subjects.

B crops of this rank | R ranks | E numbers of an embedding
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mimscale.models.simclr import contrastive_loss
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import normalise, to_device
from mimscale.train.build import build_pretrain
from mimscale.train.config import PretrainConfig
from mimscale.train.objective import Objective
from mimscale.train.ranks import Ranks
from mimscale.train.training_data import TrainingData


class Contrast(Objective):
    """Objective of SimCLR. The pool of a loss is a micro-batch of all ranks; see `simclr.pool_crops`."""

    overlay: str | None = None

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config

    def build(self, channels: int) -> nn.Module:
        """Encoder and projection."""
        return build_pretrain(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Nothing: pretraining starts from random weights."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] NT-Xent of this rank's views against those of all ranks; its mean over the ranks is the pool's loss."""
        anchors = self._embeddings(forward, batch)
        return pool_loss(anchors, subject_numbers(batch.subjects), self._config.simclr.temperature)

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """None: the loss of views that say nothing is the logarithm of the number of keys, and known beforehand."""
        return {}

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Sums that give mean cosines over all crops whatever batches they came in: a loss would depend on those."""
        first, second = self._embeddings(forward, batch).double().chunk(2)  # [B, E] each
        counted = batch.counted.double()
        total = (first * counted[:, None]).sum(dim=0)  # [E]
        return {
            "samples": counted.sum(),
            "partners": ((first * second).sum(dim=1) * counted).sum(),
            **{f"total_{number}": value for number, value in enumerate(total.unbind())},
        }

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """Mean cosine between the two views of a crop, and between crops: 1 and 1 is a collapse."""
        samples = sums["samples"]
        metrics = {"val_cosine_views": sums["partners"] / samples}
        if samples > 1:
            square = sum(value**2 for name, value in sums.items() if name.startswith("total_"))
            metrics["val_cosine_crops"] = (square - samples) / (samples * (samples - 1))
        return metrics

    def _embeddings(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[2B, E]: the first views, then the second ones."""
        image, valid = normalise(batch)
        views = [augment_batch(batch, None, image, valid, self._config.augment, view)[0] for view in range(2)]
        embeddings: Tensor = forward(torch.cat(views))
        return embeddings


def pool_loss(anchors: Tensor, subjects: Tensor, temperature: float) -> Tensor:
    """NT-Xent of this rank's views against those of all ranks. A collective, and its backward pass too.

    Args:
        anchors: [2B, E], the first views and then the second ones of B crops; the same B on every rank.
        subjects: int64 [B].
        temperature: by which cosines are divided.
    """
    crops = len(subjects)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    of_anchor = to_device(subjects, anchors.device).repeat(2)
    own = rank * 2 * crops + torch.arange(2 * crops, device=anchors.device)  # rows of the gathered keys
    return contrastive_loss(
        anchors,
        _Gathered.apply(anchors),  # type: ignore[no-untyped-call]
        own.roll(crops),
        of_anchor,
        _gather(of_anchor),
        temperature,
    )


class _Gathered(torch.autograd.Function):
    """Rows of all ranks, in rank order. A rank's rows are keys of every rank's loss, so their gradients are summed.

    The engine then averages weights' gradients over the ranks, as for any loss that is a mean over ranks.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        return _gather(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        if not distributed.is_initialized():
            return gradient
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def _gather(rows: Tensor) -> Tensor:
    """[N, ...] of each rank -> [R * N, ...]."""
    if not distributed.is_initialized():
        return rows.clone()
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def subject_numbers(subjects: list[str]) -> Tensor:
    """A number for each subject that is the same on every rank: int64 [B]."""
    digests = [hashlib.sha256(subject.encode()).digest() for subject in subjects]
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.int64)
