"""`mimscale pretrain` with MAE or SimMIM: predict hidden patches of unlabelled volumes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.console import say
from mimscale.models.masking import draw_masks, draw_predicted
from mimscale.stream import order
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import labels, normalise, without_excluded
from mimscale.train.build import build_pretrain
from mimscale.train.config import PretrainConfig
from mimscale.train.contrast import Contrast
from mimscale.train.ranks import Ranks
from mimscale.train.session import Objective, TrainingData


def pretrain_objective(config: PretrainConfig) -> Objective:
    """The objective of a method."""
    return Contrast(config) if config.method == "simclr" else MaskedReconstruction(config)


class MaskedReconstruction:
    """Objective of MAE and SimMIM: predict the voxels of hidden patches."""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self.overlay: str | None = config.exclude_overlay

    def build(self, channels: int) -> nn.Module:
        """The network of the method."""
        return build_pretrain(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Nothing: pretraining starts from random weights."""
        if self.overlay is not None and ranks.is_first:
            say(f"{len(data.train)} training volumes have overlay {self.overlay!r}; volumes without it are left out")

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] mean over the samples, and their repeats, of the mean error over their hidden voxels."""
        config, excluded = self._config, self._excluded(batch)
        parts = []
        for view in range(config.mask.repeats):
            image, label, valid = augment_batch(batch, excluded, *normalise(batch), config.augment, view)
            parts.append((image, without_excluded(valid, label)))
        images, valids = zip(*parts, strict=True)
        seeds = [seed for view in range(config.mask.repeats) for seed in _view_seeds(batch.seeds, view)]
        image, valid = (views[0] if len(views) == 1 else torch.cat(views) for views in (images, valids))
        return self._output(forward, batch, seeds, image, valid).loss  # type: ignore[no-any-return]

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Loss sums; the masks belong to the samples, so they are the same at every validation."""
        image, valid = normalise(batch)
        output = self._output(forward, batch, batch.seeds, image, without_excluded(valid, self._excluded(batch)))
        return {"loss": (output.sample_loss * batch.counted).sum().double(), "samples": batch.counted.sum().double()}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean validation loss."""
        return {"val_loss": sums["loss"] / sums["samples"]}

    def _excluded(self, batch: Batch) -> Tensor | None:
        return None if self.overlay is None else labels(batch)

    def _output(self, forward: Callable[..., Any], batch: Batch, seeds: list[int], image: Tensor, valid: Tensor) -> Any:
        config = self._config
        # The ratio of a `ratio_range` is one for the whole global batch, so its seed names the batch.
        ratio_seed = (config.seed << 32 | batch.batch_index) % 2**64
        hidden = draw_masks(seeds, config.crop_voxels, config.patch_voxels, config.mask, ratio_seed)
        if config.mask.predicted_share == 1:
            return forward(image, torch.from_numpy(hidden), valid)
        predicted = draw_predicted(seeds, hidden, config.mask.predicted_share)
        return forward(image, torch.from_numpy(hidden), valid, torch.from_numpy(predicted))


def _view_seeds(seeds: list[int], view: int) -> list[int]:
    """Seeds of the masks of a sample's views: the first has the sample's own."""
    if view == 0:
        return seeds
    return [int(seed) for seed in order.draw_seeds(seeds, view, order.VIEW)]
