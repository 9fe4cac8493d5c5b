"""`mimscale pretrain`: a masked autoencoder learns to predict hidden patches of unlabelled volumes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.models.masking import draw_masks
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import normalise
from mimscale.train.build import build_mae
from mimscale.train.config import PretrainConfig
from mimscale.train.ranks import Ranks
from mimscale.train.session import TrainingData


class MaskedReconstruction:
    """Objective of pretraining: predict the voxels of hidden patches."""

    overlay: str | None = None

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config

    def build(self, channels: int) -> nn.Module:
        """The masked autoencoder."""
        return build_mae(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Nothing: a masked autoencoder starts from random weights."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] mean over the samples of the mean error over their hidden voxels."""
        image, _, valid = augment_batch(batch, None, *normalise(batch), self._config.augment)
        return self._output(forward, batch, image, valid).loss  # type: ignore[no-any-return]

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Loss sums; the masks belong to the samples, so they are the same at every validation."""
        output = self._output(forward, batch, *normalise(batch))
        return {"loss": (output.sample_loss * batch.counted).sum().double(), "samples": batch.counted.sum().double()}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean validation loss."""
        return {"val_loss": sums["loss"] / sums["samples"]}

    def _output(self, forward: Callable[..., Any], batch: Batch, image: Tensor, valid: Tensor) -> Any:
        config = self._config
        # The ratio of a `ratio_range` is one for the whole global batch, so its seed names the batch.
        ratio_seed = (config.seed << 32 | batch.batch_index) % 2**64
        hidden = draw_masks(batch.seeds, config.crop_voxels, config.patch_voxels, config.mask, ratio_seed)
        return forward(image, torch.from_numpy(hidden), valid)
