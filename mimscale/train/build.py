"""A run's config -> its model, and the contract that travels with its weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mimscale.config import config_tree, tree_hash
from mimscale.models.mae import MaskedAutoencoder
from mimscale.store.layout import StoreInfo
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig

if TYPE_CHECKING:
    from mimscale.models.unetr import Unetr


def build_mae(config: PretrainConfig, channels: int) -> MaskedAutoencoder:
    """The masked autoencoder of a pretraining run."""
    return MaskedAutoencoder(
        config.model, config.mae, crop_voxels=config.crop_voxels, patch_voxels=config.patch_voxels, channels=channels
    )


def build_unetr(config: FinetuneConfig, channels: int) -> "Unetr":
    """The segmentation network of a fine-tuning run."""
    from mimscale.models.unetr import Unetr  # brings MONAI, which takes half of all imports, and pretraining needs none

    return Unetr(
        config.model, config.unetr, crop_voxels=config.crop_voxels, patch_voxels=config.patch_voxels, channels=channels
    )


def weights_contract(
    config: RunConfig,
    info: StoreInfo,
    *,
    channels: int,
    step: int,
    precision: str,
    overlay: str | None,
    datasets: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What somebody must know to use the weights: architecture, patch, spacing, intensity, axis order, where from."""
    tree = config_tree(config)
    architecture: dict[str, Any] = {key: tree[key] for key in ("model", "mae", "unetr") if key in tree}
    return {
        "contract_version": 1,
        "kind": tree["kind"],
        **architecture,
        "channels": channels,
        "crop_voxels": tree["crop_voxels"],
        "patch_voxels": tree["patch_voxels"],
        "axis_order": "CZYX, RAS+",
        "target_spacing_mm": tree["stream"]["target_spacing_mm"],
        "intensity": config_tree(info.intensity),
        "modality": info.modality,
        "class_names": None if overlay is None else list(info.overlays[overlay].class_names),
        "datasets": list(datasets),
        "store_ingest_hash": info.ingest_hash,
        "config_hash": tree_hash(tree),
        "trained_in": precision,
        "step": step,
    }
