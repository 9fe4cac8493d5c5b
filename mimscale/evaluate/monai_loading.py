"""The lines of a model card that load exported weights into MONAI's networks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimscale.models.monai_names import Axes

VIT_LAYOUT = "monai.networks.nets.ViT"
SWIN_LAYOUT = "monai.networks.nets.swin_unetr.SwinTransformer"
SWIN_UNETR_LAYOUT = "monai.networks.nets.SwinUNETR"
LOADED = 'load_state_dict(load_file("weights.safetensors"))'


def vit_loading(contract: dict[str, Any], axes: "Axes") -> list[str]:
    """Of an encoder that is a ViT there, alone and, where it fits, inside of a UNETR."""
    model = contract["model"]
    crop, patch = _ordered(contract["crop_voxels"], axes), _ordered(contract["patch_voxels"], axes)
    shape = (
        f"hidden_size={model['dim']}, mlp_dim={int(model['dim'] * model['mlp_ratio'])}, num_heads={model['heads']}, "
        "qkv_bias=True"
    )
    lines = [
        f"The encoder, for volumes [B, C, {', '.join(axes.upper())}] in RAS+:",
        "",
        "```python",
        "from monai.networks.nets import ViT",
        "from safetensors.torch import load_file",
        "",
        f"vit = ViT({contract['channels']}, img_size={crop}, patch_size={patch}, num_layers={model['depth']}, {shape})",
        f"vit.{LOADED}",
        "```",
    ]
    if patch == (16, 16, 16) and model["depth"] == 12:
        lines += [
            "",
            "Inside a UNETR:",
            "",
            "```python",
            f"net = UNETR({contract['channels']}, CLASSES, img_size={crop}, {shape})",
            f"net.vit.{LOADED}",
            "```",
        ]
    return lines


def swin_loading(contract: dict[str, Any], axes: "Axes", outputs: int | None) -> list[str]:
    """Of a Swin transformer, or of a Swin UNETR with so many `outputs`."""
    model, channels = contract["model"], contract["channels"]
    patch, window = _ordered(contract["patch_voxels"], axes), _ordered(model["window"], axes)
    depths, heads, drop_path = tuple(model["depths"]), tuple(model["heads"]), model["drop_path"]
    if outputs is None:
        what, place, name = "The encoder", SWIN_LAYOUT, "swin"
        made = (
            f"SwinTransformer({channels}, {model['dim']}, {window}, {patch}, {depths}, {heads}, "
            f"mlp_ratio={model['mlp_ratio']}, drop_path_rate={drop_path})"
        )
    else:
        what, place, name = "The whole network", SWIN_UNETR_LAYOUT, "net"
        made = (
            f"SwinUNETR({channels}, {outputs}, patch_size={patch[0]}, depths={depths}, num_heads={heads}, "
            f"window_size={window}, feature_size={model['dim']}, mlp_ratio={model['mlp_ratio']}, "
            f"dropout_path_rate={drop_path})"
        )
    module, _, kind = place.rpartition(".")
    return [
        f"{what}, for volumes [B, C, {', '.join(axes.upper())}] in RAS+, in crops of "
        f"{_ordered(contract['crop_voxels'], axes)}:",
        "",
        "```python",
        f"from {module} import {kind}",
        "from safetensors.torch import load_file",
        "",
        f"{name} = {made}",
        f"{name}.{LOADED}",
        "```",
    ]


def _ordered(edges: Sequence[int], axes: "Axes") -> tuple[int, ...]:
    return tuple(edges if axes == "zyx" else edges[::-1])
