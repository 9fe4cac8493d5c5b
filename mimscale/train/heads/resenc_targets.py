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


HEAD = _ResencTargets()
