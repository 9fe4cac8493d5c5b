"""`mimscale pretrain` with a method that hides voxels: predict them, on unlabelled volumes."""

from collections.abc import Callable
from typing import Any

import torch
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
from mimscale.train.objective import Objective
from mimscale.train.ranks import Ranks
from mimscale.train.training_data import TrainingData
from mimscale.train.yardsticks import yardstick_metrics, yardstick_sums


def pretrain_objective(config: PretrainConfig) -> Objective:
    """The objective of a method."""
    return config.network.objective(config)


class MaskedReconstruction(Objective):
    """Objective of MAE, SimMIM and the like: predict the voxels of hidden patches."""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self.overlay: str | None = config.exclude_overlay
        self._mean_voxel_losses: list[Tensor] = []  # of the micro-batches since they were taken

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
        hidden = self._hidden(batch, seeds)
        predicted = None
        if config.mask.predicted_share < 1:
            predicted = torch.from_numpy(draw_predicted(seeds, hidden.numpy(), config.mask.predicted_share))
        output = self._output(forward, image, hidden, valid, predicted)
        self._mean_voxel_losses.append(output.mean_voxel_loss)
        return output.loss

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """The training loss of the mean of the visible voxels."""
        losses, self._mean_voxel_losses = self._mean_voxel_losses, []
        return {"mean_voxel": torch.stack(losses).double().mean()}

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Losses and yardsticks of all hidden patches; masks belong to the samples, so each validation has the same."""
        image, valid = normalise(batch)
        valid = without_excluded(valid, self._excluded(batch))
        hidden = self._hidden(batch, batch.seeds)
        output = self._output(forward, image, hidden, valid, None)
        target, patch_voxels = self._config.target, self._config.patch_voxels
        assert target is not None, "this method predicts voxels"
        return yardstick_sums(target, patch_voxels, output, batch, image, hidden, valid)

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """The mean validation loss, beside what it would be without a network; see `mimscale.train.yardsticks`."""
        return yardstick_metrics(sums)

    def _excluded(self, batch: Batch) -> Tensor | None:
        return None if self.overlay is None else labels(batch)

    def _hidden(self, batch: Batch, seeds: list[int]) -> Tensor:
        """Which patches are hidden: bool [B, L], on the CPU."""
        config = self._config
        # The ratio of a `ratio_range` is one for the whole global batch, so its seed names the batch.
        ratio_seed = (config.seed << 32 | batch.batch_index) % 2**64
        return torch.from_numpy(draw_masks(seeds, config.crop_voxels, config.patch_voxels, config.mask, ratio_seed))

    @staticmethod
    def _output(
        forward: Callable[..., Any], image: Tensor, hidden: Tensor, valid: Tensor, predicted: Tensor | None
    ) -> ReconstructionOutput:
        output = forward(image, hidden, valid, *(() if predicted is None else (predicted,)))
        assert isinstance(output, ReconstructionOutput)
        return output


def _view_seeds(seeds: list[int], view: int) -> list[int]:
    """Seeds of the masks of a sample's views: the first has the sample's own."""
    if view == 0:
        return seeds
    return [int(seed) for seed in order.draw_seeds(seeds, view, order.VIEW)]
