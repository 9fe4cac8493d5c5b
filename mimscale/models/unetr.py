"""UNETR for any power-of-two patch and any depth (Hatamizadeh et al. 2021, arXiv:2103.10504).

Level 0 is full resolution, level n the patch grid; going up from level n, each step doubles the axes that the patch
halved. The skip into level k comes from inside the encoder, at k/n of its depth (quarters for a patch of 16), and
level 0 takes its skip from the image itself.

    B batch | C channels | Z Y X crop, voxels | D embedding | F feature_size | K classes
"""

import math
from collections.abc import Sequence

from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from mimscale.models.config import UnetrConfig, VitConfig, Zyx, unetr_halvings, upsampling_strides
from mimscale.models.patches import tokens_to_grid
from mimscale.models.vit import Vit

NORM = "instance"  # independent of the batch size, which is 1 or 2 for volumes


class Unetr(nn.Module):
    """Encoder of the whole crop and a convolutional decoder to class scores."""

    def __init__(
        self,
        vit: VitConfig,
        unetr: UnetrConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide into patches or a patch edge is no power of two."""
        super().__init__()
        self.config = unetr
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        strides = upsampling_strides(unetr_halvings(patch_voxels))  # of the step from level k + 1 up to level k
        levels = len(strides)
        widths = [unetr.feature_size * 2**level for level in range(levels)] + [vit.dim]
        self.skip_states = [math.ceil(vit.depth * level / levels) for level in range(1, levels)]
        self.image_skip = UnetrBasicBlock(3, channels, widths[0], 3, 1, NORM, res_block=True)
        self.token_skips = nn.ModuleList(
            _token_skip(vit.dim, widths[level], strides[level:][::-1]) for level in range(1, levels)
        )
        self.up_steps = nn.ModuleList(
            UnetrUpBlock(3, widths[level + 1], widths[level], 3, strides[level], NORM, res_block=True)
            for level in reversed(range(levels))
        )
        self.out = UnetOutBlock(3, widths[0], unetr.num_classes)

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        bias = self.out.conv.conv.bias
        assert isinstance(bias, Tensor)
        return bias

    def forward(self, image: Tensor) -> Tensor:
        """Scores before softmax or sigmoid: [B, C, Z, Y, X] -> fp32 [B, K, Z, Y, X]."""
        grid = self.encoder.grid
        tokens, states = self.encoder(image, keep=self.skip_states)
        skips = [self.image_skip(image.to(tokens.dtype))]  # from level 0 on
        for state, skip in zip(states, self.token_skips, strict=True):
            skips.append(skip(tokens_to_grid(state, grid)))
        features = tokens_to_grid(tokens, grid)  # [B, D, z, y, x]
        for up_step, skip in zip(self.up_steps, reversed(skips), strict=True):
            features = up_step(features, skip)
        logits: Tensor = self.out(features)
        return logits.float()


def _token_skip(dim: int, width: int, strides: list[Zyx]) -> nn.Sequential:
    """Tokens up to the resolution of their level, coarsest step first. MONAI's block has one stride for all steps."""
    steps: list[nn.Module] = [nn.ConvTranspose3d(dim, width, strides[0], strides[0], bias=False)]
    for stride in strides[1:]:
        steps.append(nn.ConvTranspose3d(width, width, stride, stride, bias=False))
        steps.append(UnetResBlock(3, width, width, 3, 1, NORM))
    return nn.Sequential(*steps)
