"""Hidden voxels as a training target, and as pictures: what MAE and SimMIM share.

B batch | C channels | Z Y X crop, voxels | L patches a crop | K tokens | M patches that the loss covers
V voxels a patch | P numbers a patch = V * C, channel fastest | D embedding
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mimscale.models.config import TargetConfig, patch_grid
from mimscale.models.patches import chosen_indices, hidden_voxels, patchify, put, take, unpatchify
from mimscale.stream.device import to_device

# Patches of air have almost no variance: without a floor their noise would become as large as anatomy. This one is a
# deviation of 0.01: a hundredth of a CT window, or of the deviation of a z-scored MR.
VARIANCE_FLOOR = 1e-4


class ReconstructionOutput(NamedTuple):  # a tuple: ZeRO-3 looks for tensors in no other class
    """What a step of pretraining needs, and what a report may show."""

    loss: Tensor  # [] fp32, the mean of sample_loss
    sample_loss: Tensor  # [B] fp32, the mean over the voxels of a sample that count; 0 where none does
    answers: Tensor  # [B, M, P], what was predicted, in units of the target
    places: Tensor | None  # [B, M], the patches that it was predicted for; None: all, M = L
    tokens: Tensor  # [B, K, D], the encoder's answer
    mean_voxel_loss: Tensor  # [] fp32, what the loss would be if each hidden voxel were the mean of the visible ones
    num_patches: int  # L

    @property
    def prediction(self) -> Tensor:
        """[B, L, P], in units of the target; 0 where nothing was predicted."""
        return put(self.answers, self.places, self.num_patches)


@dataclass(frozen=True)
class Reconstruction:
    """Pictures of one batch, each [B, C, Z, Y, X] fp32."""

    visible: Tensor  # what the encoder saw; hidden voxels are 0
    predicted: Tensor  # what the model says everywhere, in the image's units
    combined: Tensor  # visible voxels from the image, hidden ones predicted
    hidden: Tensor  # bool [B, 1, Z, Y, X]: the voxels that were hidden


@runtime_checkable
class Reconstructor(Protocol):
    """A network that predicts hidden voxels. Called with image, hidden, valid and, where only a part of the hidden
    patches counts, predicted, it answers with a `ReconstructionOutput`.
    """

    grid: Sequence[int]  # patches along Z, Y, X of a crop

    def __call__(self, *inputs: Any) -> Any:
        """The step of training."""

    def reconstruct(self, image: Tensor, hidden: Tensor) -> Reconstruction:
        """Pictures of [B, C, Z, Y, X] with the patches `hidden` [B, L] hidden."""


def reconstruction_output(
    answers: Tensor,
    places: Tensor | None,
    visible: Tensor,
    tokens: Tensor,
    image: Tensor,
    valid: Tensor | None,
    config: TargetConfig,
    patch_voxels: Sequence[int],
) -> ReconstructionOutput:
    """Measure the error of a prediction, and beside it that of the mean of the visible voxels.

    Args:
        answers: [B, M, P], in units of the target, for the patches that the loss covers.
        places: [B, M], which patches these are, on the image's device as all that follow; None for all.
        visible: [B, K], the patches that are not hidden.
        tokens: [B, K, D], what the encoder says.
        image: [B, C, Z, Y, X], normalised.
        valid: bool [B, 1, Z, Y, X], voxels that count; None for all.
        config: target and error.
        patch_voxels: edges of a patch.
    """
    channels = image.shape[1]
    patches = patchify(image, patch_voxels)  # [B, L, P]
    voxels = None if valid is None else patchify(valid, patch_voxels)  # bool [B, L, V]
    mean = _mean_shown(take(patches, visible), None if voxels is None else take(voxels, visible), channels)
    target = take(patches, places).float()
    num_patches = patches.shape[1]
    del patches  # as large as the batch
    if voxels is None:
        weight = torch.ones_like(target, dtype=torch.bool)
    else:
        weight = take(voxels, places).repeat_interleave(channels, dim=2)  # [B, M, P]
    target = _as_target(target, config)
    sample_loss = sample_error(answers.float(), target, weight, config)
    with torch.no_grad():
        guess = _as_target(mean[:, None], config)  # [B, 1, P]: the same for every patch
        mean_voxel_loss = sample_error(guess, target, weight, config).mean()
    return ReconstructionOutput(
        loss=sample_loss.mean(),
        sample_loss=sample_loss,
        answers=answers,
        places=places,
        tokens=tokens,
        mean_voxel_loss=mean_voxel_loss,
        num_patches=num_patches,
    )


@torch.no_grad()
def _mean_shown(shown: Tensor, counted: Tensor | None, channels: int) -> Tensor:
    """A patch of the mean of the visible voxels of each channel, as `trivial.mean_voxel` has it: [B, P] fp32.

    Args:
        shown: [B, K, P].
        counted: bool [B, K, V], or None for all.
        channels: C.
    """
    B, K, P = shown.shape
    by_voxel = shown.float().reshape(B, K * (P // channels), channels)
    if counted is None:
        mean = by_voxel.mean(dim=1)
    else:
        among = counted.reshape(B, -1, 1)
        mean = (by_voxel * among).sum(dim=1) / among.sum(dim=1).clamp(min=1)
    return mean.repeat(1, P // channels)


def patch_target(image: Tensor, config: TargetConfig, patch_voxels: Sequence[int]) -> Tensor:
    """What is to be said of an image: [B, C, Z, Y, X] -> fp32 [B, L, P], patch-normalised where the config says so."""
    return _as_target(patchify(image, patch_voxels).float(), config)


def _as_target(patches: Tensor, config: TargetConfig) -> Tensor:
    """Patches as they are to be said, [B, L, P] fp32."""
    if config.target == "raw":
        return patches
    mean, deviation = _patch_statistics(patches)
    return (patches - mean) / deviation


def counted_numbers(voxels: Tensor, counted: Tensor, patch_voxels: Sequence[int]) -> Tensor:
    """1 for each number that counts: voxels bool [B, C, Z, Y, X] and patches bool [B, L] -> fp32 [B, L, P]."""
    return (patchify(voxels, patch_voxels) & counted[:, :, None]).float()


def sample_error(prediction: Tensor, target: Tensor, weight: Tensor, config: TargetConfig) -> Tensor:
    """Mean error of each sample over the numbers that count; 0 where none does: three of [B, L, P] -> [B].

    The prediction may be one patch for all, [B, 1, P], and the weight bool. The mean of each sample first: cutting a
    global batch into other micro-batches changes nothing.
    """
    error = prediction - target
    error = error.abs() if config.loss == "l1" else error.square()
    return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)


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


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored deviation of each patch: [B, L, P] -> two of [B, L, 1]."""
    mean = patches.mean(dim=2, keepdim=True)
    variance = patches.var(dim=2, keepdim=True, correction=0)
    return mean, (variance + VARIANCE_FLOOR).sqrt()


class MaskedModel(nn.Module):
    """A network that is shown the whole crop and says what stands in hidden voxels: base of all but MAE's.

    A method gives it an `encoder` and says in `predict` how hidden patches look to it, and what it makes of them.
    """

    def __init__(self, config: TargetConfig, crop_voxels: Sequence[int], patch_voxels: Sequence[int]) -> None:
        """Raises ValueError when the crop does not divide into patches."""
        super().__init__()
        self.config = config
        self.patch_voxels = tuple(patch_voxels)
        self.grid = patch_grid(crop_voxels, patch_voxels)

    @abstractmethod
    def predict(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels of all patches, and what the encoder says: [B, L, P] in units of the target, and [B, K, D].

        Args:
            image: [B, C, Z, Y, X], normalised, in the type of the weights. Hidden voxels are in it: hide them.
            hidden: bool [B, L].
        """

    def answer(self, image: Tensor, hidden: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `predict` says of the patches at `places` [B, M], None for all: [B, M, P]; and [B, K, D].

        For networks that can save what the others would cost.
        """
        prediction, tokens = self.predict(image, hidden)
        return take(prediction, places), tokens

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
        visible = to_device(chosen_indices(~hidden), image.device)  # [B, K]
        places = None  # all
        if self.config.loss_on == "masked" or predicted is not None:
            counted = chosen_indices(counted_patches(hidden, predicted, self.config))
            places = to_device(counted, image.device)  # [B, M]
        answers, tokens = self.answer(self._as_weights(image), to_device(hidden, image.device), places)
        return reconstruction_output(answers, places, visible, tokens, image, valid, self.config, self.patch_voxels)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, hidden: Tensor) -> Reconstruction:
        """Pictures of what was shown and what was predicted, in the image's units."""
        hidden = hidden.to(image.device)
        prediction, _ = self.answer(self._as_weights(image), hidden, None)
        return reconstruction_pictures(prediction, image, hidden, self.config, self.patch_voxels, self.grid)

    def _as_weights(self, image: Tensor) -> Tensor:
        return image.to(next(self.parameters()).dtype)
