"""What a network that learned nothing could say of hidden patches: the yardsticks of a masked autoencoder.

A broken masked autoencoder looks healthy: its loss falls while it learns the brightness of its crops, and stays there.
Only beside the error of predictors without any weights does a loss say whether something was learned.

B batch | C channels | Z Y X crop, voxels
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# How much a visible voxel counts for a hidden one: Gaussians of its distance, the widths in patches, the narrow one far
# above the wide one. The constant leaves no voxel without an answer.
SCALES = ((0.5, 1.0), (2.0, 1e-2))  # (deviation in patch edges, weight)
CONSTANT_WEIGHT = 1e-6


def mean_voxel(image: Tensor, shown: Tensor) -> Tensor:
    """The mean of the shown voxels of each sample and channel, everywhere; 0 where none is shown.

    Args:
        image: [B, C, Z, Y, X] float.
        shown: bool [B, 1, Z, Y, X].

    Returns:
        [B, C, Z, Y, X], a view of [B, C, 1, 1, 1].
    """
    voxels = (2, 3, 4)
    total = (image * shown).sum(voxels, keepdim=True)
    return (total / shown.sum(voxels, keepdim=True).clamp(min=1)).expand_as(image)


def interpolated(image: Tensor, shown: Tensor, patch_voxels: Sequence[int]) -> Tensor:
    """Each voxel as the weighted mean of all shown ones, near ones first; 0 where none is shown.

    Normalised convolution (Knutsson and Westin 1993, "Normalized and differential convolution", CVPR): the blurred
    shown voxels, divided by the blurred mask. Each axis is blurred by a dense matrix, so nothing is cut off.

    Args:
        image: [B, C, Z, Y, X] float.
        shown: bool [B, 1, Z, Y, X].
        patch_voxels: Z, Y, X edges of a patch, the unit of the Gaussians.
    """
    voxels = (2, 3, 4)
    both = torch.cat([image.float() * shown, shown.float()], dim=1)  # blurred together: [B, C + 1, Z, Y, X]
    blurred = CONSTANT_WEIGHT * both.sum(voxels, keepdim=True).expand_as(both)
    for patches, weight in SCALES:
        blurred = blurred + weight * _blurred(both, [patches * edge for edge in patch_voxels])
    return blurred[:, :-1] / blurred[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)


def _blurred(volume: Tensor, deviation_voxels: Sequence[float]) -> Tensor:
    for axis, deviation in enumerate(deviation_voxels, start=2):
        place = torch.arange(volume.shape[axis], device=volume.device, dtype=torch.float32)
        distance = (place[:, None] - place[None]) / deviation
        gaussian = torch.exp(-distance.square() / 2)  # 1 at distance 0; the division takes out the scale
        volume = torch.movedim(torch.movedim(volume, axis, -1) @ gaussian, -1, axis)
    return volume


def effective_rank(gram: Tensor) -> float:
    """RankMe of features Z [N, D]: how many directions they use; 1 when they have collapsed to one.

    exp of the entropy of the singular values of Z, each divided by their sum (Garrido et al. 2023, arXiv:2210.02885,
    eq. 1-2; effective rank of Roy and Vetterli 2007). Not centred, as there: features that are all alike have rank 1.

    Args:
        gram: Z^T Z [D, D] float64; sums over parts of Z add up.

    Returns:
        Between 1 and D; 0 when there are no features, or all are 0; NaN when one is not finite.
    """
    if not bool(gram.isfinite().all()):
        return math.nan
    singular = torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    share = singular / total
    return float(torch.exp(torch.special.entr(share).sum()))
