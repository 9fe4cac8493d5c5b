"""3D Swin transformer (Liu et al. 2021, arXiv:2103.14030) of MONAI's stages; SimMIM and a UNETR-like network on it.

B batch | C channels | Z Y X crop, voxels | D embedding | L patches a crop | P numbers a patch | K outputs
"""

import math
from collections.abc import Sequence

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.patchembedding import PatchEmbed
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.swin_unetr import BasicLayer, PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.models.config import SwinConfig, TargetConfig, UnetrConfig, patch_grid
from mimscale.models.encoder import Encoder, spread_channel
from mimscale.models.patches import patchify, unpatchify
from mimscale.models.reconstruction import MaskedModel
from mimscale.models.vit import init_linear

NORM = "instance"


class Swin(Encoder):
    """Patch embedding and MONAI's stages, each of which halves the resolution at its end; one is what others call a
    block. Its features are those of MONAI's SwinTransformer with the same weights.
    """

    config: SwinConfig
    patch_voxels: tuple[int, ...]
    repeated = (SwinTransformerBlock,)

    def __init__(
        self, config: SwinConfig, *, crop_voxels: Sequence[int], patch_voxels: Sequence[int], channels: int
    ) -> None:
        """Raises ValueError when the crop does not divide by the patch, doubled by each stage."""
        super().__init__(config, channels, patch_voxels)
        config.cell_voxels(crop_voxels, patch_voxels)
        self.embedding = PatchEmbed(self.patch_voxels, channels, config.dim, norm_layer=None)  # type: ignore[arg-type]
        drop_path = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        self.blocks = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            before = sum(config.depths[:stage])
            self.blocks.append(
                BasicLayer(
                    config.dim * 2**stage,
                    depth,
                    heads,
                    config.window,
                    drop_path[before : before + depth],
                    mlp_ratio=config.mlp_ratio,
                    qkv_bias=True,
                    downsample=PatchMerging,  # type: ignore[arg-type]
                    use_checkpoint=config.checkpoint_activations,
                )
            )
        for module in self.modules():
            if isinstance(module, WindowAttention):
                # It follows from the window: no weight, so no file of weights holds it.
                index = module.relative_position_index
                assert isinstance(index, Tensor)
                module.register_buffer("relative_position_index", index, persistent=False)
        self.apply(init_linear)

    def forward(self, image: Tensor, masked: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """Features of the embedding and of each stage, normed: [B, C, Z, Y, X] -> [B, D, z, y, x], then [B, 2D, z/2 ...

        Args:
            image: [B, C, Z, Y, X], any float type.
            masked: bool [B, L] and a token [D] that stands in place of these patches; None where all are what they are.
        """
        features = self.embedding(image.to(self.embedding.proj.weight.dtype))
        if masked is not None:
            hidden, token = masked
            places = hidden.reshape(-1, 1, *features.shape[2:])
            features = torch.where(places, token.to(features.dtype)[:, None, None, None], features)
        states = [_normed(features)]
        for stage in self.blocks:
            features = stage(features.contiguous())
            states.append(_normed(features))
        return states

    def adapted(self, name: str, tensor: Tensor, channels: int) -> tuple[Tensor, str]:
        """An embedding of one channel becomes one of N."""
        if name == "embedding.proj.weight" and channels != self.channels:
            return spread_channel(tensor, channels, self.channels)
        return tensor, ""


def _normed(features: Tensor) -> Tensor:
    """Each token by itself, without weights: what MONAI gives out, and not what the next stage gets."""
    return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


class SwinSimmim(MaskedModel):
    """SimMIM (Xie et al. 2022, arXiv:2111.09886): mask tokens at the embedding, a linear layer from the last stage."""

    def __init__(
        self,
        swin: SwinConfig,
        target: TargetConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide by the patch, doubled by each stage."""
        super().__init__(target, crop_voxels, patch_voxels)
        self.encoder = Swin(swin, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        self.cell_voxels = swin.cell_voxels(crop_voxels, patch_voxels)
        # Not the encoder's: fine-tuning hides nothing.
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(swin.dim), std=0.02))
        self.head = nn.Linear(swin.dim * 2**swin.layers, math.prod(self.cell_voxels) * channels)
        init_linear(self.head)

    def predict(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels [B, L, P], and the last stage as tokens."""
        tokens = self.encoder(image, (hidden, self.mask_token))[-1].flatten(2).transpose(1, 2)
        cells = patch_grid(image.shape[2:], self.cell_voxels)
        voxels = unpatchify(self.head(tokens), self.cell_voxels, cells)
        return patchify(voxels, self.patch_voxels), tokens


class SwinUnetr(nn.Module):
    """A convolutional decoder on the features of all stages, of the blocks and in the order of MONAI's SwinUNETR."""

    def __init__(
        self,
        swin: SwinConfig,
        unetr: UnetrConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide by the patch, doubled by each stage."""
        super().__init__()
        self.encoder = Swin(swin, crop_voxels=crop_voxels, patch_voxels=patch_voxels, channels=channels)
        # Of the image, of the embedding, and of each stage: the image's skip has as many features as the embedding.
        widths = [swin.dim, *(swin.dim * 2**stage for stage in range(swin.layers + 1))]
        strides = [tuple(patch_voxels), *swin.layers * [(2, 2, 2)]]
        # The last stage but one joins as it is, as in MONAI.
        skipped = [*range(swin.layers - 1), swin.layers]
        self.image_skip = UnetrBasicBlock(3, channels, widths[0], 3, 1, NORM, res_block=True)
        self.skips = nn.ModuleDict(
            {
                str(state): UnetrBasicBlock(3, widths[state + 1], widths[state + 1], 3, 1, NORM, res_block=True)
                for state in skipped
            }
        )
        self.up_steps = nn.ModuleList(
            UnetrUpBlock(3, widths[level + 1], widths[level], 3, strides[level], NORM, res_block=True)
            for level in reversed(range(len(strides)))
        )
        self.out = UnetOutBlock(3, widths[0], unetr.num_classes)

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        bias = self.out.conv.conv.bias
        assert isinstance(bias, Tensor)
        return bias

    def forward(self, image: Tensor) -> Tensor:
        """Scores before softmax or sigmoid: [B, C, Z, Y, X] -> fp32 [B, K, Z, Y, X]."""
        states = self.encoder(image)
        besides = [self.image_skip(image.to(states[0].dtype))]  # from the finest on
        for place, state in enumerate(map(str, range(len(states)))):
            besides.append(self.skips[state](states[place]) if state in self.skips else states[place])
        features = besides.pop()
        for up_step, beside in zip(self.up_steps, reversed(besides), strict=True):
            features = up_step(features, beside)
        logits: Tensor = self.out(features)
        return logits.float()
