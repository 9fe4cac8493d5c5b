"""SimMIM with a plain ViT (Xie et al. 2022, arXiv:2111.09886; in 3D Chen et al. 2022, arXiv:2204.11716).

The encoder sees every patch, the hidden ones as a mask token, and a light head turns each token into voxels.

B batch | C channels | Z Y X crop, voxels | L patches a crop | K visible patches
M patches that the loss covers | P numbers a patch | D embedding
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mimscale.models.config import SimmimConfig, VitConfig
from mimscale.models.patches import chosen_indices, take
from mimscale.models.reconstruction import (
    Reconstruction,
    ReconstructionOutput,
    counted_patches,
    reconstruction_output,
    reconstruction_pictures,
)
from mimscale.models.vit import Vit, init_linear


class Simmim(nn.Module):
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
        super().__init__()
        self.config = simmim
        self.patch_voxels = tuple(patch_voxels)
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        self.grid = self.encoder.grid
        # Not the encoder's: fine-tuning hides nothing.
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(vit.dim), std=0.02))
        to_voxels = nn.Linear(vit.dim, self.encoder.projection.in_features)
        self.head = (
            to_voxels if simmim.head == "linear" else nn.Sequential(nn.Linear(vit.dim, vit.dim), nn.GELU(), to_voxels)
        )
        self.head.apply(init_linear)

    def forward(
        self, image: Tensor, hidden: Tensor, valid: Tensor | None = None, predicted: Tensor | None = None
    ) -> ReconstructionOutput:
        """Predict the hidden patches and measure the error.

        Args:
            image: [B, C, Z, Y, X], normalised; any float type, the loss is computed in fp32.
            hidden: bool [B, L], as many True in each row, on the CPU.
            valid: bool [B, 1, Z, Y, X] or None for all; voxels that are not valid are no target.
            predicted: bool [B, L] on the CPU, the hidden patches that count; None for all of them.
        """
        visible = chosen_indices(~hidden).to(image.device, non_blocking=True)  # [B, K]
        places = None  # all
        if self.config.loss_on == "masked" or predicted is not None:
            counted = chosen_indices(counted_patches(hidden, predicted, self.config))
            places = counted.to(image.device, non_blocking=True)  # [B, M]
        answers, tokens = self._predict(image, hidden.to(image.device, non_blocking=True), places)
        return reconstruction_output(answers, places, visible, tokens, image, valid, self.config, self.patch_voxels)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, hidden: Tensor) -> Reconstruction:
        """Pictures of what was shown and what was predicted, in the image's units."""
        hidden = hidden.to(image.device)
        prediction, _ = self._predict(image, hidden)
        return reconstruction_pictures(prediction, image, hidden, self.config, self.patch_voxels, self.grid)

    def _predict(self, image: Tensor, hidden: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Voxels [B, M, P] of the patches at `places` [B, M], None for all; and tokens [B, L, D]."""
        tokens, _ = self.encoder(image, masked=(hidden, self.mask_token))
        prediction: Tensor = self.head(take(tokens, places))
        return prediction, tokens
