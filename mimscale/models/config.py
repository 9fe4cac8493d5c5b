"""What a model is made of, as frozen dataclasses without torch, and the rules between crop, patch and mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mimscale.config import require_positive

Zyx = tuple[int, int, int]  # one number for each of Z, Y, X


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """The encoder: a plain 3D vision transformer, pre-norm, without class token."""

    dim: int = 768  # embedding, numbers a token
    depth: int = 12  # transformer blocks
    heads: int = 12  # attention heads; dim is a multiple of it
    mlp_ratio: float = 4.0  # width of a block's MLP / dim
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu: gated (arXiv:2002.05202), 2/3 as wide, so as many weights
    positions: Literal["sincos", "learned", "rope"] = (
        "sincos"  # fixed table, trained table, or rotated queries and keys
    )
    drop_path: float = 0.0  # chance that a sample skips the last block while training; earlier blocks less, linearly
    layer_scale: float | None = (
        None  # start value of a factor for each channel of each branch (1e-5 is usual); null: none
    )
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: about 1.3 x time, far less memory

    def __post_init__(self) -> None:
        require_positive("model", dim=self.dim, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio)
        _check_heads("model.dim", self.dim, "model.heads", self.heads)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path={self.drop_path}: must be at least 0 and below 1")
        if self.layer_scale is not None:
            require_positive("model", layer_scale=self.layer_scale)
        if self.positions == "rope" and self.dim // self.heads < 6:
            raise ValueError(
                f"model.positions=rope rotates 3 pairs of each head, but model.dim={self.dim} / "
                f"model.heads={self.heads} leaves fewer than 6 numbers; use fewer heads"
            )

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP; of a gated one, the width of each of its two halves."""
        return int(self.dim * self.mlp_ratio * (2 / 3 if self.mlp == "swiglu" else 1))


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

    num_classes: int  # outputs: classes, background included, or `regions`; a linear head takes it from here too
    feature_size: int = 16  # channels at full resolution; doubles at each coarser level

    def __post_init__(self) -> None:
        require_positive("unetr", feature_size=self.feature_size)
        if self.num_classes < 2:
            raise ValueError(f"unetr.num_classes={self.num_classes}: must be at least 2, background included")


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
