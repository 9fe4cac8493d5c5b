"""3D masked autoencoder (He et al. 2022, arXiv:2111.06377; in 3D Chen et al. 2022, arXiv:2204.11716).

B batch | C channels | Z Y X crop, voxels | L patches a crop | K visible patches | P numbers a patch
D embedding of the encoder | E embedding of the decoder
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimscale.models.config import MaeConfig, VitConfig
from mimscale.models.patches import hidden_voxels, patchify, unpatchify
from mimscale.models.positions import add_positions, sincos_table
from mimscale.models.trivial import mean_voxel
from mimscale.models.vit import Block, Vit, init_linear

# Patches of air have almost no variance: without a floor their noise would become as large as anatomy. This one is a
# deviation of 0.01: a hundredth of a CT window, or of the deviation of a z-scored MR.
VARIANCE_FLOOR = 1e-4


@dataclass(frozen=True)
class MaeOutput:
    """What a step of pretraining needs, and what a report may show."""

    loss: Tensor  # [] fp32, the mean of sample_loss
    sample_loss: Tensor  # [B] fp32, the mean over the voxels of a sample that count; 0 where none does
    prediction: Tensor  # [B, L, P], in units of the target
    tokens: Tensor  # [B, K, D], the encoder's answer
    mean_voxel_loss: Tensor  # [] fp32, what the loss would be if each hidden voxel were the mean of the visible ones


@dataclass(frozen=True)
class Reconstruction:
    """Pictures of one batch, each [B, C, Z, Y, X] fp32."""

    visible: Tensor  # what the encoder saw; hidden voxels are 0
    predicted: Tensor  # what the decoder says everywhere, in the image's units
    combined: Tensor  # visible voxels from the image, hidden ones predicted
    hidden: Tensor  # bool [B, 1, Z, Y, X]: the voxels that were hidden


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
        self.decoder_blocks = nn.ModuleList(Block(mae.decoder_dim, mae.decoder_heads) for _ in range(mae.decoder_depth))
        self.decoder_norm = nn.LayerNorm(mae.decoder_dim)
        self.head = nn.Linear(mae.decoder_dim, numbers_a_patch)
        for part in (self.decoder_input, self.decoder_blocks, self.head):
            part.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)  # small beside the positions, which must speak

    def forward(self, image: Tensor, hidden: Tensor, valid: Tensor | None = None) -> MaeOutput:
        """Predict the hidden patches and measure the error.

        Args:
            image: [B, C, Z, Y, X], normalised; any float type, the loss is computed in fp32.
            hidden: bool [B, L], as many True in each row. Leave it on the CPU: its count is read there, and the device
                need not be waited for.
            valid: bool [B, 1, Z, Y, X] or None for all. Voxels that are not valid (padding, excluded regions) are no
                target; the encoder sees them where they are visible.

        Raises:
            ValueError: rows of `hidden` with different counts, or none hidden, or all hidden.
        """
        visible = visible_indices(hidden).to(image.device, non_blocking=True)  # [B, K]
        prediction, tokens = self._predict(image, visible)  # [B, L, P], [B, K, D]
        hidden = hidden.to(image.device, non_blocking=True)
        valid = torch.ones_like(image[:, :1], dtype=torch.bool) if valid is None else valid
        weight = counted_numbers(self.config, valid.expand_as(image), hidden, self.patch_voxels)
        target = patch_target(self.config, image, self.patch_voxels)
        sample_loss = sample_error(self.config, prediction.float(), target, weight)
        with torch.no_grad():  # one pass over the voxels, beside a network's hundreds
            guess = mean_voxel(image.float(), valid & ~hidden_voxels(hidden, self.patch_voxels, self.grid))
            guess = patch_target(self.config, guess, self.patch_voxels)
            mean_voxel_loss = sample_error(self.config, guess, target, weight).mean()
        return MaeOutput(
            loss=sample_loss.mean(),
            sample_loss=sample_loss,
            prediction=prediction,
            tokens=tokens,
            mean_voxel_loss=mean_voxel_loss,
        )

    @torch.no_grad()
    def reconstruct(self, image: Tensor, hidden: Tensor) -> Reconstruction:
        """Pictures of what was shown and what was predicted, in the image's units.

        With a patch-normalised target the mean and deviation of each patch come from the image itself: the model
        predicts only the form.
        """
        visible = visible_indices(hidden).to(image.device)
        prediction = self._predict(image, visible)[0].float()
        if self.config.target == "patch_normalised":
            mean, deviation = _patch_statistics(patchify(image, self.patch_voxels).float())
            prediction = prediction * deviation + mean
        predicted = unpatchify(prediction, self.patch_voxels, self.grid)
        hidden_mask = hidden_voxels(hidden.to(image.device), self.patch_voxels, self.grid)
        image = image.float()
        return Reconstruction(
            visible=image.masked_fill(hidden_mask, 0),
            predicted=predicted,
            combined=torch.where(hidden_mask, predicted, image),
            hidden=hidden_mask,
        )

    def _predict(self, image: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder says of all patches [B, L, P], and the encoder's tokens of the visible ones [B, K, D]."""
        tokens, _ = self.encoder(image, visible)
        shown = self.decoder_input(tokens)  # [B, K, E]
        B, _, E = shown.shape
        full = self.mask_token.to(shown.dtype).expand(B, math.prod(self.grid), E)
        full = full.scatter(1, visible[:, :, None].expand(-1, -1, E), shown)  # [B, L, E]
        full = add_positions(full, self.decoder_positions)
        for block in self.decoder_blocks:
            full = block(full)
        prediction: Tensor = self.head(self.decoder_norm(full))
        return prediction, tokens


def patch_target(config: MaeConfig, image: Tensor, patch_voxels: Sequence[int]) -> Tensor:
    """What is to be said of an image: [B, C, Z, Y, X] -> fp32 [B, L, P], patch-normalised where the config says so."""
    patches = patchify(image, patch_voxels).float()
    if config.target == "raw":
        return patches
    mean, deviation = _patch_statistics(patches)
    return (patches - mean) / deviation


def counted_numbers(config: MaeConfig, voxels: Tensor, hidden: Tensor, patch_voxels: Sequence[int]) -> Tensor:
    """1 for each number of each patch that counts: bool [B, C, Z, Y, X] and hidden [B, L] -> fp32 [B, L, P]."""
    counted = patchify(voxels, patch_voxels)
    if config.loss_on == "masked":
        counted = counted & hidden[:, :, None]
    return counted.float()


def sample_error(config: MaeConfig, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean error of each sample over the numbers that count; 0 where none does: three of [B, L, P] -> [B].

    The mean of each sample first: cutting a global batch into other micro-batches changes nothing.
    """
    error = prediction - target
    error = error.abs() if config.loss == "l1" else error.square()
    return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)


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
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)  # visible patches first, in the order of the grid
    return order[:, : hidden.shape[1] - counts[0]]


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored deviation of each patch: [B, L, P] -> two of [B, L, 1]."""
    mean = patches.mean(dim=2, keepdim=True)
    variance = patches.var(dim=2, keepdim=True, correction=0)
    return mean, (variance + VARIANCE_FLOOR).sqrt()
