"""SimCLR with a plain ViT (Chen et al. 2020, arXiv:2002.05709): the contrastive baseline of arXiv 2204.11716.

B batch | C channels | Z Y X crop, voxels | D embedding of the encoder | E numbers of an embedding
N anchors of this rank | M keys of all ranks
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.models.config import SimclrConfig, VitConfig
from mimscale.models.vit import Vit, init_linear


class Simclr(nn.Module):
    """Encoder of the whole crop, mean of its tokens, and a projection onto the unit sphere."""

    def __init__(
        self,
        vit: VitConfig,
        simclr: SimclrConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide into patches."""
        super().__init__()
        self.config = simclr
        self.encoder = Vit(vit, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        self.projection = nn.Sequential(
            nn.Linear(vit.dim, simclr.hidden_dim), nn.GELU(), nn.Linear(simclr.hidden_dim, simclr.projection_dim)
        )
        self.projection.apply(init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, Z, Y, X] -> [B, E] fp32, each of length 1."""
        tokens, _ = self.encoder(image)
        return F.normalize(self.projection(tokens.mean(dim=1)).float(), dim=1)


def contrastive_loss(
    anchors: Tensor,
    keys: Tensor,
    partners: Tensor,
    anchor_subjects: Tensor,
    key_subjects: Tensor,
    temperature: float,
) -> Tensor:
    """NT-Xent (arXiv:2002.05709, eq. 1): each anchor is to find its partner among the keys of other subjects.

    Two crops of one subject may show the same place, so they are no negatives of each other, and neither is the anchor
    itself.

    Args:
        anchors: [N, E], each of length 1.
        keys: [M, E], all views, the anchors among them.
        partners: int64 [N], the row of `keys` that holds the other view of the anchor's crop.
        anchor_subjects: int64 [N].
        key_subjects: int64 [M].
        temperature: by which cosines are divided.

    Returns:
        [] the mean over the anchors.
    """
    scores = anchors @ keys.T / temperature  # [N, M]
    left_out = anchor_subjects[:, None] == key_subjects[None]
    left_out = left_out.scatter(1, partners[:, None], False)
    return F.cross_entropy(scores.masked_fill(left_out, -torch.inf), partners)
