"""A U-Net with a residual encoder, as nnU-Net's ResEnc (Isensee et al. 2024, arXiv:2404.09556), and its masked form.

Residual blocks are those of ResNet-D (He et al. 2019, arXiv:1812.01187, sec. 4): the shortcut of a strided block is an
average, then a convolution of 1^3 where the width changes. Norms are InstanceNorm with weights, bends LeakyReLU.

B batch | C channels | Z Y X crop, voxels | F features of a stage | L patches a crop | P numbers a patch | K outputs
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimscale.models.averages import BoxMean
from mimscale.models.config import ResencConfig, TargetConfig, UnetrConfig, Zyx
from mimscale.models.encoder import Encoder, spread_channel
from mimscale.models.patches import hidden_voxels, patchify
from mimscale.models.reconstruction import MaskedModel

SLOPE = 0.01  # of LeakyReLU below zero


class ConvNorm(nn.Module):
    """Convolution, norm, and LeakyReLU where there is to be one."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Zyx, stride: Zyx = (1, 1, 1), *, bias: bool = True, bend: bool = True
    ) -> None:
        super().__init__()
        z, y, x = (edge // 2 for edge in kernel)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=(z, y, x), bias=bias)
        self.norm = nn.InstanceNorm3d(outputs, affine=True)
        self.bend = nn.LeakyReLU(SLOPE, inplace=True) if bend else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """[B, inputs, ...] -> [B, outputs, ...], coarser by the stride."""
        out: Tensor = self.bend(self.norm(self.conv(features)))
        return out


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, kernel: Zyx, stride: Zyx) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, kernel, stride)
        self.second = ConvNorm(outputs, outputs, kernel, bend=False)
        self.average = BoxMean(stride, stride) if max(stride) > 1 else nn.Identity()
        self.shortcut = (
            ConvNorm(inputs, outputs, (1, 1, 1), bias=False, bend=False) if inputs != outputs else nn.Identity()
        )
        self.bend = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """[B, inputs, ...] -> [B, outputs, ...], coarser by the stride."""
        out: Tensor = self.bend(self.second(self.first(features)) + self.shortcut(self.average(features)))
        return out


class ResidualEncoder(Encoder):
    """Stem and stages of residual blocks; a stage is what the others call a block."""

    config: ResencConfig
    repeated = (ConvNorm, ResidualBlock)

    def __init__(self, config: ResencConfig, *, channels: int) -> None:
        super().__init__(config, channels)
        self.stem = ConvNorm(channels, config.features[0], config.stage_kernels[0])
        self.blocks = nn.ModuleList()
        inputs = config.features[0]
        for outputs, count, stride, kernel in zip(
            config.features, config.blocks, config.stage_strides, config.stage_kernels, strict=True
        ):
            first = ResidualBlock(inputs, outputs, kernel, stride)
            others = (ResidualBlock(outputs, outputs, kernel, (1, 1, 1)) for _ in range(count - 1))
            self.blocks.append(nn.Sequential(first, *others))
            inputs = outputs
        self.apply(init_convolution)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of each stage, finest first: [B, C, Z, Y, X] -> [B, F, ...] each."""
        features = self.stem(image)
        states = []
        for stage in self.blocks:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                features = checkpoint(stage, features, use_reentrant=False)
            else:
                features = stage(features)
            states.append(features)
        return states

    def adapted(self, name: str, tensor: Tensor, channels: int) -> tuple[Tensor, str]:
        """A stem of one channel becomes one of N."""
        if name == "stem.conv.weight" and channels != self.channels:
            return spread_channel(tensor, channels, self.channels)
        return tensor, ""


class UnetDecoder(nn.Module):
    """From the coarsest stage up to voxels, with the features of each stage beside those from below."""

    def __init__(self, config: ResencConfig) -> None:
        super().__init__()
        self.config = config
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(len(config.features) - 1)):
            below, width = config.features[stage + 1], config.features[stage]
            stride, kernel = config.stage_strides[stage + 1], config.stage_kernels[stage]
            self.ups.append(nn.ConvTranspose3d(below, width, stride, stride))
            inputs = (2 * width, *(config.decoder_convs - 1) * (width,))
            self.blocks.append(nn.Sequential(*(ConvNorm(count, width, kernel) for count in inputs)))
        self.apply(init_convolution)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Encoder's features, finest first -> those of all stages but the coarsest, finest last; [B, F, ...] each."""
        features, out = states[-1], []
        for up, block, beside in zip(self.ups, self.blocks, reversed(states[:-1]), strict=True):
            joined = torch.cat([up(features), beside], dim=1)
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                features = checkpoint(block, joined, use_reentrant=False)
            else:
                features = block(joined)
            out.append(features)
        return out


class MaskedUnet(MaskedModel):
    """Masked autoencoder whose encoder sees zeros in place of hidden voxels, and whose decoder is a U-Net's."""

    def __init__(
        self,
        resenc: ResencConfig,
        target: TargetConfig,
        *,
        crop_voxels: Sequence[int],
        patch_voxels: Sequence[int],
        channels: int,
    ) -> None:
        """Raises ValueError when the crop does not divide into patches, or by the strides."""
        super().__init__(target, crop_voxels, patch_voxels)
        resenc.stage_voxels(crop_voxels)
        self.encoder = ResidualEncoder(resenc, channels=channels)
        self.decoder = UnetDecoder(resenc)
        self.head = nn.Conv3d(resenc.features[0], channels, 1)

    def predict(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels [B, L, P], and the coarsest stage as tokens [B, K, F]."""
        states = self.encoder(image.masked_fill(hidden_voxels(hidden, self.patch_voxels, self.grid), 0))
        voxels = self.head(self.decoder(states)[-1])
        return patchify(voxels, self.patch_voxels), states[-1].flatten(2).transpose(1, 2)


class ResidualUnet(nn.Module):
    """The same encoder and decoder, and class scores."""

    transferred = ("decoder.",)  # comes from pretraining as well as the encoder

    def __init__(
        self,
        resenc: ResencConfig,
        unetr: UnetrConfig,
        *,
        crop_voxels: Sequence[int],
        channels: int,
        deep_supervision: bool = False,
    ) -> None:
        """Takes the number of outputs from `unetr`. Raises ValueError when the crop does not divide by the strides."""
        super().__init__()
        resenc.stage_voxels(crop_voxels)
        self.encoder = ResidualEncoder(resenc, channels=channels)
        self.decoder = UnetDecoder(resenc)
        self.out = nn.Conv3d(resenc.features[0], unetr.num_classes, 1)
        coarser = resenc.features[1:-1] if deep_supervision else ()
        self.coarse_outs = nn.ModuleList(nn.Conv3d(width, unetr.num_classes, 1) for width in coarser)

    @property
    def output_bias(self) -> Tensor:
        """[K], where a prior goes."""
        assert self.out.bias is not None
        return self.out.bias

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Scores before softmax or sigmoid: [B, C, Z, Y, X] -> fp32 [B, K, Z, Y, X].

        With deep supervision, while training: a list of them, the next ones at the resolution of each coarser stage.
        """
        *coarser, finest = self.decoder(self.encoder(image.to(self.out.weight.dtype)))
        logits: Tensor = self.out(finest)
        if not self.training or not self.coarse_outs:
            return logits.float()
        others = [out(features).float() for out, features in zip(self.coarse_outs, reversed(coarser), strict=True)]
        return [logits.float(), *others]


def init_convolution(module: nn.Module) -> None:
    """Weights for LeakyReLU (He et al. 2015, arXiv:1502.01852, eq. 15), zero biases."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
