"""3D masked autoencoder (He et al. 2022, arXiv:2111.06377; in 3D Chen et al. 2022, arXiv:2204.11716).

B batch | C channels | Z Y X crop, voxels | L patches a crop | P numbers a patch
K visible patches | N patches that the decoder works on | M patches that the loss covers
D embedding of the encoder | E embedding of the decoder
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.models.config import MaeConfig, VitConfig
from mimscale.models.patches import chosen_indices, take
from mimscale.models.positions import add_positions, sincos_table
from mimscale.models.reconstruction import (
    Reconstruction,
    ReconstructionOutput,
    counted_patches,
    reconstruction_output,
    reconstruction_pictures,
)
from mimscale.models.vit import Block, Vit, init_linear
from mimscale.stream.device import to_device


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, light decoder of all, linear head to voxels."""

    decoder_positions: Tensor

    def __init__(
        self,
        vit: VitConfig,
        mae: MaeConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide into patches."""
        super().__init__()
        self.config = mae
        self.patch_voxels = tuple(patch_voxels)
        self.channels = channels
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        self.grid = self.encoder.grid
        numbers_a_patch = self.encoder.projection.in_features
        self.decoder_input = nn.Linear(vit.dim, mae.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(mae.decoder_dim))
        # The decoder's own: mask tokens are all alike, so only a position tells them what to draw.
        self.register_buffer("decoder_positions", sincos_table(self.grid, mae.decoder_dim), persistent=False)
        decoder = VitConfig(dim=mae.decoder_dim, heads=mae.decoder_heads)
        self.decoder_blocks = nn.ModuleList(Block(decoder) for _ in range(mae.decoder_depth))
        self.decoder_norm = nn.LayerNorm(mae.decoder_dim) if mae.decoder_depth else nn.Identity()
        self.head = nn.Linear(mae.decoder_dim, numbers_a_patch)
        for part in (self.decoder_input, self.decoder_blocks, self.head):
            part.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)  # small beside the positions, which must speak

    def forward(
        self, image: Tensor, hidden: Tensor, valid: Tensor | None = None, predicted: Tensor | None = None
    ) -> ReconstructionOutput:
        """Predict the hidden patches and measure the error.

        Args:
            image: [B, C, Z, Y, X], normalised; any float type, the loss is computed in fp32.
            hidden: bool [B, L], as many True in each row, on the CPU: its count is read, and the device need not be
                waited for.
            valid: bool [B, 1, Z, Y, X] or None for all. Voxels that are not valid (padding, excluded regions) are no
                target; the encoder sees them where they are visible.
            predicted: bool [B, L] on the CPU, as many True in each row, or None for all that are hidden. The decoder
                works on these and the visible patches alone.

        Raises:
            ValueError: rows of `hidden` with different counts, or none hidden, or all hidden.
        """
        device = image.device
        visible = to_device(visible_indices(hidden), device)  # [B, K]
        decoded = places = rows = None  # all of them
        if self.config.loss_on == "masked":
            answered = counted_patches(hidden, predicted, self.config)  # bool [B, L]
            places = rows = to_device(chosen_indices(answered), device)  # [B, M]
        if predicted is not None:
            among = chosen_indices(~hidden | predicted)  # [B, N]
            decoded = to_device(among, device)
            if rows is None:
                places = decoded
            else:
                rows = to_device(chosen_indices(answered.gather(1, among)), device)
        answers, tokens = self._predict(image, visible, decoded, rows)
        return reconstruction_output(answers, places, visible, tokens, image, valid, self.config, self.patch_voxels)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, hidden: Tensor) -> Reconstruction:
        """Pictures of what was shown and what was predicted, in the image's units."""
        prediction, _ = self._predict(image, visible_indices(hidden).to(image.device))
        hidden = hidden.to(image.device)
        return reconstruction_pictures(prediction, image, hidden, self.config, self.patch_voxels, self.grid)

    def _predict(
        self, image: Tensor, visible: Tensor, decoded: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Voxels of patches [B, M, P], and the encoder's tokens of the visible ones [B, K, D].

        Args:
            image: [B, C, Z, Y, X].
            visible: [B, K], indices of the patches that are not hidden.
            decoded: [B, N], indices of the patches that the decoder works on; None for all, N = L.
            rows: [B, M], whose voxels are wanted, counted among these; None for all, M = N.
        """
        tokens, _ = self.encoder(image, visible)
        shown = self.decoder_input(tokens)  # [B, K, E]
        B, _, E = shown.shape
        full = self.mask_token.to(shown.dtype).expand(B, math.prod(self.grid), E)
        full = full.scatter(1, visible[:, :, None].expand(-1, -1, E), shown)  # [B, L, E]
        full = add_positions(full, self.decoder_positions)
        if not self.decoder_blocks:
            full = full + self._carried(shown, visible)
        full = take(full, decoded)  # [B, N, E]
        if not self.decoder_blocks:
            full = take(full, rows)
        for number, block in enumerate(self.decoder_blocks, start=1):
            full = block(full, None, rows if number == len(self.decoder_blocks) else None)
        prediction: Tensor = self.head(self.decoder_norm(full))
        return prediction, tokens

    def _carried(self, shown: Tensor, visible: Tensor) -> Tensor:
        """What a decoder without blocks knows of the visible patches: [B, K, E] -> [B, L, E].

        Nothing would bring the image to a hidden patch, and no gradient to the encoder. So one attention does whose
        weights follow from the positions alone: the prediction stays linear in what the encoder says.
        """
        places = self.decoder_positions.flatten(0, 2).to(shown.dtype)  # [L, E]
        query = places.expand(shown.shape[0], -1, -1)
        return F.scaled_dot_product_attention(query, places[visible], shown)


def visible_indices(hidden: Tensor) -> Tensor:
    """Indices of the visible patches in ascending order: bool [B, L] -> int64 [B, K].

    Raises:
        ValueError: rows with different counts, or none hidden, or all hidden.
    """
    counts = hidden.sum(dim=1).tolist()
    if len(set(counts)) != 1 or not 0 < counts[0] < hidden.shape[1]:
        raise ValueError(
            f"each sample must hide the same number of its {hidden.shape[1]} patches, some, not all: {counts}"
        )
    return chosen_indices(~hidden)
