"""Masks as files: each is there as a whole or not at all, and none that is there is lost unasked.

out/NAME.nii.gz            classes, on the grid of the source
out/NAME/REGION.nii.gz     regions, a mask each
out/NAME.dcm               DICOM-SEG: a segment for each class but the background, or for each region
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimscale import durable
from mimscale.errors import DataError
from mimscale.evaluate.outputs import Classes, Regions, file_name
from mimscale.evaluate.volumes import write_nifti
from mimscale.predict.config import PredictConfig
from mimscale.predict.inputs import Input
from mimscale.predict.volume import Masks

_WAY_OUT = "free some space, or choose another folder: out=DIR"


@dataclass(frozen=True)
class Destination:
    """Something that is written of an input."""

    kind: Literal["nifti", "dicom-seg"]
    path: Path


def destinations(one: Input, outputs: Classes | Regions, config: PredictConfig) -> list[Destination]:
    """What is to be written of an input.

    Raises:
        DataError: DICOM-SEG of what is no DICOM.
    """
    kind = config.format
    if kind == "auto":
        kind = "dicom-seg" if one.is_dicom else "nifti"
    if kind != "nifti" and not one.is_dicom:
        raise DataError(
            f"{one.typed}: is no DICOM, and DICOM-SEG refers to the instances that it was made of; format=nifti writes "
            "a NIfTI on the grid of the input"
        )
    nifti = config.out / (one.name if isinstance(outputs, Regions) else f"{one.name}.nii.gz")
    both = [Destination("nifti", nifti), Destination("dicom-seg", config.out / f"{one.name}.dcm")]
    return both if kind == "both" else [place for place in both if place.kind == kind]


def still_to_write(places: Sequence[Destination], config: PredictConfig) -> list[Destination]:
    """Those of `places` that are to be written, by what is there and `existing`.

    Raises:
        DataError: one is there and may be neither overwritten nor skipped.
    """
    there = [place for place in places if os.path.lexists(place.path)]
    if config.existing == "overwrite" or not there:
        return list(places)
    if config.existing == "refuse":
        raise DataError(
            f"{there[0].path}: exists; existing=skip leaves it and goes on, existing=overwrite replaces it, "
            "out=DIR writes elsewhere"
        )
    return [place for place in places if place not in there]


def write_masks(path: Path, masks: Masks, outputs: Classes | Regions) -> None:
    """Write NIfTI: one file of classes, or a folder with a mask of each region.

    Raises:
        DataError: it cannot be written.
    """
    affine = masks.affine.reshape(-1).tolist()
    if isinstance(outputs, Classes):
        _remove_folder(path)
        write_nifti(path, masks.voxels, affine, _WAY_OUT)
        return
    temporary = path.with_name(f"{durable.TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        for name, voxels in zip(outputs.names, masks.voxels, strict=True):
            write_nifti(temporary / f"{file_name(name)}.nii.gz", voxels, affine, _WAY_OUT)
        with durable.explained(DataError, path, _WAY_OUT):
            _remove_folder(path)
            path.unlink(missing_ok=True)
            durable.rename_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_folder(path: Path) -> None:
    """Make room for what replaces a folder: only a file can be replaced in one step."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
