"""UNETR on a ViT: `mimscale.models.unetr`."""

from typing import TYPE_CHECKING

from mimscale.models.activations import Activations, unetr_activations
from mimscale.models.config import VitConfig, unetr_halvings
from mimscale.models.flops import Flops, flops_by_part, unetr_products
from mimscale.models.parameters import unetr_head_sizes, vit_sizes
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


class _Unetr(Head):
    name = "unetr"
    title = "UNETR for segmentation"

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        from mimscale.models.unetr import Unetr

        crop, patch = config.crop_voxels, config.patch_voxels
        return Unetr(model_of(config, VitConfig), config.unetr, crop_voxels=crop, patch_voxels=patch, channels=channels)

    def problems(self, config: FinetuneConfig) -> list[str]:
        """A patch whose resolution cannot be doubled up to that of voxels."""
        problems = super().problems(config)
        try:
            unetr_halvings(config.patch_voxels)
        except ValueError as error:
            problems.append(str(error))
        return problems

    def parameter_sizes(self, config: FinetuneConfig, channels: int) -> list[int]:
        shape, vit = crop_shape(config, channels), model_of(config, VitConfig)
        return vit_sizes(vit, shape) + unetr_head_sizes(vit, config.unetr, shape)

    def flops(self, config: FinetuneConfig, channels: int) -> dict[str, Flops]:
        return flops_by_part(unetr_products(model_of(config, VitConfig), config.unetr, crop_shape(config, channels)))

    def activations(self, config: FinetuneConfig, width: int, channels: int) -> Activations:
        crop, patch = config.crop_voxels, config.patch_voxels
        return unetr_activations(
            model_of(config, VitConfig),
            config.unetr,
            crop_voxels=crop,
            patch_voxels=patch,
            channels=channels,
            width=width,
        )


HEAD = _Unetr()
