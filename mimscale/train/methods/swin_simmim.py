"""SimMIM with a 3D Swin transformer: `mimscale.models.swin`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mimscale.models.config import SwinConfig, TargetConfig
from mimscale.models.swin_tally import simmim_head, swin_tally
from mimscale.models.tally import Tally
from mimscale.train.config import PretrainConfig
from mimscale.train.method import Method, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class SwinSimmimConfig(TargetConfig):
    """Its loss; the head is one linear layer."""


class _SwinSimmim(Method):
    name = "swin_simmim"
    title = "Swin transformer pretrained with SimMIM"
    model = SwinConfig
    settings = SwinSimmimConfig

    def build(self, config: PretrainConfig, channels: int) -> "nn.Module":
        from mimscale.models.swin import SwinSimmim

        assert config.target is not None
        swin, crop, patch = model_of(config, SwinConfig), config.crop_voxels, config.patch_voxels
        return SwinSimmim(swin, config.target, crop_voxels=crop, patch_voxels=patch, channels=channels)

    def tally(self, config: PretrainConfig, channels: int) -> Tally:
        swin, shape = model_of(config, SwinConfig), crop_shape(config, channels)
        return swin_tally(swin, shape) + simmim_head(swin, shape)


METHOD = _SwinSimmim()
