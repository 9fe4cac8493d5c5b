"""U-Net with a residual encoder: `mimscale.models.resenc`."""

from typing import TYPE_CHECKING

from mimscale.models.config import ResencConfig, ResencHeadConfig
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of

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

    def problems(self, config: FinetuneConfig) -> list[str]:
        """Strides that do not fit the crop."""
        try:
            model_of(config, ResencConfig).stage_voxels(config.crop_voxels)
        except ValueError as error:
            return [str(error)]
        return []


HEAD = _Resenc()
