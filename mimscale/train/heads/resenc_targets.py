"""Targets of whole volumes from a residual encoder: `mimscale.models.pooled`."""

from typing import TYPE_CHECKING

from mimscale.models.config import ResencConfig
from mimscale.train.config import FinetuneConfig
from mimscale.train.heads.targets import TargetsHead
from mimscale.train.method import model_of

if TYPE_CHECKING:
    from mimscale.models.encoder import Encoder


class _ResencTargets(TargetsHead):
    name = "resenc_targets"
    title = "residual encoder for targets of whole volumes"
    model = ResencConfig

    def encoder(self, config: FinetuneConfig, channels: int) -> "tuple[Encoder, int]":
        from mimscale.models.resenc import ResidualEncoder

        resenc = model_of(config, ResencConfig)
        return ResidualEncoder(resenc, channels=channels), resenc.features[-1]

    def problems(self, config: FinetuneConfig) -> list[str]:
        """Strides that do not fit the crop."""
        try:
            model_of(config, ResencConfig).stage_voxels(config.crop_voxels)
        except ValueError as error:
            return [str(error)]
        return []


HEAD = _ResencTargets()
