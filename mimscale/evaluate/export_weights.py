"""Weights out of a run and into one: our own folder of them, MONAI's names, and files of MONAI's models.

What comes from elsewhere is read as safetensors, or by torch's loader of plain tensors; no pickle is executed.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimscale import durable
from mimscale.console import say
from mimscale.errors import CheckpointError, DataError
from mimscale.evaluate.checkpoints import find_checkpoint
from mimscale.evaluate.model_card import model_card, shareable_contract
from mimscale.evaluate.monai_loading import (
    SWIN_LAYOUT,
    SWIN_UNETR_LAYOUT,
    VIT_LAYOUT,
    swin_loading,
    vit_loading,
)
from mimscale.models.contract import CONTRACT_FILE, WEIGHTS_FILE, read_contract
from mimscale.train.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from mimscale.models.monai_names import Axes

WAY_OUT = "free some space, or choose another folder"
CARD_FILE = "README.md"
MONAI_LAYOUT = "monai.networks.nets.ViT"
NNUNET_LAYOUT = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
# Under these keys training programs keep the state dict in a larger file.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")
OWN_LOADING = (
    "With mimscale, as the encoder of a segmentation network:",
    "",
    "```",
    "mimscale finetune finetune_unetr init_from=THIS_FOLDER store=STORE run_dir=DIR",
    "```",
    "",
    "Without it, as plain tensors (no code of this package, no DeepSpeed):",
    "",
    "```python",
    "from safetensors.torch import load_file",
    'tensors = load_file("weights.safetensors")  # name -> fp32 tensor; the encoder is encoder.*',
    "```",
)


def export_weights(run_dir: Path, out: Path, checkpoint: str = "newest") -> list[Path]:
    """Write weights.safetensors, contract.json and README.md (a model card) of a run's checkpoint into `out`.

    Needs neither torch nor DeepSpeed.

    Raises:
        ConfigError: no run directory.
        CheckpointError: no usable checkpoint, or a folder that cannot be written.
    """
    run = RunDir(run_dir)
    run.read_config_tree()
    tag = find_checkpoint(run, checkpoint)
    contract = shareable_contract(read_contract(tag / CONTRACT_FILE), run, _environment(run))
    with durable.explained(CheckpointError, out, WAY_OUT):
        with (tag / WEIGHTS_FILE).open("rb") as source, durable.open_atomically(out / WEIGHTS_FILE) as target:
            shutil.copyfileobj(source, target)
        durable.write_json(out / CONTRACT_FILE, contract)
        durable.write_text(out / CARD_FILE, model_card(contract, _scores(run, tag), OWN_LOADING))
    return [out / name for name in (WEIGHTS_FILE, CONTRACT_FILE, CARD_FILE)]


def export_to_monai(run_dir: Path, out: Path, checkpoint: str = "newest", *, axes: "Axes" = "xyz") -> list[Path]:
    """Write a run's encoder as the state dict of MONAI's ViT, which is also the `vit` of its UNETR, or of its Swin.

    A Swin UNETR goes as a whole. A whole UNETR of ours cannot be one of MONAI's: ours takes its skips after blocks 3, 6
    and 9 of 12, as the paper says, and MONAI's after blocks 4, 7 and 10.

    Raises:
        ConfigError: no run directory.
        CheckpointError: no usable checkpoint, an architecture that MONAI's ViT does not have, or a folder that cannot
            be written.
    """
    from mimscale.models.transfer import load_weights, save_weights

    run = RunDir(run_dir)
    run.read_config_tree()
    tag = find_checkpoint(run, checkpoint)
    tensors, contract = load_weights(tag)
    theirs, layout, loading = _for_monai(tensors, contract, axes)
    contract = shareable_contract(contract, run, _environment(run))
    contract |= {"layout": layout, "axis_order": f"C{axes.upper()}, RAS+"}
    save_weights(out, theirs, contract)
    with durable.explained(CheckpointError, out, WAY_OUT):
        durable.write_text(out / CARD_FILE, model_card(contract, _scores(run, tag), loading))
    return [out / name for name in (WEIGHTS_FILE, CONTRACT_FILE, CARD_FILE)]


def export_to_nnunet(run_dir: Path, out: Path, checkpoint: str = "newest") -> list[Path]:
    """Write a run's residual encoder, and its decoder, as the state dict of nnU-Net's network, its outputs left out.

    nnU-Net holds volumes as Z, Y, X too, so nothing is turned.

    Raises:
        ConfigError: no run directory.
        CheckpointError: no usable checkpoint, another encoder, or a folder that cannot be written.
    """
    from mimscale.models.nnunet_names import to_nnunet
    from mimscale.models.transfer import load_weights, save_weights

    run = RunDir(run_dir)
    run.read_config_tree()
    tensors, contract = load_weights(find_checkpoint(run, checkpoint))
    theirs = to_nnunet(tensors, contract)
    contract = shareable_contract(contract, run, _environment(run)) | {"layout": NNUNET_LAYOUT}
    save_weights(out, theirs, contract)
    loading = [
        "Into nnU-Net's residual-encoder U-Net of the same stages; its outputs, `decoder.seg_layers`, stay its own:",
        "",
        "```python",
        "from safetensors.torch import load_file",
        "",
        'missing, unexpected = network.load_state_dict(load_file("weights.safetensors"), strict=False)',
        'assert not unexpected and all(name.startswith("decoder.seg_layers.") for name in missing)',
        "```",
    ]
    with durable.explained(CheckpointError, out, WAY_OUT):
        durable.write_text(out / CARD_FILE, model_card(contract, None, loading))
    return [out / name for name in (WEIGHTS_FILE, CONTRACT_FILE, CARD_FILE)]


def import_from_monai(
    file: Path,
    out: Path,
    *,
    heads: int,
    crop_voxels: Sequence[int],
    patch_voxels: Sequence[int],
    axes: "Axes" = "xyz",
    prefix: str | None = None,
    ignored: Sequence[str] = (),
    modality: str | None = None,
) -> list[Path]:
    """Write the encoder of a file with a MONAI ViT in it as a folder of weights, which `init_from` takes.

    Args: see `from_monai`; `modality` is for the model card.

    Raises:
        CheckpointError: a file that cannot be read without executing code, is no such model, or does not fit what was
            said of it; tensors that are missing or unknown are named.
    """
    from mimscale.models.monai_names import from_monai
    from mimscale.models.transfer import save_weights

    try:
        imported = from_monai(
            read_tensors(file),
            heads=heads,
            crop_voxels=crop_voxels,
            patch_voxels=patch_voxels,
            axes=axes,
            prefix=prefix,
            ignored=ignored,
        )
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None
    parts = sorted({name.split(".")[0] for name in imported.unused})
    if imported.unused:
        say(f"{file}: {len(imported.unused)} tensors are no part of the encoder and are left out ({', '.join(parts)})")
    say(f"{file}: says nothing of intensities or spacing; ingest and train as its authors did")
    contract = {
        "kind": "imported",
        "model": imported.model,
        "channels": imported.channels,
        "crop_voxels": list(crop_voxels),
        "patch_voxels": list(patch_voxels),
        "axis_order": "CZYX, RAS+",
        "intensity": None,
        "modality": modality,
        "imported_from": f"{file.name}, sha256 {durable.sha256_of_file(file)}",
    }
    save_weights(out, imported.tensors, contract)
    with durable.explained(CheckpointError, out, WAY_OUT):
        durable.write_text(out / CARD_FILE, model_card(contract, None, OWN_LOADING))
    return [out / name for name in (WEIGHTS_FILE, CONTRACT_FILE, CARD_FILE)]


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """The tensors of a file from anywhere: safetensors, or what torch saved, if it holds nothing but plain values.

    Raises:
        CheckpointError: no such file, a damaged one, or one with Python objects in it, which nothing here executes.
    """
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a .safetensors file or one that torch saved")
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged ({error}); get it again") from None
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader meets hostile bytes: it may raise whatever its parts raise
        raise CheckpointError(
            f"{file}: holds more than plain tensors, or is damaged, and nothing in it was executed "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Where you trust it, save its "
            "state dict alone with safetensors and give that file"
        ) from None
    for key in STATE_DICT_KEYS:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"{file}: holds no table of tensors, but {type(tree).__name__}")
    others = [str(name) for name, value in tree.items() if not isinstance(value, torch.Tensor) or type(name) is not str]
    if others:
        raise CheckpointError(
            f"{file}: {', '.join(others[:5])}: no tensors; its state dict has another place, or is none"
        )
    return dict(tree)


def _for_monai(
    tensors: "dict[str, Tensor]", contract: dict[str, Any], axes: "Axes"
) -> "tuple[dict[str, Tensor], str, list[str]]":
    """Weights under MONAI's names, which of its networks they are for, and the lines of a card that load them."""
    from mimscale.models.monai_names import to_monai
    from mimscale.models.monai_swin_names import is_swin_unetr, to_monai_swin

    if "window" not in contract["model"]:
        return to_monai(tensors, contract, axes), VIT_LAYOUT, vit_loading(contract, axes)
    theirs = to_monai_swin(tensors, contract, axes)
    if not is_swin_unetr(tensors, contract):
        return theirs, SWIN_LAYOUT, swin_loading(contract, axes, None)
    return theirs, SWIN_UNETR_LAYOUT, swin_loading(contract, axes, len(theirs["out.conv.conv.bias"]))


def _environment(run: RunDir) -> dict[str, Any]:
    return _read_json(run.environment) if run.environment.exists() else {}


def _scores(run: RunDir, tag: Path) -> dict[str, Any] | None:
    path = run.evaluation / "scores.json"
    scores = _read_json(path) if path.exists() else None
    return scores if scores is not None and scores.get("checkpoint") == tag.name else None  # else of other weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: holds {type(tree).__name__}, expected a table of values")
    return tree
