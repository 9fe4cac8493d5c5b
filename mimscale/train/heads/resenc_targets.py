"""Targets of whole volumes from a residual encoder: `mimscale.models.pooled`."""

from typing import TYPE_CHECKING

from mimscale.models.config import ResencConfig
from mimscale.models.resenc_tally import resenc_encoder, stage_voxel_counts
from mimscale.models.tally import Tally
from mimscale.train.config import FinetuneConfig
from mimscale.train.heads.targets import TargetsHead
from mimscale.train.method import model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from mimscale.models.encoder import Encoder


class _ResencTargets(TargetsHead):
    name = "resenc_targets"
    title = "residual encoder for targets of whole volumes"
    model = ResencConfig

    def encoder(self, config: FinetuneConfig, channels: int) -> "Encoder":
        from mimscale.models.resenc import ResidualEncoder

        return ResidualEncoder(model_of(config, ResencConfig), channels=channels)

    def last_tokens(self, config: FinetuneConfig) -> tuple[int, int]:
        resenc = model_of(config, ResencConfig)
        return stage_voxel_counts(resenc, crop_shape(config, 1))[-1], resenc.features[-1]

    def encoder_tally(self, config: FinetuneConfig, channels: int) -> Tally:
        return resenc_encoder(model_of(config, ResencConfig), crop_shape(config, channels))


HEAD = _ResencTargets()
