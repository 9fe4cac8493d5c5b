"""Targets of whole volumes from a 3D Swin transformer: `mimscale.models.pooled`."""

from typing import TYPE_CHECKING

from mimscale.models.config import SwinConfig
from mimscale.train.config import FinetuneConfig
from mimscale.train.heads.targets import TargetsHead
from mimscale.train.method import model_of

if TYPE_CHECKING:
    from mimscale.models.encoder import Encoder


class _SwinTargets(TargetsHead):
    name = "swin_targets"
    title = "Swin transformer for targets of whole volumes"
    model = SwinConfig

    def encoder(self, config: FinetuneConfig, channels: int) -> "tuple[Encoder, int]":
        from mimscale.models.swin import Swin

        swin, crop, patch = model_of(config, SwinConfig), config.crop_voxels, config.patch_voxels
        return Swin(swin, crop_voxels=crop, patch_voxels=patch, channels=channels), swin.dim * 2**swin.layers


HEAD = _SwinTargets()
