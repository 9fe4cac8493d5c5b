"""UperNet on a Swin transformer (Xiao et al. 2018, arXiv:1807.10221, sec. 3.1): pooled context, then a feature pyramid.

B batch | C channels | Z Y X crop, voxels | F features of a state | W width of the pyramid | K outputs
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.models.averages import averaged
from mimscale.models.config import POOLED_EDGES, SwinConfig, UnetrConfig, UpernetConfig
from mimscale.models.swin import Swin


def _conv(inputs: int, outputs: int, edge: int) -> nn.Sequential:
    """Convolution, norm, bend."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, edge, padding=edge // 2, bias=False),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.ReLU(inplace=True),
    )


class Upernet(nn.Module):
    """Encoder, context of its coarsest state, sums down to the finest one, and interpolation to voxels."""

    def __init__(
        self,
        swin: SwinConfig,
        unetr: UnetrConfig,
        upernet: UpernetConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Takes the number of outputs from `unetr`. Raises ValueError when the crop does not divide by the stages."""
        super().__init__()
        self.encoder = Swin(swin, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        widths, width = [swin.dim * 2**stage for stage in range(swin.layers + 1)], upernet.width
        # Without a norm: an average of one voxel has no deviation.
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.Conv3d(widths[-1], width, 1), nn.ReLU(inplace=True)) for _ in POOLED_EDGES
        )
        self.context = _conv(widths[-1] + len(POOLED_EDGES) * width, width, 3)
        self.laterals = nn.ModuleList(_conv(count, width, 1) for count in widths[:-1])
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in widths[:-1])
        self.fuse = _conv(len(widths) * width, width, 3)
        self.out = nn.Conv3d(width, unetr.num_classes, 1)

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        assert self.out.bias is not None
        return self.out.bias

    def forward(self, image: Tensor) -> Tensor:
        """Scores before softmax or sigmoid: [B, C, Z, Y, X] -> fp32 [B, K, Z, Y, X]."""
        *finer, coarsest = self.encoder(image)
        pooled = [
            _resized(conv(averaged(coarsest, (edge, edge, edge))), coarsest.shape[2:])
            for conv, edge in zip(self.pooled, POOLED_EDGES, strict=True)
        ]
        features = self.context(torch.cat([coarsest, *pooled], dim=1))  # [B, W, ...]
        levels = [features]
        for state, lateral, smooth in zip(reversed(finer), reversed(self.laterals), reversed(self.smooth), strict=True):
            features = lateral(state) + _resized(features, state.shape[2:])
            levels.append(smooth(features))
        finest = features.shape[2:]
        logits = self.out(self.fuse(torch.cat([_resized(level, finest) for level in levels], dim=1)))
        return _resized(logits.float(), image.shape[2:])


def _resized(features: Tensor, edges: Sequence[int]) -> Tensor:
    return F.interpolate(features, size=tuple(edges), mode="trilinear", align_corners=False)
