"""A light head on a ViT, after Primus (Wald et al. 2025, arXiv:2503.01835): transposed convolutions up to voxels.

There is no skip: all that the head knows has passed through the transformer.

B batch | C channels | Z Y X crop, voxels | D embedding | K outputs
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mimscale.models.config import UnetrConfig, VitConfig, unetr_halvings, upsampling_strides
from mimscale.models.patches import tokens_to_grid
from mimscale.models.primus_tally import head_widths
from mimscale.models.vit import Vit


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each voxel."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, F, z, y, x] -> the same."""
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class Primus(nn.Module):
    """Encoder of the whole crop and one transposed convolution for each doubling of the resolution."""

    def __init__(
        self,
        vit: VitConfig,
        unetr: UnetrConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Takes the number of outputs from `unetr`. Raises ValueError when a patch edge is no power of two."""
        super().__init__()
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        strides = upsampling_strides(unetr_halvings(patch_voxels))[::-1]  # coarsest first
        widths = head_widths(vit.dim, unetr.num_classes, len(strides))
        steps: list[nn.Module] = []
        for inputs, outputs, stride in zip(widths[:-2], widths[1:-1], strides[:-1], strict=True):
            steps += [nn.ConvTranspose3d(inputs, outputs, stride, stride), ChannelNorm(outputs), nn.GELU()]
        self.up_steps = nn.Sequential(*steps)
        self.out = nn.ConvTranspose3d(widths[-2], widths[-1], strides[-1], strides[-1])

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        assert self.out.bias is not None
        return self.out.bias

    def forward(self, image: Tensor) -> Tensor:
        """Scores before softmax or sigmoid: [B, C, Z, Y, X] -> fp32 [B, K, Z, Y, X]."""
        tokens, _ = self.encoder(image)
        logits: Tensor = self.out(self.up_steps(tokens_to_grid(tokens, self.encoder.grid)))
        return logits.float()
