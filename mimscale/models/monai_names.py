"""Our encoder under the names of MONAI's ViT, and back, by an explicit map.

Both compute the same from the same numbers. What differs is said here, and nothing is guessed:

    axes        MONAI's readers give volumes as X, Y, Z, ours as Z, Y, X: patches and positions are turned
    projection  a convolution whose stride is the patch, or a linear layer of its voxels: the same sums
    positions   always a table there; a fixed sin-cos table becomes one, rotary positions have no place
    scales      a factor on each channel of a branch is folded into the layer before it
    biases      MONAI's default has none for queries, keys and values: there they are zero here

    D embedding | C channels | a b c patch edges in the order of the file's axes | L patches, the first axis slowest
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mimscale.config import config_tree
from mimscale.errors import CheckpointError
from mimscale.models.config import VitConfig, patch_grid
from mimscale.models.positions import sincos_table
from mimscale.models.transfer import ENCODER

Axes = Literal["xyz", "zyx"]

# theirs -> ours, each with weight and bias
BLOCK_LAYERS = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.out_proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.linear1": "mlp.rise",
    "mlp.linear2": "mlp.fall",
}
POSITIONS = "patch_embedding.position_embeddings"  # [1, L, D]; also what a ViT in a larger model is found by
CONVOLUTION = "patch_embedding.patch_embeddings"  # weight [D, C, a, b, c]
LINEAR = "patch_embedding.patch_embeddings.1"  # weight [D, a * b * c * C]
# MONAI's blocks have the norm, and those of some versions the whole layer; an encoder never calls them.
NEVER_CALLED = re.compile(r"blocks\.\d+\.(cross_attn|norm_cross_attn)\.")


@dataclass(frozen=True)
class Imported:
    """Weights of a foreign encoder under our names, and what they are."""

    tensors: dict[str, Tensor]  # fp32
    model: dict[str, Any]  # as `model.*` of a recipe
    channels: int
    unused: list[str] = field(default_factory=list)  # tensors of the file on which the features do not depend


def to_monai(tensors: dict[str, Tensor], contract: dict[str, Any], axes: Axes = "xyz") -> dict[str, Tensor]:
    """The encoder as the state dict of `ViT(..., proj_type="conv", pos_embed_type="learnable", qkv_bias=True)`.

    Args:
        tensors: of any of our models.
        contract: its `model`, `crop_voxels`, `patch_voxels` and `channels`.
        axes: the order in which the user of the weights holds a volume's axes.

    Raises:
        CheckpointError: rotary positions or a gated MLP, or a tensor that is missing.
    """
    config, patch, channels = contract["model"], contract["patch_voxels"], int(contract["channels"])
    if "positions" not in config:
        raise CheckpointError(f"model={config}: no ViT, so MONAI's has no place for it")
    if config["positions"].startswith("rope"):
        raise CheckpointError(
            f"model.positions={config['positions']}: MONAI's ViT has no rotary positions; it can take sincos or learned"
        )
    if config.get("mlp", "gelu") != "gelu":
        raise CheckpointError(f"model.mlp={config['mlp']}: MONAI's ViT has no such MLP; it can take gelu")
    grid = patch_grid(contract["crop_voxels"], patch)
    dim, depth = int(config["dim"]), int(config["depth"])
    try:
        ours = {
            name.removeprefix(ENCODER): value.float() for name, value in tensors.items() if name.startswith(ENCODER)
        }
        weight = _turned(ours["projection.weight"].reshape(dim, *patch, channels), axes, first=1)
        table = ours["positions"] if config["positions"] == "learned" else sincos_table(grid, dim)
        theirs = {
            f"{CONVOLUTION}.weight": weight.permute(0, 4, 1, 2, 3),
            f"{CONVOLUTION}.bias": ours["projection.bias"],
            POSITIONS: _turned(table, axes, first=0).reshape(1, -1, dim),
            "norm.weight": ours["norm.weight"],
            "norm.bias": ours["norm.bias"],
        }
        for block in range(depth):
            # Of a layer that an encoder never calls; without it their strict loading complains.
            theirs |= {
                f"blocks.{block}.norm_cross_attn.weight": torch.ones(dim),
                f"blocks.{block}.norm_cross_attn.bias": torch.zeros(dim),
            }
            for their_name, our_name in BLOCK_LAYERS.items():
                scale = ours.get(f"blocks.{block}.{_SCALE_AFTER[our_name]}") if our_name in _SCALE_AFTER else None
                for kind in ("weight", "bias"):
                    value = ours[f"blocks.{block}.{our_name}.{kind}"]
                    if scale is not None:
                        value = value * (scale[:, None] if kind == "weight" else scale)
                    theirs[f"blocks.{block}.{their_name}.{kind}"] = value
    except KeyError as error:
        raise CheckpointError(f"the weights lack {ENCODER}{error.args[0]}, which their contract promises") from None
    return {name: value.contiguous() for name, value in theirs.items()}


_SCALE_AFTER = {"attention.out": "attention_branch.scale", "mlp.fall": "mlp_branch.scale"}


def from_monai(
    tensors: dict[str, Tensor],
    *,
    crop_voxels: Sequence[int],
    patch_voxels: Sequence[int],
    heads: int,
    axes: Axes = "xyz",
    prefix: str | None = None,
    ignored: Sequence[str] = (),
) -> Imported:
    """The encoder of a state dict that holds a MONAI ViT: a ViT's own, a UNETR's, or MIM-Med3D's MAE.

    Args:
        tensors: by name.
        crop_voxels: [Z, Y, X], what the ViT was built for.
        patch_voxels: [Z, Y, X].
        heads: of its attention; the tensors do not tell.
        axes: the order of a volume's axes that the ViT was trained on.
        prefix: of the ViT's names ("model.encoder.", "vit."); None: found, when there is one ViT only.
        ignored: beginnings of further names, after the prefix, that are no part of the encoder.

    Raises:
        CheckpointError: no ViT or several, tensors that are missing or that the map does not know, or other shapes;
            each is named.
    """
    prefix = _prefix(tensors, prefix)
    theirs = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    unused = [name for name in tensors if not name.startswith(prefix)]
    if any(name in theirs for name in ("cls_token", "patch_embedding.cls_token")):
        raise CheckpointError(f"{prefix}cls_token: the ViT has a class token, ours has none; its features would differ")
    depth = 1 + max((int(found[1]) for name in theirs if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    names = _names(theirs, depth)
    left_out = [name for name in theirs if NEVER_CALLED.match(name) or name.startswith(tuple(ignored))]
    missing = [prefix + name for name in names if name not in theirs and not name.endswith("qkv.bias")]
    unknown = [prefix + name for name in theirs if name not in names and name not in left_out]
    if missing or unknown:
        raise CheckpointError(
            f"not the encoder of a MONAI ViT of {depth} blocks: missing {', '.join(missing) or 'nothing'}; unknown "
            f"{', '.join(unknown) or 'nothing'}. Leave unknown ones out by ignored=[NAME, ...], if the encoder's "
            "features do not depend on them"
        )
    try:
        grid = patch_grid(crop_voxels, patch_voxels)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    scalars = [prefix + name for name in names if name in theirs and theirs[name].ndim == 0]
    if scalars:
        raise CheckpointError(f"{', '.join(scalars)}: a single number, expected a tensor")
    dim = theirs[POSITIONS].shape[-1]
    ours, channels = _embedding(theirs, dim, grid, patch_voxels, axes, prefix)
    for name, target in names.items():
        if target is not None:
            ours[target] = theirs[name] if name in theirs else torch.zeros(3 * dim)
    hidden = theirs["blocks.0.mlp.linear1.weight"].shape[0]
    try:
        config = VitConfig(dim=dim, depth=depth, heads=heads, mlp_ratio=hidden / dim, positions="learned")
    except ValueError as error:
        raise CheckpointError(f"heads={heads}: {error}; give the number of heads of the ViT") from None
    _check_shapes(ours, dim, depth, hidden)
    return Imported(
        tensors={ENCODER + name: value.float().contiguous() for name, value in ours.items()},
        model=config_tree(config),
        channels=channels,
        unused=unused + [prefix + name for name in left_out],
    )


def _prefix(tensors: dict[str, Tensor], prefix: str | None) -> str:
    found = sorted(name.removesuffix(POSITIONS) for name in tensors if name.endswith(POSITIONS))
    if prefix is not None and prefix in found:
        return prefix
    if prefix is None and len(found) == 1:
        return found[0]
    if not found:
        parts = sorted({name.split(".")[0] for name in tensors})
        raise CheckpointError(f"no MONAI ViT: no tensor is called ...{POSITIONS}; the file has {', '.join(parts)}")
    asked = "" if prefix is None else f"prefix={prefix}: no ViT there; "
    raise CheckpointError(f"{asked}give one of prefix={', '.join(repr(name) for name in found)}")


def _names(theirs: dict[str, Tensor], depth: int) -> dict[str, str | None]:
    """Every name of a MONAI encoder -> ours; None for what is not copied as it is."""
    projection = LINEAR if f"{LINEAR}.weight" in theirs else CONVOLUTION
    names: dict[str, str | None] = {
        POSITIONS: None,
        f"{projection}.weight": None,
        f"{projection}.bias": "projection.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    for block in range(max(depth, 1)):
        for their_name, our_name in BLOCK_LAYERS.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{block}.{their_name}.{kind}"] = f"blocks.{block}.{our_name}.{kind}"
    return names


def _embedding(
    theirs: dict[str, Tensor],
    dim: int,
    grid: Sequence[int],
    patch_voxels: Sequence[int],
    axes: Axes,
    prefix: str,
) -> tuple[dict[str, Tensor], int]:
    """Projection and positions turned to Z, Y, X, and the number of channels."""
    their_patch, their_grid = (list(edges if axes == "zyx" else edges[::-1]) for edges in (patch_voxels, grid))
    table = theirs[POSITIONS]
    if table.shape != (1, math.prod(grid), dim):
        raise CheckpointError(
            f"{prefix}{POSITIONS}: {list(table.shape)}, but crop_voxels and patch_voxels make {math.prod(grid)} "
            f"patches ({' x '.join(map(str, grid))}); give those that the ViT was built for"
        )
    if f"{LINEAR}.weight" in theirs:
        weight = theirs[f"{LINEAR}.weight"]
        if weight.ndim != 2 or weight.shape[0] != dim or weight.shape[1] % math.prod(their_patch):
            raise CheckpointError(
                f"{prefix}{LINEAR}.weight: {list(weight.shape)} is no patch_voxels={list(patch_voxels)}"
            )
        weight = weight.reshape(dim, *their_patch, -1)
    else:
        weight = theirs[f"{CONVOLUTION}.weight"]
        if weight.ndim != 5 or weight.shape[0] != dim or list(weight.shape[2:]) != their_patch:
            raise CheckpointError(
                f"{prefix}{CONVOLUTION}.weight: {list(weight.shape)}, expected [{dim}, channels, "
                f"{', '.join(map(str, their_patch))}] (along {axes}, from patch_voxels={list(patch_voxels)} along zyx)"
            )
        weight = weight.permute(0, 2, 3, 4, 1)
    channels = weight.shape[-1]
    return {
        "projection.weight": _turned(weight, axes, first=1).reshape(dim, -1),
        "positions": _turned(table.reshape(*their_grid, dim), axes, first=0),
    }, channels


def _turned(tensor: Tensor, axes: Axes, *, first: int) -> Tensor:
    """Three axes from dimension `first` on in the opposite order, when the file's are X, Y, Z; its own inverse."""
    return tensor if axes == "zyx" else tensor.transpose(first, first + 2)


def _check_shapes(ours: dict[str, Tensor], dim: int, depth: int, hidden: int) -> None:
    shapes = {"attention.qkv": (3 * dim, dim), "attention.out": (dim, dim), "mlp.rise": (hidden, dim)}
    shapes["mlp.fall"] = (dim, hidden)
    for block in range(depth):
        for layer in BLOCK_LAYERS.values():
            weight, bias = (ours[f"blocks.{block}.{layer}.{kind}"] for kind in ("weight", "bias"))
            expected = shapes.get(layer, (dim,))
            if weight.shape != expected or bias.shape != expected[:1]:
                raise CheckpointError(
                    f"blocks.{block}.{layer}: {list(weight.shape)} and {list(bias.shape)}, expected {list(expected)}"
                )
    for name in ("projection.bias", "norm.weight", "norm.bias"):
        if ours[name].shape != (dim,):
            raise CheckpointError(f"{name}: {list(ours[name].shape)}, expected [{dim}]")
    wrong = [name for name, value in ours.items() if not value.isfinite().all()]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}: not finite; the weights are of a run that went wrong")
