"""Masked autoencoder with a residual-encoder U-Net: `mimscale.models.resenc`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mimscale.models.config import ResencConfig, TargetConfig
from mimscale.models.resenc_tally import resenc_tally
from mimscale.models.tally import Tally
from mimscale.train.config import PretrainConfig
from mimscale.train.method import Method, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ResencMaeConfig(TargetConfig):
    """Its loss; the decoder is that of the U-Net, which is fine-tuned as well."""


class _ResencMae(Method):
    name = "resenc_mae"
    title = "residual-encoder U-Net pretrained as a masked autoencoder"
    model = ResencConfig
    settings = ResencMaeConfig

    def build(self, config: PretrainConfig, channels: int) -> "nn.Module":
        from mimscale.models.resenc import MaskedUnet

        assert config.target is not None
        crop, patch = config.crop_voxels, config.patch_voxels
        return MaskedUnet(
            model_of(config, ResencConfig), config.target, crop_voxels=crop, patch_voxels=patch, channels=channels
        )

    def tally(self, config: PretrainConfig, channels: int) -> Tally:
        return resenc_tally(model_of(config, ResencConfig), crop_shape(config, channels), channels)


METHOD = _ResencMae()
