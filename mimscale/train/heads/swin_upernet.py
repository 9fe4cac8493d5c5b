"""UperNet on a 3D Swin transformer: `mimscale.models.upernet`."""

from typing import TYPE_CHECKING

from mimscale.models.config import SwinConfig, UpernetConfig
from mimscale.models.swin_tally import swin_tally, upernet_head
from mimscale.models.tally import Tally
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


class _SwinUpernet(Head):
    name = "swin_upernet"
    title = "UperNet on a Swin transformer for segmentation"
    model = SwinConfig
    settings = UpernetConfig

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        from mimscale.models.upernet import Upernet

        swin, crop, patch = model_of(config, SwinConfig), config.crop_voxels, config.patch_voxels
        # The run's config is the variant that has this head's block.
        own: UpernetConfig = getattr(config, self.name)
        return Upernet(swin, config.unetr, own, crop_voxels=crop, patch_voxels=patch, channels=channels)

    def tally(self, config: FinetuneConfig, channels: int) -> Tally:
        swin, shape = model_of(config, SwinConfig), crop_shape(config, channels)
        own: UpernetConfig = getattr(config, self.name)
        return swin_tally(swin, shape) + upernet_head(swin, own, shape, config.unetr.num_classes)


HEAD = _SwinUpernet()
