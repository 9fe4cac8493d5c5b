"""UNETR-like decoder on a 3D Swin transformer: `mimscale.models.swin`."""

from typing import TYPE_CHECKING

from mimscale.models.config import SwinConfig
from mimscale.models.swin_tally import swin_tally, swin_unetr_head
from mimscale.models.tally import Tally
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


class _SwinUnetr(Head):
    name = "swin_unetr"
    title = "Swin UNETR for segmentation"
    model = SwinConfig

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        from mimscale.models.swin import SwinUnetr

        swin, crop, patch = model_of(config, SwinConfig), config.crop_voxels, config.patch_voxels
        return SwinUnetr(swin, config.unetr, crop_voxels=crop, patch_voxels=patch, channels=channels)

    def tally(self, config: FinetuneConfig, channels: int) -> Tally:
        swin, shape = model_of(config, SwinConfig), crop_shape(config, channels)
        return swin_tally(swin, shape) + swin_unetr_head(swin, shape, config.unetr.num_classes)


HEAD = _SwinUnetr()
