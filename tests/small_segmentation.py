"""A small labelled store with sources on awkward grids, and untrained runs on it, for tests of evaluate and export."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt
from torch import nn

from mimscale import durable
from mimscale.config import config_tree, config_yaml
from mimscale.ingest.geometry import axis_codes, spacing_zyx_mm, to_store_grid
from mimscale.models.config import MaeConfig, UnetrConfig, VitConfig
from mimscale.models.transfer import save_weights
from mimscale.store import layout
from mimscale.store.intensity import ChannelStats, IntensityContract
from mimscale.store.layout import OverlayInfo, StoreInfo, write_info
from mimscale.store.manifest import write_manifest
from mimscale.store.rows import OverlayRow, VolumeRow
from mimscale.store.writer import PackWriter
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.committed import tag_name
from mimscale.train.config import FinetuneConfig, PretrainConfig

CLASSES = ("background", "grey", "white")
# Background, grey and white are drawn at 20, 320 and 620, so they become 0.02, 0.32 and 0.62.
INTENSITY = IntensityContract(kind="window", window=(0.0, 1000.0))
# Orientation, shape and voxel edges in mm of the sources, along their own axes; the last is smaller than a crop.
SOURCES = {
    "aaaa": ("RAS", (24, 20, 28), (1.0, 1.5, 2.0)),
    "bbbb": ("LPI", (22, 26, 20), (0.5, 1.0, 3.0)),
    "cccc": ("SAL", (12, 30, 18), (2.0, 1.0, 1.0)),
}


class Threshold(nn.Module):
    """Tells the classes apart by intensity, so it is never wrong."""

    def forward(self, windows):
        centres = torch.tensor([0.02, 0.32, 0.62]).view(1, 3, 1, 1, 1)
        return -((windows - centres) ** 2)


@dataclass(frozen=True)
class InMemory:
    """An image [C, Z, Y, X] that gives its planes to a network."""

    image: torch.Tensor

    @property
    def shape(self):
        return tuple(self.image.shape)

    def planes(self, start, stop):
        return self.image[:, start:stop]


def source_affine(codes, shape, spacing_mm):
    """Voxel -> world of an array with these axes: oblique by a few degrees, with an offset."""
    angle = np.deg2rad(7.0)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    order = axcodes2ornt(codes)
    # `shape` and `spacing_mm` are of the source's own axes: bring them to RAS, turn, and go back.
    ras_spacing = np.zeros(3)
    ras_spacing[order[:, 0].astype(int)] = spacing_mm
    ras = np.eye(4)
    ras[:3, :3] = rotation * ras_spacing
    ras[:3, 3] = (-31.0, 12.5, 7.25)
    permutation = np.zeros((4, 4))
    permutation[3, 3] = 1
    for axis, (ras_axis, direction) in enumerate(order):
        permutation[int(ras_axis), axis] = direction
        if direction < 0:
            permutation[int(ras_axis), 3] = shape[axis] - 1
    return ras @ permutation


def source_arrays(shape, seed):
    """Image (int16) and label (uint8) on the source's axes."""
    noise = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in shape), indexing="ij")
    radius = np.sqrt((axes[0] - 0.2) ** 2 + (axes[1] + 0.1) ** 2 + axes[2] ** 2)
    label = (radius < 0.8).astype(np.uint8) + (radius < 0.4)
    image = (label * 300.0 + noise.normal(0, 30, shape) + 20).astype(np.int16)
    return image, label.astype(np.uint8)


def make_store(folder: Path, split="val", labelled=tuple(SOURCES)):
    """Sources as NIfTI in folder/sources, and a store of them in folder/store."""
    (folder / "sources").mkdir(parents=True)
    store = folder / "store"
    arrays = {}
    for number, (volume_id, (codes, shape, spacing_mm)) in enumerate(SOURCES.items()):
        affine = source_affine(codes, shape, spacing_mm)
        assert axis_codes(affine) == codes
        image, label = source_arrays(shape, seed=number)
        nibabel.save(nibabel.Nifti1Image(image, affine), folder / "sources" / f"{volume_id}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), folder / "sources" / f"{volume_id}_label.nii.gz")
        # What a reader of the file sees: NIfTI holds the affine as float32.
        affine = nibabel.load(folder / "sources" / f"{volume_id}.nii.gz").affine
        arrays[volume_id] = (image, label, affine)
    rows = []
    pack = PackWriter(layout.pack_path(store, 0), chunk_voxels=16, codec="zstd")
    overlays = PackWriter(layout.overlay_path(store, "label", 0), chunk_voxels=16, codec="zstd")
    with pack, overlays:
        for volume_id, (image, label, affine) in arrays.items():
            stored, stored_affine = to_store_grid(image, affine)
            spacing = spacing_zyx_mm(stored_affine)
            volume = np.ascontiguousarray(stored[None])
            fill = float(volume.min())
            place = pack.add(volume_id, volume, fill_value=fill, spacing_mm=spacing, attributes={})
            classes = np.ascontiguousarray(to_store_grid(label, affine)[0][None])
            labels = overlays.add(volume_id, classes, fill_value=0, spacing_mm=spacing, attributes={})
            overlay = OverlayRow(
                part=0,
                offset_bytes=labels.offset_bytes,
                length_bytes=labels.length_bytes,
                sha256=labels.sha256,
                source_sha256="0",
                class_voxels=tuple(int((classes == number).sum()) for number in range(3)),
            )
            foreground = volume[volume > 150].astype(float)
            low, middle, high = np.percentile(volume, [0.5, 50, 99.5])
            stats = ChannelStats(
                p0_5=float(low),
                p50=float(middle),
                p99_5=float(high),
                mean=float(volume.mean()),
                std=float(volume.std()),
                foreground_mean=float(foreground.mean()),
                foreground_std=float(foreground.std()),
            )
            rows.append(
                VolumeRow(
                    id=volume_id,
                    subject=volume_id,
                    dataset="test",
                    licence="none",
                    modality="mr",
                    split=split,
                    shape=volume.shape,
                    spacing_mm=spacing,
                    affine=tuple(stored_affine.ravel().tolist()),
                    dtype="int16",
                    part=0,
                    offset_bytes=place.offset_bytes,
                    length_bytes=place.length_bytes,
                    fill_value=fill,
                    sha256=place.sha256,
                    voxels_sha256=volume_id,
                    source_sha256=hashlib.sha256(volume_id.encode()).hexdigest(),
                    source_orientation=axis_codes(affine),
                    source_affine=tuple(affine.ravel().tolist()),
                    source_shape=image.shape,
                    stats=(stats,),
                    foreground_box=tuple((0, edge) for edge in volume.shape[1:]),
                    overlays={"label": overlay} if volume_id in labelled else {},
                )
            )
    write_info(
        store,
        StoreInfo(
            chunk_voxels=16,
            codec="zstd",
            intensity=INTENSITY,
            modality="mr",
            num_parts=1,
            ingest={},
            ingest_hash="0",
            subject_key_fingerprint="0",
            overlays={"label": OverlayInfo(class_names=CLASSES)},
        ),
    )
    write_manifest(store, rows)
    return store


COMMON = {
    "steps": 5,
    "global_batch": 2,
    "micro_batch": 2,
    "crop_voxels": (16, 16, 16),
    "patch_voxels": (8, 8, 8),
    "model": VitConfig(dim=24, depth=3, heads=2),
}


def make_finetune_run(folder: Path, store: Path, outputs=3, fields=None, seed=0, channels=1, **changes) -> Path:
    """A run of `outputs` classes or regions; `fields` are of its config, `changes` of the contract of its weights."""
    unetr = UnetrConfig(feature_size=4, num_classes=outputs)
    config = FinetuneConfig(store=store, run_dir=folder, unetr=unetr, **{**COMMON, **(fields or {})})
    torch.manual_seed(seed)
    model = build_segmenter(config, channels)
    return _with_checkpoint(config, model, CLASSES, {"channels": channels, **changes})


def make_pretrain_run(folder: Path, store: Path, mae=None, **changes) -> Path:
    mae = mae or MaeConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    config = PretrainConfig(store=store, run_dir=folder, mae=mae, **COMMON)
    torch.manual_seed(0)
    return _with_checkpoint(config, build_pretrain(config, 1), None, changes)


def _with_checkpoint(config, model, class_names, changes) -> Path:
    folder = config.run_dir
    durable.write_text(folder / "config.yaml", config_yaml(config))
    tag = folder / "checkpoints" / tag_name(config.steps)
    contract = {
        "kind": config.kind,
        "model": config_tree(config.model),
        "channels": 1,
        "crop_voxels": list(config.crop_voxels),
        "patch_voxels": list(config.patch_voxels),
        "axis_order": "CZYX, RAS+",
        "intensity": config_tree(INTENSITY),
        "modality": "mr",
        "class_names": list(class_names) if class_names else None,
        "step": config.steps,
    }
    save_weights(tag, model.state_dict(), contract | changes)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": durable.sha256_of_file(path)} for path in tag.iterdir()
    }
    (tag / "manifest.json").write_text(json.dumps({"manifest_version": 1, "step": config.steps, "files": files}))
    return folder
