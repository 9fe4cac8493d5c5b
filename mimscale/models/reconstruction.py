"""Hidden voxels as a training target, and as pictures: what MAE and SimMIM share.

B batch | C channels | Z Y X crop, voxels | L patches a crop | P numbers a patch
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimscale.models.config import TargetConfig
from mimscale.models.patches import hidden_voxels, patchify, unpatchify

# Patches of air have almost no variance: without a floor their noise would become as large as anatomy. This one is a
# deviation of 0.01: a hundredth of a CT window, or of the deviation of a z-scored MR.
VARIANCE_FLOOR = 1e-4


@dataclass(frozen=True)
class ReconstructionOutput:
    """What a step of pretraining needs, and what a report may show."""

    loss: Tensor  # [] fp32, the mean of sample_loss
    sample_loss: Tensor  # [B] fp32, the mean over the voxels of a sample that count; 0 where none does
    prediction: Tensor  # [B, L, P], in units of the target; 0 where nothing was predicted


@dataclass(frozen=True)
class Reconstruction:
    """Pictures of one batch, each [B, C, Z, Y, X] fp32."""

    visible: Tensor  # what the encoder saw; hidden voxels are 0
    predicted: Tensor  # what the model says everywhere, in the image's units
    combined: Tensor  # visible voxels from the image, hidden ones predicted
    hidden: Tensor  # bool [B, 1, Z, Y, X]: the voxels that were hidden


def reconstruction_output(
    prediction: Tensor,
    image: Tensor,
    counted: Tensor,
    valid: Tensor | None,
    config: TargetConfig,
    patch_voxels: Sequence[int],
) -> ReconstructionOutput:
    """Measure the error of a prediction.

    Args:
        prediction: [B, L, P], in units of the target.
        image: [B, C, Z, Y, X], normalised.
        counted: bool [B, L], patches that count.
        valid: bool [B, 1, Z, Y, X], voxels that count; None for all.
        config: target and error.
        patch_voxels: edges of a patch.
    """
    target = _target(patchify(image, patch_voxels).float(), config)
    voxels = torch.ones_like(image[:, :1], dtype=torch.bool) if valid is None else valid
    weight = (patchify(voxels.expand_as(image), patch_voxels) & counted[:, :, None]).float()  # [B, L, P]
    error = prediction.float() - target
    error = error.abs() if config.loss == "l1" else error.square()
    # The mean of each sample first: cutting a global batch into other micro-batches changes nothing.
    sample_loss = (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)
    return ReconstructionOutput(loss=sample_loss.mean(), sample_loss=sample_loss, prediction=prediction)


def reconstruction_pictures(
    prediction: Tensor,
    image: Tensor,
    hidden: Tensor,
    config: TargetConfig,
    patch_voxels: Sequence[int],
    grid: Sequence[int],
) -> Reconstruction:
    """Pictures of what was shown and what was predicted, in the image's units.

    With a patch-normalised target the mean and deviation of each patch come from the image itself: the model predicts
    only the form.
    """
    prediction = prediction.float()
    if config.target == "patch_normalised":
        mean, deviation = _patch_statistics(patchify(image, patch_voxels).float())
        prediction = prediction * deviation + mean
    predicted = unpatchify(prediction, patch_voxels, grid)
    hidden_mask = hidden_voxels(hidden, patch_voxels, grid)
    image = image.float()
    return Reconstruction(
        visible=image.masked_fill(hidden_mask, 0),
        predicted=predicted,
        combined=torch.where(hidden_mask, predicted, image),
        hidden=hidden_mask,
    )


def counted_patches(hidden: Tensor, predicted: Tensor | None, config: TargetConfig) -> Tensor:
    """Patches that the loss covers: bool [B, L], from those that are hidden and the part of them that is predicted."""
    answered = hidden if predicted is None else predicted
    return answered if config.loss_on == "masked" else answered | ~hidden


def _target(patches: Tensor, config: TargetConfig) -> Tensor:
    if config.target == "raw":
        return patches
    mean, deviation = _patch_statistics(patches)
    return (patches - mean) / deviation


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored deviation of each patch: [B, L, P] -> two of [B, L, 1]."""
    mean = patches.mean(dim=2, keepdim=True)
    variance = patches.var(dim=2, keepdim=True, correction=0)
    return mean, (variance + VARIANCE_FLOOR).sqrt()
