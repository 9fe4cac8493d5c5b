"""An encoder whose tokens become one vector a crop, and a linear layer on it: classes and numbers of whole volumes.

B batch | C channels | Z Y X crop, voxels | L tokens of a crop | D numbers of a token | K outputs
"""

from typing import Literal

from torch import Tensor, nn

from mimscale.models.config import POOL_DIM
from mimscale.models.encoder import Encoder, tokens_and_grid
from mimscale.models.vit import init_linear


class AttentionPool(nn.Module):
    """A weighted mean of tokens: softmax over tokens of w . tanh(V token) (Ilse et al. 2018, arXiv:1802.04712, eq. 8).

    It begins as the plain mean, because w begins at zero.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.view = nn.Linear(dim, POOL_DIM)
        self.weigh = nn.Linear(POOL_DIM, 1, bias=False)
        init_linear(self.view)
        nn.init.zeros_(self.weigh.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, D] -> fp32 [B, D]."""
        shares = self.weigh(self.view(tokens).tanh()).float().softmax(dim=1)  # [B, L, 1]
        mean: Tensor = (shares * tokens.float()).sum(dim=1)
        return mean


class MeanPool(nn.Module):
    """The mean of tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, D] -> fp32 [B, D]."""
        return tokens.float().mean(dim=1)


class PooledPredictor(nn.Module):
    """Encoder of the whole crop, pooling, and one linear layer."""

    def __init__(self, encoder: Encoder, *, dim: int, outputs: int, pool: Literal["mean", "attention"]) -> None:
        """`dim` is that of the encoder's last tokens."""
        super().__init__()
        self.encoder = encoder
        self.pool = AttentionPool(dim) if pool == "attention" else MeanPool()
        self.head = nn.Linear(dim, outputs)
        init_linear(self.head)

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        return self.head.bias

    def forward(self, image: Tensor) -> Tensor:
        """Scores before softmax, and numbers in standard deviations: [B, C, Z, Y, X] -> fp32 [B, K]."""
        dtype = self.head.weight.dtype  # a model cast to bf16 is fed normalised fp32 crops
        tokens, _ = tokens_and_grid(self.encoder(image.to(dtype)), getattr(self.encoder, "grid", None))
        pooled = self.pool(tokens).to(dtype)
        scores: Tensor = self.head(pooled)
        return scores.float()
