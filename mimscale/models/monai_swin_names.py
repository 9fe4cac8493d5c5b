"""Our Swin transformer and Swin UNETR under the names of MONAI's, by an explicit map.

Both compute the same from the same numbers. MONAI's readers give volumes as X, Y, Z, ours as Z, Y, X; so every weight
that lies along axes is turned: kernels, the tables of relative positions and what is looked up in them, and the order
of the eight tokens that are merged into one.

Where a stage has fewer tokens along an axis than the window, both cut the window and look positions up as if it were
whole, which depends on the order of axes. What is looked up is a buffer there, so features stay equal; but for crops of
the size that the weights were trained on.

    D embedding | h heads | a b c edges in the order of the file's axes | N tokens a window
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimscale.config import build_config
from mimscale.errors import CheckpointError
from mimscale.models.config import SwinConfig, patch_grid
from mimscale.models.monai_names import Axes
from mimscale.models.transfer import ENCODER

STAGES = 4  # MONAI's has as many, no more and no fewer
# Offsets along the three axes of the tokens that MONAI's PatchMerging puts side by side, in its order.
MERGED = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
# Ours -> theirs, of a Swin UNETR; the encoder is `swinViT` there.
DECODER = {
    "image_skip": "encoder1",
    "skips.0": "encoder2",
    "skips.1": "encoder3",
    "skips.2": "encoder4",
    "skips.4": "encoder10",
    **{f"up_steps.{place}": f"decoder{5 - place}" for place in range(5)},
    "out": "out",
}


def to_monai_swin(tensors: dict[str, Tensor], contract: dict[str, Any], axes: Axes = "xyz") -> dict[str, Tensor]:
    """A state dict for MONAI's SwinUNETR where `is_swin_unetr`, else for its SwinTransformer; both load strictly.

    Args:
        tensors: of a model of ours with a Swin transformer.
        contract: its `model`, `crop_voxels` and `patch_voxels`.
        axes: the order in which the user of the weights holds a volume's axes.

    Raises:
        CheckpointError: another number of stages than MONAI's four, or a tensor that has no place there.
    """
    config = build_config(SwinConfig, contract["model"], "model")
    if config.layers != STAGES:
        raise CheckpointError(f"model.depths={list(config.depths)}: MONAI's Swin transformer has {STAGES} stages")
    whole = is_swin_unetr(tensors, contract)
    grid = patch_grid(contract["crop_voxels"], contract["patch_voxels"])
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.float()
        if name.startswith(ENCODER):
            place = _encoder_name(name.removeprefix(ENCODER))
            theirs[f"swinViT.{place}" if whole else place] = _turned(place, value, config, axes)
        elif whole:
            theirs[_decoder_name(name)] = _turned_kernel(value, axes)
    for stage, depth in enumerate(config.depths):
        index = relative_position_index(config.window, [edge // 2**stage for edge in grid], axes)
        for block in range(depth):
            place = f"layers{stage + 1}.0.blocks.{block}.attn.relative_position_index"
            theirs[f"swinViT.{place}" if whole else place] = index.clone()
    return {name: value.contiguous() for name, value in theirs.items()}


def is_swin_unetr(tensors: dict[str, Tensor], contract: dict[str, Any]) -> bool:
    """Whether the decoder of a Swin UNETR is there, and of a kind that MONAI has: cubic patches, widths of 12."""
    fits = len(set(contract["patch_voxels"])) == 1 and contract["model"]["dim"] % 12 == 0
    return fits and any(name.startswith("image_skip.") for name in tensors)


def relative_position_index(window: Sequence[int], grid: Sequence[int], axes: Axes) -> Tensor:
    """Which row of the (turned) table says where a token lies to another: int64 [N, N].

    Args:
        window: Z, Y, X.
        grid: Z, Y, X tokens of the stage.
        axes: of the file.
    """
    ours = _index(window)
    if axes == "zyx":
        return ours
    edges = [2 * edge - 1 for edge in window]
    rows = torch.arange(math.prod(edges)).reshape(edges[::-1]).transpose(0, 2).flatten()  # ours -> theirs
    cut = [min(edge, tokens) for edge, tokens in zip(window, grid, strict=True)]
    inside = math.prod(cut)
    order = torch.arange(inside).reshape(cut).transpose(0, 2).flatten()  # their place of a token -> ours
    theirs = _index(window[::-1])
    theirs[:inside, :inside] = rows[ours[order][:, order]]
    return theirs


def _index(window: Sequence[int]) -> Tensor:
    places = torch.stack(torch.meshgrid(*(torch.arange(edge) for edge in window), indexing="ij")).flatten(1)  # [3, N]
    apart = places[:, :, None] - places[:, None, :]
    index = torch.zeros_like(apart[0])
    for distance, edge in zip(apart, window, strict=True):
        index = index * (2 * edge - 1) + distance + edge - 1
    return index


def _encoder_name(name: str) -> str:
    """Of `embedding.proj.*` and `blocks.STAGE.*`."""
    name = re.sub(r"^blocks\.(\d+)\.", lambda found: f"layers{int(found[1]) + 1}.0.", name)
    return name.replace("embedding.proj.", "patch_embed.proj.")


def _decoder_name(name: str) -> str:
    for ours, theirs in DECODER.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise CheckpointError(f"{name}: MONAI's SwinUNETR has no place for it")


def _turned(place: str, value: Tensor, config: SwinConfig, axes: Axes) -> Tensor:
    """A weight of the encoder in the file's order of axes."""
    if place.endswith("relative_position_bias_table"):
        edges = [2 * edge - 1 for edge in config.window]
        table = value.reshape(*edges, -1)  # [a, b, c, h]
        return value if axes == "zyx" else table.transpose(0, 2).reshape(value.shape)
    if ".downsample." in place and axes == "xyz":
        ours = value.chunk(len(MERGED), dim=-1)
        return torch.cat([ours[MERGED.index(offset[::-1])] for offset in MERGED], dim=-1)
    return _turned_kernel(value, axes)


def _turned_kernel(value: Tensor, axes: Axes) -> Tensor:
    """Kernels [outputs, inputs, a, b, c] with their axes turned; everything else has none."""
    return value.transpose(2, 4) if axes == "xyz" and value.ndim == 5 else value
