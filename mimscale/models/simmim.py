"""SimMIM with a plain ViT (Xie et al. 2022, arXiv:2111.09886; in 3D Chen et al. 2022, arXiv:2204.11716).

The encoder sees every patch, the hidden ones as a mask token, and a light head turns each token into voxels.

B batch | C channels | Z Y X crop, voxels | L patches a crop | K visible patches
M patches that the loss covers | P numbers a patch | D embedding
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mimscale.models.config import SimmimConfig, VitConfig
from mimscale.models.patches import take
from mimscale.models.reconstruction import MaskedModel
from mimscale.models.vit import Vit, init_linear


class Simmim(MaskedModel):
    """Encoder of all patches with mask tokens among them, and a head to voxels."""

    def __init__(
        self,
        vit: VitConfig,
        simmim: SimmimConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide into patches."""
        super().__init__(simmim, crop_voxels, patch_voxels)
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        # Not the encoder's: fine-tuning hides nothing.
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(vit.dim), std=0.02))
        to_voxels = nn.Linear(vit.dim, self.encoder.projection.in_features)
        self.head = (
            to_voxels if simmim.head == "linear" else nn.Sequential(nn.Linear(vit.dim, vit.dim), nn.GELU(), to_voxels)
        )
        self.head.apply(init_linear)

    def answer(self, image: Tensor, hidden: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """The head works on the patches at `places` alone; see `MaskedModel.answer`."""
        tokens, _ = self.encoder(image, masked=(hidden, self.mask_token))  # [B, L, D]
        prediction: Tensor = self.head(take(tokens, places))
        return prediction, tokens

    def predict(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels [B, L, P] and tokens [B, L, D]."""
        return self.answer(image, hidden, None)
