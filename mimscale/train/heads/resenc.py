"""U-Net with a residual encoder: `mimscale.models.resenc`."""

from typing import TYPE_CHECKING

from mimscale.models.config import ResencConfig, ResencHeadConfig
from mimscale.models.resenc_tally import coarse_outputs, resenc_tally
from mimscale.models.tally import Tally
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


class _Resenc(Head):
    name = "resenc"
    title = "residual-encoder U-Net for segmentation"
    model = ResencConfig
    settings = ResencHeadConfig

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        from mimscale.models.resenc import ResidualUnet

        # The run's config is the variant that has this head's block.
        own: ResencHeadConfig = getattr(config, self.name)
        return ResidualUnet(
            model_of(config, ResencConfig),
            config.unetr,
            crop_voxels=config.crop_voxels,
            channels=channels,
            deep_supervision=own.deep_supervision,
        )

    def tally(self, config: FinetuneConfig, channels: int) -> Tally:
        resenc, shape = model_of(config, ResencConfig), crop_shape(config, channels)
        own: ResencHeadConfig = getattr(config, self.name)
        whole = resenc_tally(resenc, shape, config.unetr.num_classes)
        return whole + coarse_outputs(resenc, shape, config.unetr.num_classes) if own.deep_supervision else whole


HEAD = _Resenc()
