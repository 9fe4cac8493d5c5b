"""Labels of stored volumes on the grid of the source, and arrays as NIfTI files on it.

Z Y X volume, voxels | x y z source file, voxels in the file's own order
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store.layout import source_overlay
from mimscale.store.reader import ShardReader
from mimscale.store.rows import VolumeRow


def read_source_labels(reader: ShardReader, row: VolumeRow, overlay: str) -> NDArray[np.uint8]:
    """An overlay on the grid of the source, turned to RAS+: [Z, Y, X].

    Of a volume that was cropped or resampled that is what its label file held; ingest keeps it beside the overlay.

    Raises:
        DataError: the volume has no such overlay, or it cannot be read.
    """
    twin = source_overlay(overlay)
    name = twin if twin in row.overlays else overlay
    return np.asarray(reader.read_volume(row, name)[0])


def source_spacing_mm(row: VolumeRow) -> tuple[float, float, float]:
    """Voxel edges of the source file along its own axes (x, y, z)."""
    columns = np.asarray(row.source_affine).reshape(4, 4)[:3, :3].T
    x, y, z = (math.hypot(*column) for column in columns)
    return x, y, z


def write_nifti(path: Path, voxels: NDArray[Any], affine: Sequence[float], way_out: str) -> None:
    """Write a .nii or .nii.gz, complete or not at all.

    Args:
        path: its ending decides about compression.
        voxels: (x, y, z) in the file's order, or (x, y, z, channel).
        affine: 16 numbers, voxel -> world (RAS+, mm).
        way_out: what to do when the file cannot be written.

    Raises:
        DataError: the name is no NIfTI's, or the file cannot be written.
    """
    import gzip

    import nibabel

    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: a NIfTI file is named .nii or .nii.gz")
    matrix = np.asarray(affine, dtype=np.float64).reshape(4, 4)
    new_image: Any = nibabel.Nifti1Image  # nibabel is typed in part only
    image = new_image(voxels, matrix, dtype=voxels.dtype)
    # 1 = scanner coordinates in both fields: some programs read the one, some the other.
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1, strip_shears=True)
    if not np.allclose(image.get_qform(), matrix, atol=1e-3):
        image.set_qform(None, code=0)  # a quaternion cannot hold a shear: better none than a wrong one
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    # mtime=0: the same prediction gives the same bytes.
    data = gzip.compress(content, compresslevel=5, mtime=0) if path.name.endswith(".gz") else content
    with durable.explained(DataError, path, way_out):
        durable.write_bytes(path, data)
