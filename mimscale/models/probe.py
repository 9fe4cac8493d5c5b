"""A linear probe: what a frozen encoder's tokens say about classes without any help.

B batch | C channels | Z Y X crop, voxels | D embedding | K outputs
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.patches import tokens_to_grid
from mimscale.models.vit import Vit, init_linear


class LinearProbe(nn.Module):
    """Encoder of the whole crop, one linear layer on each token, and interpolation to voxels."""

    def __init__(
        self,
        vit: VitConfig,
        unetr: UnetrConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Takes the number of outputs from `unetr`. Raises ValueError when the crop does not divide into patches."""
        super().__init__()
        self.crop_voxels = tuple(crop_voxels)
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        self.head = nn.Linear(vit.dim, unetr.num_classes)
        init_linear(self.head)

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        return self.head.bias

    def forward(self, image: Tensor) -> Tensor:
        """Scores before softmax or sigmoid: [B, C, Z, Y, X] -> fp32 [B, K, Z, Y, X]."""
        tokens, _ = self.encoder(image)
        scores = tokens_to_grid(self.head(tokens).float(), self.encoder.grid)  # [B, K, z, y, x]
        return F.interpolate(scores, size=self.crop_voxels, mode="trilinear", align_corners=False)
