"""`mimscale pretrain`: a masked autoencoder learns to predict hidden patches of unlabelled volumes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.models.mae import MaeOutput
from mimscale.models.masking import draw_masks
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import normalise
from mimscale.train.build import build_mae
from mimscale.train.config import PretrainConfig
from mimscale.train.ranks import Ranks
from mimscale.train.session import TrainingData
from mimscale.train.yardsticks import yardstick_metrics, yardstick_sums


class MaskedReconstruction:
    """Objective of pretraining: predict the voxels of hidden patches."""

    overlay: str | None = None

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self._mean_voxel_losses: list[Tensor] = []  # of the micro-batches since they were taken

    def build(self, channels: int) -> nn.Module:
        """The masked autoencoder."""
        return build_mae(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Nothing: a masked autoencoder starts from random weights."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] mean over the samples of the mean error over their hidden voxels."""
        image, _, valid = augment_batch(batch, None, *normalise(batch), self._config.augment)
        output = self._output(forward, image, self._hidden(batch), valid)
        self._mean_voxel_losses.append(output.mean_voxel_loss)
        return output.loss

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """The training loss of the mean of the visible voxels."""
        losses, self._mean_voxel_losses = self._mean_voxel_losses, []
        return {"mean_voxel": torch.stack(losses).double().mean()}

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Losses and yardsticks; the masks belong to the samples, so they are the same at every validation."""
        image, valid = normalise(batch)
        hidden = self._hidden(batch)
        output = self._output(forward, image, hidden, valid)
        config = self._config
        return yardstick_sums(config.mae, config.patch_voxels, output, batch, image, hidden, valid)

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """The mean validation loss, beside what it would be without a network; see `mimscale.train.yardsticks`."""
        return yardstick_metrics(sums)

    def _hidden(self, batch: Batch) -> Tensor:
        """Which patches are hidden: bool [B, L], on the CPU."""
        config = self._config
        # The ratio of a `ratio_range` is one for the whole global batch, so its seed names the batch.
        ratio_seed = (config.seed << 32 | batch.batch_index) % 2**64
        return torch.from_numpy(
            draw_masks(batch.seeds, config.crop_voxels, config.patch_voxels, config.mask, ratio_seed)
        )

    @staticmethod
    def _output(forward: Callable[..., Any], image: Tensor, hidden: Tensor, valid: Tensor) -> MaeOutput:
        output = forward(image, hidden, valid)
        assert isinstance(output, MaeOutput)
        return output
