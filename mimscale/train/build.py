"""A run's config -> its model, and the contract that travels with its weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mimscale.config import config_tree, tree_hash
from mimscale.store.layout import StoreInfo
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig

if TYPE_CHECKING:
    from torch import nn


def build_pretrain(config: PretrainConfig, channels: int) -> "nn.Module":
    """The network of a pretraining run: an encoder, and what its method needs around it."""
    return config.network.build(config, channels)


def build_segmenter(config: FinetuneConfig, channels: int) -> "nn.Module":
    """The network of a fine-tuning run."""
    model = config.network.build(config, channels)
    # So its backward pass is not computed at all, and it has no optimizer state.
    model.encoder.requires_grad_(config.optim.schedule != "frozen")
    return model


def weights_contract(
    config: RunConfig,
    info: StoreInfo,
    *,
    channels: int,
    step: int,
    precision: str,
    overlay: str | None,
    datasets: Sequence[dict[str, Any]],
    spacing_mm: Sequence[float],
) -> dict[str, Any]:
    """What somebody must know to use the weights: architecture, patch, spacing, intensity, axis order, where from.

    `spacing_mm` [Z, Y, X] is the median of the training volumes, unless `target_spacing_mm` says what all were
    resampled to.
    """
    tree = config_tree(config)
    wanted = ["model", *(("method",) if isinstance(config, PretrainConfig) else ("head", "unetr", "regions"))]
    wanted = [key for key in wanted if key not in config.network.absent]
    parts = dict.fromkeys([*wanted, *((config.network.settings_key,) if config.network.settings is not None else ())])
    labelled = isinstance(config, FinetuneConfig) and overlay is not None
    return {
        "contract_version": 1,
        "kind": tree["kind"],
        **{key: tree[key] for key in parts},
        "channels": channels,
        "crop_voxels": tree["crop_voxels"],
        "patch_voxels": tree["patch_voxels"],
        "axis_order": "CZYX, RAS+",
        "spacing_mm": list(spacing_mm),
        "target_spacing_mm": tree["stream"]["target_spacing_mm"],
        "intensity": config_tree(info.intensity),
        "modality": info.modality,
        "class_names": list(info.overlays[overlay].class_names) if labelled and overlay is not None else None,
        "datasets": list(datasets),
        "stored_as": info.stored_as,
        "store_ingest_hash": info.ingest_hash,
        "config_hash": tree_hash(tree),
        "trained_in": precision,
        "step": step,
    }
