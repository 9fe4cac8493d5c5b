"""Light transposed-convolution head on a ViT: `mimscale.models.primus`."""

from typing import TYPE_CHECKING

from mimscale.models.config import VitConfig, unetr_halvings
from mimscale.models.primus_tally import primus_head, vit_tally
from mimscale.models.tally import Tally
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


class _Primus(Head):
    name = "primus"
    title = "vision transformer with a light head for segmentation"

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        from mimscale.models.primus import Primus

        vit, crop, patch = model_of(config, VitConfig), config.crop_voxels, config.patch_voxels
        return Primus(vit, config.unetr, crop_voxels=crop, patch_voxels=patch, channels=channels)

    def problems(self, config: FinetuneConfig) -> list[str]:
        """A patch whose resolution cannot be doubled up to that of voxels."""
        problems = super().problems(config)
        try:
            unetr_halvings(config.patch_voxels)
        except ValueError as error:
            problems.append(str(error))
        return problems

    def tally(self, config: FinetuneConfig, channels: int) -> Tally:
        vit, shape = model_of(config, VitConfig), crop_shape(config, channels)
        return vit_tally(vit, shape) + primus_head(vit, shape, config.unetr.num_classes)


HEAD = _Primus()
