"""What a model is made of, as frozen dataclasses without torch, and the rules between crop, patch and mask."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mimscale.config import require_positive

Zyx = tuple[int, int, int]  # one number for each of Z, Y, X
# Voxels along each axis that UperNet's coarsest state is averaged to (arXiv:1612.01105, sec. 3.2).
POOLED_EDGES = (1, 2, 3, 6)
POOL_DIM = 128  # numbers of a token by which attention pooling weighs it


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What every encoder has: the class of `model` in a recipe is that of the method's encoder."""

    drop_path: float = 0.0  # chance that a sample skips the last block while training; earlier blocks less, linearly
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: about 1.3 x time, far less memory

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path={self.drop_path}: must be at least 0 and below 1")

    @property
    def layers(self) -> int:
        """Blocks between the embedding and the end, their weights being encoder.blocks.N; what layer decay counts."""
        raise NotImplementedError

    def check_crop(self, crop_voxels: Sequence[int], patch_voxels: Sequence[int]) -> None:
        """Raise ValueError where its stages do not divide such a crop."""


@dataclass(frozen=True, kw_only=True)
class VitConfig(EncoderConfig):
    """The encoder: a plain 3D vision transformer, pre-norm, without class token."""

    dim: int = 768  # embedding, numbers a token
    depth: int = 12  # transformer blocks; 0 leaves the embedding of patches alone, for a control without a transformer
    heads: int = 12  # attention heads; dim is a multiple of it
    mlp_ratio: float = 4.0  # width of a block's MLP / dim
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu: gated (arXiv:2002.05202), 2/3 as wide, so as many weights
    # fixed table, trained table, rotated queries and keys, or both of these
    positions: Literal["sincos", "learned", "rope", "rope_learned"] = "sincos"
    layer_scale: float | None = None  # start of a factor for each channel of each branch, 1e-5 is usual; null: none

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("model", dim=self.dim, heads=self.heads, mlp_ratio=self.mlp_ratio)
        if self.depth < 0:
            raise ValueError(f"model.depth={self.depth}: must be 0 (no transformer) or above")
        _check_heads("model.dim", self.dim, "model.heads", self.heads)
        if self.layer_scale is not None:
            require_positive("model", layer_scale=self.layer_scale)
        if self.rotates and self.dim // self.heads < 6:
            raise ValueError(
                f"model.positions={self.positions} rotates 3 pairs of each head, but model.dim={self.dim} / "
                f"model.heads={self.heads} leaves fewer than 6 numbers; use fewer heads"
            )

    @property
    def layers(self) -> int:
        """The blocks."""
        return self.depth

    @property
    def learns_positions(self) -> bool:
        """Whether there is a trained table of positions."""
        return self.positions in ("learned", "rope_learned")

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.positions in ("rope", "rope_learned")

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP; of a gated one, the width of each of its two halves."""
        return int(self.dim * self.mlp_ratio * (2 / 3 if self.mlp == "swiglu" else 1))


@dataclass(frozen=True, kw_only=True)
class ResencConfig(EncoderConfig):
    """A U-Net with a residual encoder, in the manner of nnU-Net's ResEnc: the defaults are those of ResEnc-L."""

    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)  # channels of each stage; the stem has those of the first
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)  # residual blocks of each stage
    # Z, Y, X factors by which each stage is coarser than the one before; null: 1 for the first, 2 for all others
    strides: tuple[Zyx, ...] | None = None
    kernels: tuple[Zyx, ...] | None = None  # Z, Y, X edges of the convolutions of each stage, odd; null: 3
    decoder_convs: int = 1  # convolutions of each stage of the decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_path:
            raise ValueError(f"model.drop_path={self.drop_path}: a residual encoder leaves no block out; set it to 0")
        require_positive("model", features=self.features, blocks=self.blocks, decoder_convs=self.decoder_convs)
        for name in ("blocks", "strides", "kernels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.features):
                raise ValueError(
                    f"model.{name}={values}: must have one entry a stage, and model.features={self.features} "
                    f"has {len(self.features)}"
                )
        if len(self.features) < 2:
            raise ValueError(f"model.features={self.features}: a U-Net has at least 2 stages")
        for stride in self.strides or ():
            require_positive("model", strides=stride)
        if any(edge < 1 or edge % 2 == 0 for kernel in self.kernels or () for edge in kernel):
            raise ValueError(f"model.kernels={self.kernels}: each edge must be odd, so that it has a middle")

    @property
    def layers(self) -> int:
        """The stages."""
        return len(self.features)

    @property
    def stage_strides(self) -> tuple[Zyx, ...]:
        """Of each stage."""
        return self.strides or ((1, 1, 1), *(len(self.features) - 1) * ((2, 2, 2),))

    @property
    def stage_kernels(self) -> tuple[Zyx, ...]:
        """Of each stage."""
        return self.kernels or len(self.features) * ((3, 3, 3),)

    def check_crop(self, crop_voxels: Sequence[int], patch_voxels: Sequence[int]) -> None:
        """See `stage_voxels`."""
        self.stage_voxels(crop_voxels)

    def stage_voxels(self, crop_voxels: Sequence[int]) -> list[Zyx]:
        """Z, Y, X edges of the features of each stage.

        Raises:
            ValueError: the crop does not divide by the strides, or one voxel is all that is left of it.
        """
        edges, sizes = tuple(crop_voxels), []
        for stride in self.stage_strides:
            if any(edge % step for edge, step in zip(edges, stride, strict=True)):
                total = [math.prod(steps) for steps in zip(*self.stage_strides, strict=True)]
                raise ValueError(
                    f"crop_voxels={list(crop_voxels)} does not divide by the strides of all stages, {total}; make each "
                    "edge a multiple, or take fewer stages (model.features, model.blocks)"
                )
            z, y, x = (edge // step for edge, step in zip(edges, stride, strict=True))
            edges = (z, y, x)
            sizes.append(edges)
        if math.prod(edges) < 2:
            raise ValueError(
                f"crop_voxels={list(crop_voxels)} leaves one voxel to the last stage, which cannot be normalised; take "
                "a larger crop or fewer stages"
            )
        return sizes


@dataclass(frozen=True, kw_only=True)
class SwinConfig(EncoderConfig):
    """A 3D Swin transformer: attention inside windows, shifted in every second block; defaults of MONAI's SwinUNETR."""

    dim: int = 48  # embedding; doubles from stage to stage, at half of the resolution
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks of each stage
    heads: tuple[int, ...] = (3, 6, 12, 24)  # attention heads of each stage
    window: Zyx = (7, 7, 7)  # Z, Y, X edges of a window, tokens
    mlp_ratio: float = 4.0  # width of a block's MLP / its embedding

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("model", dim=self.dim, depths=self.depths, heads=self.heads, window=self.window)
        require_positive("model", mlp_ratio=self.mlp_ratio)
        if len(self.depths) != len(self.heads):
            raise ValueError(f"model.heads={self.heads}: must have one entry a stage, as model.depths={self.depths}")
        for stage, heads in enumerate(self.heads):
            _check_heads(f"model.dim x {2**stage}", self.dim * 2**stage, f"model.heads[{stage}]", heads)

    @property
    def layers(self) -> int:
        """The stages."""
        return len(self.depths)

    def check_crop(self, crop_voxels: Sequence[int], patch_voxels: Sequence[int]) -> None:
        """See `cell_voxels`."""
        self.cell_voxels(crop_voxels, patch_voxels)

    def cell_voxels(self, crop_voxels: Sequence[int], patch_voxels: Sequence[int]) -> Zyx:
        """Z, Y, X edges of what one token stands for at the end: a patch, doubled by each stage.

        Raises:
            ValueError: the crop does not divide into these.
        """
        z, y, x = (edge * 2 ** len(self.depths) for edge in patch_voxels)
        if any(crop % edge for crop, edge in zip(crop_voxels, (z, y, x), strict=True)):
            raise ValueError(
                f"crop_voxels={list(crop_voxels)} does not divide by {[z, y, x]}: patch_voxels, doubled by each "
                f"of {len(self.depths)} stages; make each edge a multiple"
            )
        return z, y, x


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches the encoder does not see. Independent of the patch: a unit is hidden or shown as a whole."""

    ratio: float = 0.75  # share of the units that is hidden
    ratio_range: tuple[float, float] | None = None  # instead of `ratio`: uniform in it, one draw for a global batch
    unit_voxels: Zyx | None = None  # Z, Y, X edges of what is hidden together, a multiple of the patch; null: the patch
    # which units: any; those under boxes dropped at random; the same ones of every 2 x 2 x 2 units
    style: Literal["random", "block", "grid"] = "random"
    predicted_share: float = 1.0  # of the hidden patches; the rest has no part in decoder and loss (arXiv:2303.16727)
    repeats: int = 1  # masks, and augmentations, of each crop in a step: a decoded crop is used so many times

    def __post_init__(self) -> None:
        for name, ratios in (("ratio", (self.ratio,)), ("ratio_range", self.ratio_range or ())):
            if not all(0 < ratio < 1 for ratio in ratios):
                raise ValueError(f"mask.{name}={getattr(self, name)}: must be above 0 and below 1")
        if self.ratio_range is not None and self.ratio_range[0] > self.ratio_range[1]:
            raise ValueError(
                f"mask.ratio_range={list(self.ratio_range)}: the first number must not be above the second"
            )
        if self.unit_voxels is not None:
            require_positive("mask", unit_voxels=self.unit_voxels)
        if not 0 < self.predicted_share <= 1:
            raise ValueError(f"mask.predicted_share={self.predicted_share}: must be above 0 and at most 1")
        require_positive("mask", repeats=self.repeats)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What is predicted, and how its error is measured."""

    target: Literal["raw", "patch_normalised"] = "raw"  # voxels as they are, or each patch with mean 0 and deviation 1
    loss: Literal["l1", "l2"] = "l1"  # absolute or squared error of a voxel
    loss_on: Literal["masked", "all"] = "masked"  # voxels that count: of hidden patches, or of all


@dataclass(frozen=True, kw_only=True)
class MaeConfig(TargetConfig):
    """The light decoder and the loss of a masked autoencoder."""

    decoder_dim: int = 384  # embedding of the decoder
    decoder_depth: int = (
        2  # its blocks; it sees all tokens, so at small patches it costs more than the encoder. 0: linear
    )
    decoder_heads: int = 6  # its attention heads

    def __post_init__(self) -> None:
        require_positive("mae", decoder_dim=self.decoder_dim, decoder_heads=self.decoder_heads)
        if self.decoder_depth < 0:
            raise ValueError(f"mae.decoder_depth={self.decoder_depth}: must be 0 (linear) or above")
        _check_heads("mae.decoder_dim", self.decoder_dim, "mae.decoder_heads", self.decoder_heads)


@dataclass(frozen=True, kw_only=True)
class SimmimConfig(TargetConfig):
    """The head and the loss of SimMIM: no decoder, the encoder itself sees mask tokens."""

    head: Literal["linear", "mlp"] = "linear"  # from a token to its voxels: one layer, or two with a GELU between


@dataclass(frozen=True, kw_only=True)
class SimclrConfig:
    """The projection and the loss of SimCLR: two augmented views of a crop are told from other subjects' crops."""

    # Crops that are told apart at once, over all ranks: micro_batch x ranks must be it. Written down, and not left to
    # the number of ranks, because the loss depends on it. null: the global batch
    pool_crops: int | None = None
    projection_dim: int = 128  # numbers of an embedding
    hidden_dim: int = 2048  # width of the projection's middle
    temperature: float = 0.2  # by which cosines are divided; lower looks harder at the nearest negatives

    def __post_init__(self) -> None:
        require_positive(
            "simclr",
            projection_dim=self.projection_dim,
            hidden_dim=self.hidden_dim,
            temperature=self.temperature,
            pool_crops=self.pool_crops or 1,
        )


@dataclass(frozen=True, kw_only=True)
class UnetrConfig:
    """The segmentation head: convolutions that bring tokens back to voxels, with skips from inside the encoder."""

    num_classes: int  # outputs: classes, background included, or `regions`; every other head takes it from here too
    feature_size: int = 16  # channels at full resolution; doubles at each coarser level

    def __post_init__(self) -> None:
        require_positive("unetr", feature_size=self.feature_size)
        if self.num_classes < 2:
            raise ValueError(f"unetr.num_classes={self.num_classes}: must be at least 2, background included")


@dataclass(frozen=True, kw_only=True)
class ResencHeadConfig:
    """What the residual-encoder U-Net has besides its outputs."""

    deep_supervision: bool = False  # while training, coarser stages of the decoder give scores as well


@dataclass(frozen=True, kw_only=True)
class UpernetConfig:
    """The feature pyramid of UperNet."""

    width: int = 64  # channels of each of its levels

    def __post_init__(self) -> None:
        require_positive("swin_upernet", width=self.width)


def patch_grid(crop_voxels: Sequence[int], patch_voxels: Sequence[int]) -> Zyx:
    """Patches along Z, Y, X of a crop.

    Raises:
        ValueError: the crop does not divide into patches.
    """
    require_positive("config", crop_voxels=crop_voxels, patch_voxels=patch_voxels)
    if any(crop % patch for crop, patch in zip(crop_voxels, patch_voxels, strict=True)):
        raise ValueError(
            f"crop_voxels={list(crop_voxels)} does not divide into patches of patch_voxels={list(patch_voxels)}; "
            "make each edge of the crop a multiple of the patch's"
        )
    z, y, x = (crop // patch for crop, patch in zip(crop_voxels, patch_voxels, strict=True))
    return z, y, x


def mask_grid(crop_voxels: Sequence[int], patch_voxels: Sequence[int], config: MaskConfig) -> Zyx:
    """Mask units along Z, Y, X of a crop.

    Raises:
        ValueError: the unit is no multiple of the patch, the crop no multiple of the unit, or one unit is all there is.
    """
    unit = config.unit_voxels or patch_voxels
    if any(edge % patch for edge, patch in zip(unit, patch_voxels, strict=True)):
        raise ValueError(
            f"mask.unit_voxels={list(unit)} is no multiple of patch_voxels={list(patch_voxels)}; "
            "a patch is hidden as a whole"
        )
    if any(crop % edge for crop, edge in zip(crop_voxels, unit, strict=True)):
        raise ValueError(
            f"crop_voxels={list(crop_voxels)} is no multiple of mask.unit_voxels={list(unit)}; "
            "with cut units the samples of a batch would hide different numbers of patches"
        )
    z, y, x = (crop // edge for crop, edge in zip(crop_voxels, unit, strict=True))
    if z * y * x < 2:
        raise ValueError(
            f"crop_voxels={list(crop_voxels)} holds one mask unit of {list(unit)} voxels: nothing would stay visible; "
            "use a larger crop or a smaller unit"
        )
    return z, y, x


def unetr_halvings(patch_voxels: Sequence[int]) -> Zyx:
    """How often UNETR doubles the resolution along Z, Y, X on its way from patches to voxels.

    Raises:
        ValueError: an edge of the patch is no power of two, or the patch is a single voxel.
    """
    if any(edge < 1 or edge & (edge - 1) for edge in patch_voxels) or max(patch_voxels) < 2:
        raise ValueError(
            f"patch_voxels={list(patch_voxels)}: UNETR doubles the resolution level by level, so each edge must be "
            "1, 2, 4, 8, 16 ... and one of them above 1"
        )
    z, y, x = (edge.bit_length() - 1 for edge in patch_voxels)
    return z, y, x


def upsampling_strides(halvings: Zyx) -> list[Zyx]:
    """Factors along Z, Y, X of each step between levels, finest first; their product is the patch.

    An axis that the patch halved less often is left alone at the fine end, as U-Nets do for thick slices: there a step
    in Z is already as long as several in the plane.
    """
    levels = max(halvings)
    strides = []
    for level in range(levels):
        z, y, x = (2 if level >= levels - count else 1 for count in halvings)
        strides.append((z, y, x))
    return strides


def _check_heads(dim_name: str, dim: int, heads_name: str, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{dim_name}={dim} must be a multiple of {heads_name}={heads}")
