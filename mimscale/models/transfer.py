"""Weights between models and files: strict, reported, adapted only where that is exact or well defined.

A folder of weights holds `weights.safetensors` and `contract.json`; the contract says what the numbers mean
(architecture, patch, channels, intensity, axis order). Architectures are compared by their configs, not by the shapes
of tensors: another number of heads has the same shapes, would load without a complaint, and compute nonsense.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mimscale import console, durable
from mimscale.config import config_tree, differing_keys
from mimscale.errors import CheckpointError
from mimscale.models.contract import CONTRACT_FILE, CONTRACT_VERSION, WEIGHTS_FILE, read_contract
from mimscale.models.encoder import END, Encoder
from mimscale.models.tensor_file import write_tensors

ENCODER = "encoder."  # what every model here calls its encoder
TRAINING_ONLY = ("drop_path", "checkpoint_activations")  # may differ: weights mean the same
ALWAYS_ALIKE = ("dim", "heads", "mlp_ratio", "mlp")


@dataclass(frozen=True)
class TransferReport:
    """What became of each tensor, by name."""

    source: str  # what messages call the weights
    loaded: list[str] = field(default_factory=list)  # copied as they are
    adapted: dict[str, str] = field(default_factory=dict)  # copied after a change, which the value describes
    missing: dict[str, str] = field(
        default_factory=dict
    )  # tensors that should come and keep their start values, and why
    unused: list[str] = field(default_factory=list)  # source tensors without a place in the model (a decoder's)

    @property
    def is_complete(self) -> bool:
        """True when every tensor that should came from the source."""
        return not self.missing

    def show(self) -> None:
        """Print it as a table for a person."""
        rows = [["loaded", f"{len(self.loaded)} tensors"]]
        rows += [["adapted", f"{name}: {change}"] for name, change in self.adapted.items()]
        rows += [["missing", f"{name}: {reason}"] for name, reason in self.missing.items()]
        parts = sorted({name.split(".")[0] for name in self.unused})
        rows.append(["unused", f"{len(self.unused)} tensors" + (f" ({', '.join(parts)})" if parts else "")])
        console.print_table(f"encoder from {self.source}", ["", "tensors"], rows)


def load_encoder(
    model: nn.Module,
    tensors: dict[str, Tensor],
    contract: dict[str, Any],
    *,
    strict: bool = True,
    source: str = "the given weights",
) -> TransferReport:
    """Copy the encoder's weights, and other parts that the model names, into a model before an engine shards it.

    A projection of one channel becomes one of N (repeated, divided by N: N equal channels give the same features). A
    learned position table is interpolated to the model's grid. Everything else must fit as it is.

    Args:
        model: has an `Encoder` called `encoder`; `transferred`, if it has that, names further parts that come over.
        tensors: by name, as in the state dict of any of our models.
        contract: of the source; its `model`, `patch_voxels` and `channels` are compared with the model's.
        strict: anything less than the whole is an error; otherwise what fits is loaded and the rest reported,
            but dim, heads and MLP must agree: without them no weight keeps its meaning.
        source: what messages call the weights.

    Raises:
        CheckpointError: another architecture, or, if strict, a tensor that does not fit. The model is untouched then.
    """
    encoder = model.encoder
    assert isinstance(encoder, Encoder), "a model that takes an encoder has one of that name"
    _check_architecture(encoder, contract, source, strict=strict)
    report = TransferReport(source)
    fitting: dict[str, Tensor] = {}
    parts = transferred_parts(model)
    targets = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
    for name, target in targets.items():
        found = tensors.get(name)
        if found is None:
            report.missing[name] = "not in the source"
            continue
        tensor, change = found, ""
        if found.shape != target.shape and name.startswith(ENCODER):
            tensor, change = encoder.adapted(name.removeprefix(ENCODER), found, int(contract["channels"]))
        if tensor.shape != target.shape:
            report.missing[name] = f"{list(found.shape)} in the source, {list(target.shape)} in the model{change}"
            continue
        fitting[name] = tensor
        if change:
            report.adapted[name] = change
        else:
            report.loaded.append(name)
    report.unused.extend(name for name in tensors if name not in targets)
    if strict and not report.is_complete:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in report.missing.items())
        raise CheckpointError(
            f"{source}: {len(report.missing)} of the {' and '.join(part[:-1] for part in parts)}'s {len(targets)} "
            f"tensors cannot be loaded\n{reasons}\n"
            f"give the model the architecture and the patch of the source: {_summary(contract)}"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def transferred_parts(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of weights that come from pretraining: the encoder's, and others that the model names."""
    return (ENCODER, *getattr(model, "transferred", ()))


def start_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that `load_encoder` would replace, without the encoder's embedding."""
    beginnings = (*(ENCODER + end for end in END), *transferred_parts(model)[1:])
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(beginnings)}


def save_weights(folder: Path, tensors: dict[str, Tensor], contract: dict[str, Any]) -> None:
    """Write `weights.safetensors` and then `contract.json`, each complete or not at all.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    path = folder / WEIGHTS_FILE
    with durable.explained(CheckpointError, path, "free some space or choose another folder, then run again"):
        with durable.open_atomically(path) as file:
            write_tensors(file, {name: tensor.cpu() for name, tensor in tensors.items()})
        durable.write_json(folder / CONTRACT_FILE, {"contract_version": CONTRACT_VERSION, **contract})


def load_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote: tensors on the CPU, and the contract.

    Raises:
        CheckpointError: a file is missing or damaged, or the contract is of another version.
    """
    weights, contract_path = folder / WEIGHTS_FILE, folder / CONTRACT_FILE
    for path in (contract_path, weights):
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file; weights are a folder with {WEIGHTS_FILE} and {CONTRACT_FILE}, as a checkpoint "
                "or `mimscale export RUN_DIR out/` writes them"
            )
    contract = read_contract(contract_path)
    try:
        return safetensors.torch.load_file(weights), contract
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: damaged ({error}); export the weights again") from None


def _check_architecture(encoder: Encoder, contract: dict[str, Any], source: str, *, strict: bool) -> None:
    missing = [key for key in ("model", "patch_voxels", "channels") if key not in contract]
    if missing:
        raise CheckpointError(f"{source}: its contract lacks {', '.join(missing)}; export the weights again")
    fixed_patch = encoder.patch_voxels is not None
    theirs = _architecture(contract["model"], contract["patch_voxels"] if fixed_patch else None, strict=strict)
    ours = _architecture(config_tree(encoder.config), encoder.patch_voxels, strict=strict)
    differences = differing_keys(theirs, ours)
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(
            f"{source}: its encoder is not this model's (source -> model):\n{lines}\n"
            "set these keys to the source's values, or train from scratch"
        )


def _architecture(model: dict[str, Any], patch_voxels: Sequence[int] | None, *, strict: bool) -> dict[str, Any]:
    """What must agree between source and model, under the keys that a user writes."""
    if "heads" in model:
        model = {"mlp": "gelu"} | model  # what encoders were before there was a choice
    if not strict:
        return {f"model.{key}": model.get(key) for key in ALWAYS_ALIKE}
    tree = {f"model.{key}": value for key, value in model.items() if key not in TRAINING_ONLY}
    # The start value of a layer scale does not matter, the trained ones are loaded; whether there is one does.
    tree["model.layer_scale"] = "none" if model.get("layer_scale") is None else "trained"
    return tree if patch_voxels is None else {**tree, "patch_voxels": list(patch_voxels)}


def _summary(contract: dict[str, Any]) -> str:
    model = " ".join(f"model.{key}={value}" for key, value in contract["model"].items() if key not in TRAINING_ONLY)
    return f"patch_voxels={contract['patch_voxels']} {model}"
