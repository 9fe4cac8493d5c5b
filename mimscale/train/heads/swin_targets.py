"""Targets of whole volumes from a 3D Swin transformer: `mimscale.models.pooled`."""

from typing import TYPE_CHECKING

from mimscale.models.config import SwinConfig
from mimscale.models.swin_tally import state_shapes, swin_tally
from mimscale.models.tally import Tally
from mimscale.train.config import FinetuneConfig
from mimscale.train.heads.targets import TargetsHead
from mimscale.train.method import model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from mimscale.models.encoder import Encoder


class _SwinTargets(TargetsHead):
    name = "swin_targets"
    title = "Swin transformer for targets of whole volumes"
    model = SwinConfig

    def encoder(self, config: FinetuneConfig, channels: int) -> "Encoder":
        from mimscale.models.swin import Swin

        crop, patch = config.crop_voxels, config.patch_voxels
        return Swin(model_of(config, SwinConfig), crop_voxels=crop, patch_voxels=patch, channels=channels)

    def last_tokens(self, config: FinetuneConfig) -> tuple[int, int]:
        return state_shapes(model_of(config, SwinConfig), crop_shape(config, 1))[-1]

    def encoder_tally(self, config: FinetuneConfig, channels: int) -> Tally:
        """With the norm of the last state; the other states are not used."""
        tokens, dim = self.last_tokens(config)
        whole = swin_tally(model_of(config, SwinConfig), crop_shape(config, channels))
        return whole + Tally(numbers=tokens * dim, fp32=2 * tokens)


HEAD = _SwinTargets()
