"""`mimscale pretrain` with MAE or SimMIM: predict hidden patches of unlabelled volumes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale.console import say
from mimscale.models.masking import draw_masks, draw_predicted
from mimscale.models.reconstruction import ReconstructionOutput
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
        hidden = self._hidden(seeds, batch.batch_index)
        inputs: tuple[Tensor, ...] = (image, torch.from_numpy(hidden), valid)
        if config.mask.predicted_share < 1:
            inputs = (*inputs, torch.from_numpy(draw_predicted(seeds, hidden, config.mask.predicted_share)))
        output: ReconstructionOutput = forward(*inputs)
        return output.loss

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Loss sums over all hidden patches; the masks belong to the samples, so they are always the same."""
        image, valid = normalise(batch)
        valid = without_excluded(valid, self._excluded(batch))
        hidden = torch.from_numpy(self._hidden(batch.seeds, batch.batch_index))
        output: ReconstructionOutput = forward(image, hidden, valid)
        return {"loss": (output.sample_loss * batch.counted).sum().double(), "samples": batch.counted.sum().double()}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean validation loss."""
        return {"val_loss": sums["loss"] / sums["samples"]}

    def _excluded(self, batch: Batch) -> Tensor | None:
        return None if self.overlay is None else labels(batch)

    def _hidden(self, seeds: list[int], batch_index: int) -> NDArray[np.bool_]:
        """Which patches are hidden: bool [B, L]."""
        config = self._config
        # The ratio of a `ratio_range` is one for the whole global batch, so its seed names the batch.
        ratio_seed = (config.seed << 32 | batch_index) % 2**64
        return draw_masks(seeds, config.crop_voxels, config.patch_voxels, config.mask, ratio_seed)


def _view_seeds(seeds: list[int], view: int) -> list[int]:
    """Seeds of the masks of a sample's views: the first has the sample's own."""
    if view == 0:
        return seeds
    return [int(seed) for seed in order.draw_seeds(seeds, view, order.VIEW)]
