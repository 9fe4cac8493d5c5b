"""Files, stores of them and runs on these stores, for tests of `mimscale predict`."""

import json
from pathlib import Path

import dicom_samples
import nibabel
import numpy as np
import torch
from small_segmentation import CLASSES, SOURCES, make_finetune_run, source_affine, source_arrays
from torch import nn

from mimscale.config import config_tree
from mimscale.ingest.config import ImageLabel, IngestConfig
from mimscale.ingest.run import ingest
from mimscale.store.intensity import IntensityContract
from mimscale.store.layout import read_info

ZSCORE = IntensityContract(kind="zscore")
# Neither rows, columns nor the normal run along an axis of the patient.
OBLIQUE = (0.9659258, 0.1830127, 0.1830127, -0.2588190, 0.6830127, 0.6830127)
REGIONS = {"all": ["grey", "white"], "core": ["white"]}


def write_sources(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Image and label of each of SOURCES: oblique, anisotropic, on axes of several orders."""
    folder.mkdir(parents=True)
    paths = {}
    for number, (name, (codes, shape, spacing_mm)) in enumerate(SOURCES.items()):
        affine = source_affine(codes, shape, spacing_mm)
        image, label = source_arrays(shape, seed=number)
        paths[name] = (folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz")
        nibabel.save(nibabel.Nifti1Image(image, affine), paths[name][0])
        nibabel.save(nibabel.Nifti1Image(label, affine), paths[name][1])
    return paths


def write_series(folder: Path, shape=(14, 22, 18), seed=0, **fields) -> tuple[list[Path], np.ndarray]:
    """An oblique MR series of anisotropic voxels, its files named in no order, and its voxels [Z, Y, X]."""
    voxels = source_arrays(shape, seed=seed)[0]
    words = {"directions": OBLIQUE, "modality": "MR", "spacing_mm": (0.8, 0.7), "step_mm": 2.5, **fields}
    datasets = dicom_samples.slices(voxels, **words)
    names = [f"IM{number:04d}" for number in np.random.default_rng(seed).permutation(len(voxels))]
    return dicom_samples.save(datasets, folder, names), voxels


def ingested(store: Path, pairs, intensity=None, **fields) -> Path:
    """A store of pairs of image and label, all of them for training."""
    config = IngestConfig(
        sources=[ImageLabel(image=str(image), label=str(label)) for image, label in pairs],
        out=str(store),
        intensity=intensity or ZSCORE,
        class_names=CLASSES,
        chunk_voxels=16,
        parts=1,
        workers=1,
        val_fraction=0.0,
        **fields,
    )
    ingest(config)
    return store


def run_on(folder: Path, store: Path, seed=0, **fields) -> Path:
    """A run on a store, with random weights and the contract that training would write."""
    info = read_info(store)
    regions = fields.get("regions")
    contract = {
        "intensity": config_tree(info.intensity),
        "modality": info.modality,
        "stored_as": info.stored_as,
        "spacing_mm": [2.0, 1.0, 1.0],
    }
    return make_finetune_run(folder, store, len(regions) if regions else 3, fields, seed, **contract)


def contract_of(run: Path) -> dict:
    return json.loads(next((run / "checkpoints").glob("step_*/contract.json")).read_text())


class Threshold(nn.Module):
    """Tells grey and white from their neighbours by their place in [0, 1], whatever the window."""

    def __init__(self, middles=(0.02, 0.32, 0.62)):
        super().__init__()
        self.middles = torch.tensor(middles).view(1, -1, 1, 1, 1)

    def forward(self, windows):
        return -((windows[:, :1] - self.middles) ** 2)
