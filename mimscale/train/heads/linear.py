"""A linear probe of a ViT: `mimscale.models.probe`."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mimscale.models.activations import FP32_BYTES, Activations, encoder_activations
from mimscale.models.config import VitConfig
from mimscale.models.flops import Flops, flops_by_part, probe_products
from mimscale.models.parameters import linear_sizes, vit_sizes
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


class _Linear(Head):
    name = "linear"
    title = "linear probe for segmentation"

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        from mimscale.models.probe import LinearProbe

        crop, patch = config.crop_voxels, config.patch_voxels
        return LinearProbe(
            model_of(config, VitConfig), config.unetr, crop_voxels=crop, patch_voxels=patch, channels=channels
        )

    def parameter_sizes(self, config: FinetuneConfig, channels: int) -> list[int]:
        vit = model_of(config, VitConfig)
        return vit_sizes(vit, crop_shape(config, channels)) + linear_sizes(vit.dim, config.unetr.num_classes)

    def flops(self, config: FinetuneConfig, channels: int) -> dict[str, Flops]:
        return flops_by_part(probe_products(model_of(config, VitConfig), config.unetr, crop_shape(config, channels)))

    def activations(self, config: FinetuneConfig, width: int, channels: int) -> Activations:
        shape = crop_shape(config, channels)
        whole = encoder_activations(
            model_of(config, VitConfig), numbers_a_patch=shape.numbers_a_patch, tokens=shape.patches, width=width
        )
        voxels = math.prod(config.crop_voxels) * config.unetr.num_classes * FP32_BYTES
        return replace(whole, kept=whole.kept + 4 * voxels, transient=2 * voxels)


HEAD = _Linear()
