"""Means of boxes, with a gradient that is the same in every run on a GPU where nothing else is allowed.

torch has no deterministic kernel for that gradient, and raises under `torch.use_deterministic_algorithms`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def averaged(features: Tensor, edges: tuple[int, int, int]) -> Tensor:
    """Means of boxes that cover the grid, each a voxel of a coarser one: [B, C, Z, Y, X] -> [B, C, *edges]."""
    return _by_axis(features, edges) if _only_deterministic() else F.adaptive_avg_pool3d(features, edges)


class BoxMean(nn.AvgPool3d):
    """Means of boxes as large as the stride, which divides the grid."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, Z, Y, X] -> [B, C, ...], coarser by the stride."""
        if not _only_deterministic():
            return super().forward(features)
        assert isinstance(self.stride, tuple)
        return _by_axis(
            features, [edge // stride for edge, stride in zip(features.shape[2:], self.stride, strict=True)]
        )


def _only_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _by_axis(features: Tensor, edges: Sequence[int]) -> Tensor:
    """One product an axis, with what each voxel gives to each mean."""
    for axis, edge in enumerate(edges, start=2):
        with torch.no_grad():
            voxels = torch.eye(features.shape[axis], device=features.device)
            shares = F.adaptive_avg_pool1d(voxels[None], edge)[0].to(features.dtype)  # [voxels, means]
        features = torch.movedim(torch.movedim(features, axis, -1) @ shares, -1, axis)
    return features
