"""A 3D vision transformer that can be shown some patches only.

B batch | C channels | Z Y X volume, voxels | L patches a volume | K patches that are shown (all: K = L)
M of these whose answer is wanted
P numbers a patch | D embedding | H numbers of one head
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mimscale.models.config import VitConfig, patch_grid
from mimscale.models.encoder import Encoder, spread_channel
from mimscale.models.patches import patchify, take
from mimscale.models.positions import add_positions, angles, grid_coordinates, resize_table, rotate, sincos_table


class PatchProjection(nn.Linear):
    """A linear layer that takes images of any float type: a model cast to bf16 is fed normalised fp32 crops."""

    def forward(self, patches: Tensor) -> Tensor:
        """[B, K, P] -> [B, K, D], in the type of the weights."""
        return super().forward(patches.to(self.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, turns: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """[B, K, D] -> [B, K, D], or [B, M, D] where only the answers at `rows` [B, M] are wanted.

        `turns` [B or 1, K, H // 2] are the angles of rotary positions.
        """
        B, K, D = tokens.shape
        qkv = self.qkv(tokens).reshape(B, K, 3, self.heads, D // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, K, H]
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        if rows is not None:
            query = query.gather(2, rows[:, None, :, None].expand(-1, self.heads, -1, query.shape[3]))
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, K or M, H]
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, each token by itself."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.rise = nn.Linear(dim, hidden_dim)
        self.fall = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, D] -> [B, K, D]."""
        out: Tensor = self.fall(F.gelu(self.rise(tokens)))
        return out


class GatedMlp(nn.Module):
    """SwiGLU: one half of the hidden layer, through a SiLU, multiplies the other (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.rise = nn.Linear(dim, 2 * hidden_dim)
        self.fall = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, D] -> [B, K, D]."""
        gate, value = self.rise(tokens).chunk(2, dim=-1)
        out: Tensor = self.fall(F.silu(gate) * value)
        return out


class Branch(nn.Module):
    """How a block adds a branch to its input: scaled by channel if asked, left out for some samples if asked."""

    keep_bits: Tensor

    def __init__(self, dim: int, layer_scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.drop_path, self.drops = drop_path, drop_path > 0
        # A tensor, so that blocks that differ in their chance alone share compiled code; and its bits as an integer,
        # because casting a model to bf16 casts its float buffers too.
        self.register_buffer(
            "keep_bits", torch.tensor(1 - drop_path, dtype=torch.float32).view(torch.int32), persistent=False
        )
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, tokens: Tensor, branch: Tensor) -> Tensor:
        """[B, K, D] + [B, K, D]."""
        if self.scale is not None:
            branch = branch * self.scale
        if self.training and self.drops:
            keep = self.keep_bits.view(torch.float32)
            kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
            branch = branch * (kept / keep).to(branch.dtype)  # divided, so that the expectation stays the same
        return tokens + branch


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VitConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        dim, layer_scale = config.dim, config.layer_scale
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, config.heads)
        self.attention_branch = Branch(dim, layer_scale, drop_path)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = (GatedMlp if config.mlp == "swiglu" else Mlp)(dim, config.mlp_dim)
        self.mlp_branch = Branch(dim, layer_scale, drop_path)

    def forward(self, tokens: Tensor, turns: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """[B, K, D] -> [B, K, D], or [B, M, D] at `rows` [B, M]: what nobody reads of a last block is not computed."""
        mixed = self.attention(self.attention_norm(tokens), turns, rows)
        tokens = self.attention_branch(take(tokens, rows), mixed)
        out: Tensor = self.mlp_branch(tokens, self.mlp(self.mlp_norm(tokens)))
        return out


class Vit(Encoder):
    """A plain vision transformer."""

    repeated = (Block,)
    config: VitConfig
    patch_voxels: tuple[int, ...]
    coordinates: Tensor
    positions: Tensor | None

    def __init__(
        self, config: VitConfig, *, crop_voxels: Sequence[int], patch_voxels: Sequence[int], channels: int
    ) -> None:
        """Raises ValueError when the crop does not divide into patches."""
        super().__init__(config, channels, patch_voxels)
        self.grid = patch_grid(crop_voxels, patch_voxels)
        self.projection = PatchProjection(math.prod(patch_voxels) * channels, config.dim)
        if config.learns_positions:
            # The table keeps the shape of its grid, so that it can be resized without being told. Small beside tokens.
            self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(*self.grid, config.dim), std=0.02))
        elif config.positions == "sincos":
            # Not among the weights: it follows from the grid, so weights move to another grid as they are.
            self.register_buffer("positions", sincos_table(self.grid, config.dim), persistent=False)
        else:
            self.positions = None
        # Integers, because casting a model to bf16 casts its float buffers too.
        self.register_buffer("coordinates", grid_coordinates(self.grid), persistent=False)  # [L, 3]
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path * index / max(config.depth - 1, 1)) for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.apply(init_linear)

    def forward(
        self,
        volume: Tensor,
        visible: Tensor | None = None,
        keep: Sequence[int] = (),
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens of the patches that are shown: [B, C, Z, Y, X] -> [B, K, D].

        Args:
            volume: [B, C, Z, Y, X], any float type.
            visible: [B, K] int64, indices of the patches that are shown; None shows all.
            keep: after which blocks (1 is the first, 0 the embedding) a hidden state is wanted.
            masked: bool [B, L] and a token [D] that stands in place of these patches; None where all are what they are.

        Returns:
            The tokens after the final norm, and the hidden states in the order of `keep`, not normed.
        """
        tokens, turns = self._embed(volume, visible, masked), self._turns(visible)
        kept = {0: tokens}
        for number, block in enumerate(self.blocks, start=1):
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, turns, use_reentrant=False)
            else:
                tokens = block(tokens, turns)
            if number in keep:
                kept[number] = tokens
        return self.norm(tokens), [kept[number] for number in keep]

    def adapted(self, name: str, tensor: Tensor, channels: int) -> tuple[Tensor, str]:
        """A projection of one channel becomes one of N, and a learned table of positions is interpolated."""
        if name == "projection.weight" and channels != self.channels:
            return spread_channel(tensor, channels, self.channels)
        if name == "positions" and tensor.ndim == 4:
            grids = f"{' x '.join(map(str, tensor.shape[:3]))} -> {' x '.join(map(str, self.grid))} patches"
            return resize_table(tensor, self.grid), f"interpolated, {grids}"
        return tensor, ""

    def _embed(self, volume: Tensor, visible: Tensor | None, masked: tuple[Tensor, Tensor] | None) -> Tensor:
        patches = patchify(volume, self.patch_voxels)  # [B, L, P]
        if visible is not None:
            # Before the projection: at a ratio of 0.75 that saves three quarters of it.
            patches = take(patches, visible)  # [B, K, P]
        tokens: Tensor = self.projection(patches)
        if masked is not None:
            hidden, token = masked
            tokens = torch.where(hidden[:, :, None], token.to(tokens.dtype), tokens)
        return tokens if self.positions is None else add_positions(tokens, self.positions, visible)

    def _turns(self, visible: Tensor | None) -> Tensor | None:
        if not self.config.rotates:
            return None
        coordinates = self.coordinates[None] if visible is None else self.coordinates[visible]  # [B or 1, K, 3]
        return angles(coordinates, self.config.dim // self.config.heads)


def init_linear(module: nn.Module) -> None:
    """Xavier weights and zero biases, as in MAE (He et al. 2022, arXiv:2111.06377, appendix A)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
