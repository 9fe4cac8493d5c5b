"""Pretraining by a small CNN that fills in hidden voxels: a method of its own, in one file."""

from dataclasses import dataclass

from torch import nn

from mimscale.models.config import EncoderConfig, TargetConfig
from mimscale.models.encoder import Encoder
from mimscale.models.patches import hidden_voxels, patchify
from mimscale.models.reconstruction import MaskedModel
from mimscale.train.method import Method


@dataclass(frozen=True, kw_only=True)
class ConvConfig(EncoderConfig):  # the keys of `model`
    width: int = 16
    layers = 1


class ConvEncoder(Encoder):
    def __init__(self, config, channels):
        super().__init__(config, channels)
        self.blocks = nn.ModuleList([nn.Conv3d(channels, config.width, 5, padding=2)])

    def forward(self, image):
        return self.blocks[0](image).relu()


class Fill(MaskedModel):
    def __init__(self, config, channels):
        super().__init__(config.target, config.crop_voxels, config.patch_voxels)
        self.encoder = ConvEncoder(config.model, channels)
        self.head = nn.Conv3d(config.model.width, channels, 1)

    def predict(self, image, hidden):
        features = self.encoder(image.masked_fill(hidden_voxels(hidden, self.patch_voxels, self.grid), 0))
        return patchify(self.head(features), self.patch_voxels), features.flatten(2).transpose(1, 2)


class FillMethod(Method):
    name, title, model, settings = "fill", "CNN that fills in hidden voxels", ConvConfig, TargetConfig

    def build(self, config, channels):
        return Fill(config, channels)


METHOD = FillMethod()
