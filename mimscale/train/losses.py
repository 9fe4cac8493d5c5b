"""Losses of fine-tuning.

B batch | K classes, background included | Z Y X volume, voxels
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_CLASS = 255


def dice_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Soft Dice plus cross-entropy, equal parts, background included; computed in fp32.

    The Dice part is that of Milletari et al. 2016, arXiv:1606.04797, sec. 3, with plain (not squared) sums in the
    denominator, for each sample and class, then averaged.

    Args:
        logits: [B, K, Z, Y, X].
        label: [B, Z, Y, X], integer classes; 255 counts nowhere.

    Returns:
        [] the mean over samples.
    """
    logits = logits.float()
    label = label.long()
    counted = (label != IGNORED_CLASS).unsqueeze(1)  # [B, 1, Z, Y, X]
    target = F.one_hot(label.where(counted.squeeze(1), 0), logits.shape[1]).movedim(-1, 1) * counted
    probability = logits.softmax(dim=1) * counted
    voxels = (2, 3, 4)
    overlap = (probability * target).sum(voxels)  # [B, K]
    total = probability.sum(voxels) + target.sum(voxels)
    dice = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    # Mean over each sample's own voxels first, so that cutting a batch into micro-batches changes nothing.
    voxel_loss = F.cross_entropy(logits, label, ignore_index=IGNORED_CLASS, reduction="none")
    cross_entropy = voxel_loss.sum((1, 2, 3)) / counted.sum((1, 2, 3, 4)).clamp(min=1)
    return dice.mean() + cross_entropy.mean()


def dice_binary_cross_entropy(logits: Tensor, label: Tensor, classes_of_region: Tensor) -> Tensor:
    """Soft Dice plus binary cross-entropy, equal parts, for regions that may overlap; computed in fp32.

    Both parts are means over a sample's regions, so that the loss of more regions is not larger.

    Args:
        logits: [B, R, Z, Y, X], before the sigmoid.
        label: [B, Z, Y, X], integer classes; 255 counts nowhere.
        classes_of_region: bool [R, 256], the classes that belong to each region.

    Returns:
        [] the mean over samples.
    """
    logits = logits.float()
    target, counted = region_target(label, classes_of_region)
    probability = logits.sigmoid() * counted
    voxels = (2, 3, 4)
    overlap = (probability * target).sum(voxels)  # [B, R]
    total = probability.sum(voxels) + target.sum(voxels)
    dice = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    voxel_loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * counted
    cross_entropy = voxel_loss.sum(voxels) / counted.sum(voxels).clamp(min=1)
    return dice.mean() + cross_entropy.mean()


def deeply_supervised(criterion: Callable[[Tensor, Tensor], Tensor], scores: Sequence[Tensor], label: Tensor) -> Tensor:
    """The loss of scores at several resolutions, each counting half of the one before, as in nnU-Net.

    Args:
        criterion: of scores [B, K, ...] and a label [B, ...] of their resolution.
        scores: [B, K, Z, Y, X], then coarser ones.
        label: [B, Z, Y, X]; the coarser ones are met by its nearest voxels, so that classes stay what they are.
    """
    shares = [0.5**place for place in range(len(scores))]
    total = torch.zeros((), device=label.device)
    for share, one in zip(shares, scores, strict=True):
        coarse = label
        if one.shape[2:] != label.shape[1:]:
            coarse = F.interpolate(label[:, None].float(), size=one.shape[2:], mode="nearest")[:, 0].to(label.dtype)
        total = total + share / sum(shares) * criterion(one, coarse)
    return total


def region_target(label: Tensor, classes_of_region: Tensor) -> tuple[Tensor, Tensor]:
    """Which voxels lie in which region, and which count: [B, Z, Y, X] -> bool [B, R, Z, Y, X], bool [B, 1, Z, Y, X]."""
    counted = (label != IGNORED_CLASS)[:, None]
    return classes_of_region[:, label.long()].movedim(0, 1) & counted, counted


@torch.no_grad()
def region_overlap_counts(logits: Tensor, label: Tensor, classes_of_region: Tensor) -> tuple[Tensor, Tensor]:
    """As `overlap_counts`, for the voxels whose region has a probability above one half; [R] each, float64."""
    target, counted = region_target(label, classes_of_region)
    predicted = (logits > 0) & counted
    axes = (0, 2, 3, 4)
    return (predicted & target).sum(axes).double(), (predicted.sum(axes) + target.sum(axes)).double()


@torch.no_grad()
def overlap_counts(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """For Dice over many crops: voxels in both, and voxels in either, summed over the batch; [K] each, float64."""
    counted = label != IGNORED_CLASS
    predicted = logits.argmax(dim=1)
    both, either = [], []
    for class_index in range(logits.shape[1]):
        in_prediction = (predicted == class_index) & counted
        in_label = (label == class_index) & counted
        both.append((in_prediction & in_label).sum())
        either.append(in_prediction.sum() + in_label.sum())
    return torch.stack(both).double(), torch.stack(either).double()
