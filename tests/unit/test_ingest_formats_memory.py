"""Beside the bytes of its files a reader holds one array of voxels, and pieces."""

import bz2
import gzip
import tracemalloc
from pathlib import Path

import dicom_samples
import nibabel
import numpy as np
import pytest

from mimscale.ingest.formats import ReadOptions, SourceFile, read_scan

VOXELS = np.random.default_rng(0).integers(0, 9, (64, 256, 256)).astype(np.int16)  # [Z, Y, X], 8 MiB
PIECES_BYTES = 3 * 2**20


def nifti(folder, slope=1.0):
    image = nibabel.Nifti1Image(VOXELS.T, np.eye(4))
    data = bytearray(image.to_bytes())
    data[112:120] = np.array([slope, 0], "<f4").tobytes()
    return [SourceFile(Path("a.nii"), bytes(data))]


def scaled_to_whole_numbers(folder):
    return nifti(folder, slope=2.0)


def scaled_to_float32(folder):
    return nifti(folder, slope=0.5)


def nifti_gz(folder):
    return [SourceFile(Path("a.nii.gz"), gzip.compress(nifti(folder)[0].data, 1))]


def nrrd_bz2(folder):
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nsizes: 256 256 64\nendian: little\nencoding: bzip2\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n\n"
    )
    return [SourceFile(Path("a.nrrd"), header.encode() + bz2.compress(VOXELS.tobytes(), 1))]


def npy(folder):
    np.save(folder / "a.npy", VOXELS)
    return [
        SourceFile(Path("a.npy"), (folder / "a.npy").read_bytes()),
        SourceFile(Path("a.json"), b'{"spacing_mm": [1, 1, 1]}'),
    ]


def npz(folder):
    np.savez_compressed(folder / "a.npz", VOXELS)
    return [SourceFile(Path("a.npz"), (folder / "a.npz").read_bytes()), npy(folder)[1]]


def dicom(folder):
    datasets = dicom_samples.slices(VOXELS.astype(np.uint16), RescaleSlope=1, RescaleIntercept=-1024)
    return [SourceFile(path, path.read_bytes()) for path in dicom_samples.save(datasets, folder)]


@pytest.mark.parametrize(
    ("sample", "arrays"),  # of the size of the volume in 16 bits
    [
        (nifti, 0),
        (npy, 0),
        (nifti_gz, 1),
        (nrrd_bz2, 1),
        (npz, 1),
        (scaled_to_whole_numbers, 1),
        (scaled_to_float32, 2),
        (dicom, 1),
    ],
)
def test_a_reader_holds_one_array(tmp_path, sample, arrays):
    files = sample(tmp_path)
    tracemalloc.start()
    try:
        scan = read_scan(files, ReadOptions())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert scan.voxels.shape == (1, 256, 256, 64)
    assert peak_bytes < arrays * VOXELS.nbytes + PIECES_BYTES
