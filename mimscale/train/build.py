"""A run's config -> its model, and the contract that travels with its weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mimscale.config import config_tree, tree_hash
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.simclr import Simclr
from mimscale.models.simmim import Simmim
from mimscale.store.layout import StoreInfo
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig

if TYPE_CHECKING:
    from mimscale.models.probe import LinearProbe
    from mimscale.models.unetr import Unetr


def build_pretrain(config: PretrainConfig, channels: int) -> MaskedAutoencoder | Simmim | Simclr:
    """The network of a pretraining run: an encoder, and what its method needs around it."""
    crop, patch = config.crop_voxels, config.patch_voxels
    match config.method:
        case "mae":
            return MaskedAutoencoder(config.model, config.mae, crop_voxels=crop, patch_voxels=patch, channels=channels)
        case "simmim":
            return Simmim(config.model, config.simmim, crop_voxels=crop, patch_voxels=patch, channels=channels)
        case "simclr":
            return Simclr(config.model, config.simclr, crop_voxels=crop, patch_voxels=patch, channels=channels)


def build_segmenter(config: FinetuneConfig, channels: int) -> "Unetr | LinearProbe":
    """The network of a fine-tuning run."""
    # They bring MONAI, which takes half of all imports, and pretraining needs none.
    from mimscale.models.probe import LinearProbe
    from mimscale.models.unetr import Unetr

    kind = Unetr if config.head == "unetr" else LinearProbe
    model = kind(
        config.model, config.unetr, crop_voxels=config.crop_voxels, patch_voxels=config.patch_voxels, channels=channels
    )
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
    parts = (
        ("model", "method", tree["method"])
        if isinstance(config, PretrainConfig)
        else ("model", "head", "unetr", "regions")
    )
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
