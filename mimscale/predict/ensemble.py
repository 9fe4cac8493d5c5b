"""Run directories -> networks that agree on what they were trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimscale.config import build_config, config_tree, differing_keys
from mimscale.console import say
from mimscale.errors import ConfigError, DataError
from mimscale.evaluate import weights
from mimscale.evaluate.checkpoints import find_checkpoint
from mimscale.evaluate.outputs import Classes, Regions, outputs_of
from mimscale.evaluate.whole import Network
from mimscale.ingest.config import IngestConfig
from mimscale.models.contract import CONTRACT_FILE, read_contract
from mimscale.predict.config import PredictConfig
from mimscale.store.intensity import IntensityContract
from mimscale.store.layout import read_info
from mimscale.train.config import FinetuneConfig, load_run_config
from mimscale.train.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Networks that answer together, and what their input must be like."""

    name: str  # of the runs, for people
    networks: tuple[Network, ...]
    outputs: Classes | Regions
    intensity: IntensityContract
    ingest: IngestConfig  # what of an image would be stored, and how it is read
    spacing_mm: tuple[float, ...] | None  # median [Z, Y, X] of the training volumes, where the weights know it
    max_spacing_ratio: float


@dataclass(frozen=True, kw_only=True)
class _Fold:
    run_dir: Path
    config: FinetuneConfig
    tag: Path
    contract: dict[str, Any]
    must_agree: dict[str, Any]


def load_ensemble(run_dirs: Sequence[Path], config: PredictConfig, device: torch.device) -> Ensemble:
    """Load the networks of runs, once it is known that they fit each other.

    Raises:
        ConfigError: no run directory, one without a segmentation model, or runs that do not agree.
        CheckpointError: no usable checkpoint.
    """
    folds = [_read(run_dir, config) for run_dir in run_dirs]
    _require_agreement(folds)
    first = folds[0]
    contract, channels = first.contract, int(first.contract["channels"])
    networks = [
        Network(
            model=weights.load_model(fold.config, fold.tag, channels, device)[0],
            device=device,
            crop_voxels=fold.config.crop_voxels,
            target_mm=fold.config.stream.target_spacing_mm,
        )
        for fold in folds
    ]
    stored_as = first.must_agree["stored_as"]
    ingest = {
        "sources": "",
        "out": "",
        "channels": channels,
        "modality": config.modality or contract.get("modality") or "other",
        "assume_orientation": config.assume_orientation,
        "channel_names": config.channel_names,
        **stored_as,
    }
    origin = str(first.tag / CONTRACT_FILE)
    spacing_mm = contract.get("spacing_mm")
    return Ensemble(
        name=", ".join(fold.run_dir.name for fold in folds),
        networks=tuple(networks),
        outputs=outputs_of(first.config, contract["class_names"]),
        intensity=build_config(IntensityContract, contract["intensity"], origin),
        ingest=build_config(IngestConfig, ingest, origin),
        spacing_mm=tuple(spacing_mm) if spacing_mm else None,
        max_spacing_ratio=first.config.stream.max_spacing_ratio,
    )


def _read(run_dir: Path, config: PredictConfig) -> _Fold:
    run_config = load_run_config(run_dir)
    if not isinstance(run_config, FinetuneConfig):
        raise ConfigError(
            f"{run_dir}: has no segmentation model, it pretrained an encoder (method={run_config.method}); fine-tune "
            f"it first: mimscale finetune RECIPE init_from={run_dir} ..., and give the directory of that run"
        )
    if not run_config.network.segments:
        raise ConfigError(
            f"{run_dir}: predicts targets of whole volumes (head={run_config.head}) and no masks; "
            f"mimscale evaluate run_dir={run_dir} predicts them for the volumes of a store"
        )
    tag = find_checkpoint(RunDir(run_dir), config.checkpoint)
    contract = read_contract(tag / CONTRACT_FILE)
    if not contract.get("class_names") or not contract.get("intensity") or "channels" not in contract:
        raise ConfigError(
            f"{tag}: its contract names no classes, intensities or channels, so it is not that of a segmentation; "
            "give a run that `mimscale finetune` made"
        )
    return _Fold(
        run_dir=run_dir,
        config=run_config,
        tag=tag,
        contract=contract,
        must_agree={
            "class_names": contract["class_names"],
            "regions": run_config.regions,
            "channels": contract["channels"],
            "modality": contract.get("modality"),
            "intensity": contract["intensity"],
            "target_spacing_mm": config_tree(run_config)["stream"]["target_spacing_mm"],
            "stored_as": _stored_as(contract, config.store or run_config.store, tag),
        },
    )


def _stored_as(contract: Mapping[str, Any], store: Path, tag: Path) -> dict[str, Any]:
    """How ingest stored the training volumes: from the contract, or in older ones from the store itself."""
    if isinstance(contract.get("stored_as"), dict):
        return dict(contract["stored_as"])
    try:
        return read_info(store).stored_as
    except DataError as error:
        raise ConfigError(
            f"{tag}: its contract does not say at what spacing volumes were stored, an older mimscale wrote it, and "
            f"the store cannot be asked ({error}); give store=STORE, one that was ingested in the same way"
        ) from None


def _require_agreement(folds: Sequence[_Fold]) -> None:
    """Refuse runs whose probabilities have no mean: other classes, or another input.

    Raises:
        ConfigError: with both values of each key.
    """
    first = folds[0]
    for other in folds[1:]:
        differences = differing_keys(first.must_agree, other.must_agree)
        if first.contract.get("spacing_mm") and other.contract.get("spacing_mm"):
            ratio = _ratio(first.contract["spacing_mm"], other.contract["spacing_mm"])
            if not first.must_agree["target_spacing_mm"] and ratio > first.config.stream.max_spacing_ratio:
                spacings = first.contract["spacing_mm"], other.contract["spacing_mm"]
                differences.append(f"spacing_mm of the training volumes: {spacings[0]!r} -> {spacings[1]!r}")
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise ConfigError(
                f"{first.run_dir} and {other.run_dir} cannot answer together, they were trained on different things:\n"
                f"{lines}\ngive runs of one store and one recipe, or predict with each alone"
            )


def warn_of_spacing(ensemble: Ensemble, name: str, spacing_mm: Sequence[float]) -> None:
    """Say so when an input's voxels are of another size than any that the networks were trained on."""
    if ensemble.networks[0].target_mm is not None or ensemble.spacing_mm is None:
        return
    if _ratio(ensemble.spacing_mm, spacing_mm) > ensemble.max_spacing_ratio:
        seen, trained = (" x ".join(f"{edge:g}" for edge in edges) for edges in (spacing_mm, ensemble.spacing_mm))
        say(f"{name}: voxels of {seen} mm (z, y, x), the networks were trained on about {trained}: do not trust it")


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return max(max(a / b, b / a) for a, b in zip(one, other, strict=True))
