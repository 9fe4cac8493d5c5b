"""Start a segmentation from how often each class occurs, instead of from equal shares.

Without it, the first steps of training only learn that most voxels are background.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RAREST = 1e-6  # a class that was never seen stays possible


@torch.no_grad()
def set_class_prior(bias: Tensor, shares: Sequence[float]) -> None:
    """Classes that exclude each other: bias [K] = log(share of the voxels), which softmax turns back into shares.

    Raises:
        ValueError: not one share a class, or a negative one, or none above zero.
    """
    _check(bias, shares)
    bias.copy_((torch.tensor(shares, dtype=torch.float64) / sum(shares)).clamp(min=RAREST).log())


@torch.no_grad()
def set_region_prior(bias: Tensor, shares: Sequence[float]) -> None:
    """Regions that may overlap: bias [K] = log(share / (1 - share)), which a sigmoid turns back into the share.

    Raises:
        ValueError: not one share a region, or one that is not between 0 and 1, or none above zero.
    """
    _check(bias, shares)
    if max(shares) > 1:
        raise ValueError(f"{list(shares)}: shares of voxels are at most 1")
    bias.copy_(torch.tensor(shares, dtype=torch.float64).clamp(RAREST, 1 - RAREST).logit())


def _check(bias: Tensor, shares: Sequence[float]) -> None:
    if len(shares) != len(bias) or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"{list(shares)}: expected {len(bias)} shares of voxels, none negative")
