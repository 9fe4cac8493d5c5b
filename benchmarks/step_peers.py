"""The step of other masked autoencoders, of the same architecture, loss and optimizer as ours, in plain torch.

B batch | C channels | L patches a crop | K visible patches | P numbers a patch | D, E embeddings
"""

import math

import torch
from monai_mae import monai_network
from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.bench.step import Setting, Step, plain_step
from mimscale.models.config import patch_grid
from mimscale.stream.device import normalise


class FullEmbedding(nn.Module):
    """A masked autoencoder as MIM-Med3D has it (Chen et al. 2022, arXiv:2204.11716): MONAI's ViT blocks as encoder.

    All patches are embedded, then the hidden ones are left out; masks come from torch's generator on the device; the
    decoder sees all tokens, the head the hidden ones alone, and the loss is L1 on them.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        config = setting.config
        vit, mae = config.model, config.mae
        self.patch_voxels = config.patch_voxels
        L = math.prod(patch_grid(config.crop_voxels, config.patch_voxels))
        P = math.prod(config.patch_voxels) * setting.channels
        self.hidden_count = round(config.mask.ratio * L)

        self.embedding = nn.Linear(P, vit.dim)
        self.positions = nn.Parameter(torch.zeros(1, L, vit.dim))
        self.encoder = _blocks(vit.dim, vit.mlp_ratio, vit.heads, vit.depth)
        self.decoder_input = nn.Linear(vit.dim, mae.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(mae.decoder_dim))
        self.decoder_positions = nn.Embedding(L, mae.decoder_dim)
        self.decoder = _blocks(mae.decoder_dim, 4.0, mae.decoder_heads, mae.decoder_depth)
        self.head = nn.Linear(mae.decoder_dim, P)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, Z, Y, X] -> the loss, []."""
        patches = _patches(image, self.patch_voxels)  # [B, L, P]
        B, L, _ = patches.shape
        tokens = self.embedding(patches) + self.positions  # [B, L, D]
        order = torch.rand(B, L, device=image.device).argsort(dim=-1)
        hidden, visible = order[:, : self.hidden_count], order[:, self.hidden_count :]
        rows = torch.arange(B, device=image.device)[:, None]
        shown = self.decoder_input(self.encoder(tokens[rows, visible]))  # [B, K, E]
        shown = shown + self.decoder_positions(visible)
        empty = self.mask_token.expand(B, self.hidden_count, -1) + self.decoder_positions(hidden)
        decoded = self.decoder(torch.cat([empty, shown], dim=1))  # [B, L, E]
        return F.l1_loss(self.head(decoded[:, : self.hidden_count]), patches[rows, hidden])


class MaskTokens(nn.Module):
    """SimMIM as MIM-Med3D has it: MONAI's ViT blocks on all tokens, mask tokens among them, a linear head on all."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        config = setting.config
        vit = config.model
        self.patch_voxels = config.patch_voxels
        L = math.prod(patch_grid(config.crop_voxels, config.patch_voxels))
        P = math.prod(config.patch_voxels) * setting.channels
        self.hidden_count = round(config.mask.ratio * L)
        self.embedding = nn.Linear(P, vit.dim)
        self.mask_token = nn.Parameter(torch.zeros(vit.dim))
        self.positions = nn.Parameter(torch.zeros(1, L, vit.dim))
        self.encoder = _blocks(vit.dim, vit.mlp_ratio, vit.heads, vit.depth)
        self.head = nn.Linear(vit.dim, P)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, Z, Y, X] -> the loss, []."""
        patches = _patches(image, self.patch_voxels)  # [B, L, P]
        B, L, _ = patches.shape
        hidden = torch.rand(B, L, device=image.device).argsort(dim=-1).argsort(dim=-1) < self.hidden_count
        tokens = torch.where(hidden[:, :, None], self.mask_token, self.embedding(patches)) + self.positions
        error = F.l1_loss(self.head(self.encoder(tokens)), patches, reduction="none")
        return (error * hidden[:, :, None]).sum() / (hidden.sum() * patches.shape[2])


def _blocks(dim: int, mlp_ratio: float, heads: int, depth: int) -> nn.Sequential:
    from monai.networks.blocks.transformerblock import TransformerBlock

    return nn.Sequential(
        *(TransformerBlock(dim, int(dim * mlp_ratio), heads, qkv_bias=True) for _ in range(depth)),
        nn.LayerNorm(dim),
    )


def full_embedding_step(setting: Setting) -> Step:
    """A step of `FullEmbedding`."""
    return _step_of(setting, FullEmbedding(setting))


def simmim_step(setting: Setting) -> Step:
    """A step of `MaskTokens`."""
    return _step_of(setting, MaskTokens(setting))


def _step_of(setting: Setting, model: nn.Module) -> Step:
    """A step of a model that makes its loss itself."""
    model = model.to(setting.device, setting.dtype)
    image, _ = normalise(setting.batch())
    image = image.to(setting.dtype)
    return plain_step(setting, model, lambda: model(image), clip=setting.config.engine.clip_grad_norm)


def monai_step(setting: Setting) -> Step:
    """A step of MONAI's MaskedAutoEncoderViT, with the loss that its users write."""
    config = setting.config
    model = monai_network(config, setting.channels).to(setting.device, setting.dtype)
    image, _ = normalise(setting.batch())
    image = image.to(setting.dtype)

    def loss_of() -> Tensor:
        prediction, hidden = model(image)
        error = (prediction - _patches(image, config.patch_voxels)).abs().mean(dim=-1)
        return (error * hidden).sum() / hidden.sum()

    return plain_step(setting, model, loss_of, clip=config.engine.clip_grad_norm)


def _patches(image: Tensor, patch_voxels: tuple[int, int, int]) -> Tensor:
    """[B, C, Z, Y, X] -> [B, L, P]."""
    B, C, *crop = image.shape
    (z, y, x), (pz, py, px) = patch_grid(crop, patch_voxels), patch_voxels
    cut = image.reshape(B, C, z, pz, y, py, x, px).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return cut.reshape(B, z * y * x, pz * py * px * C)
