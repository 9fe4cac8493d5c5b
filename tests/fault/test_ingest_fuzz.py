"""Damaged files of every format end as a scan or as a typed reason: no other exception, no hang, no memory."""

import bz2
import gzip
import json
import re
import resource
import time
import zlib
from collections import Counter

import dicom_samples
import nibabel
import numpy as np
import pydicom.uid as uid
import pytest
import SimpleITK as sitk

from mimscale.ingest.formats import REASONS, QuarantineError, ReadOptions, SourceFile, read_scan
from mimscale.ingest.formats.dicom_series import find_series

DAMAGED = 1_000
SLOWEST_S = 10.0
MORE_MEMORY_BYTES = 2**30  # samples have a few kB
VOXELS = np.random.default_rng(0).integers(-50, 900, (8, 7, 6)).astype(np.int16)
HEADER_BYTES = 400
DICOM_HEADER = slice(128, 1200)
ABSURD = [b"\xff", b"\x7f", b"\0", b"\x80", b"\x01"]
ABSURD_WORDS = [
    b"999999999999",
    b"1000000 1000000 1000000",
    b"-1",
    b"0",
    b"nan",
    b"1e308",
    b"",
    b"x",
    b"1e-320",
    b"(1,2",
]


def nifti(folder):
    image = nibabel.Nifti1Image(VOXELS, np.diag([1.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(2, 1)
    return {"a.nii": image.to_bytes()}


def nifti2(folder):
    return {"a.nii": nibabel.Nifti2Image(VOXELS, np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()}


def nifti_gz(folder):
    return {"a.nii.gz": gzip.compress(nifti(folder)["a.nii"], 1)}


def nifti_pair(folder):
    nibabel.save(nibabel.Nifti1Pair(VOXELS, np.eye(4)), folder / "a.hdr")
    return {name: (folder / name).read_bytes() for name in ("a.hdr", "a.img")}


def mgh(folder):
    return {"a.mgh": nibabel.MGHImage(VOXELS, np.eye(4)).to_bytes()}


def mgz(folder):
    return {"a.mgz": gzip.compress(mgh(folder)["a.mgh"], 1)}


def itk(folder, *names, compressed=False):
    image = sitk.GetImageFromArray(VOXELS)
    sitk.WriteImage(image, str(folder / names[0]), useCompression=compressed)
    return {name: (folder / name).read_bytes() for name in names}


def nrrd(folder):
    return itk(folder, "a.nrrd")


def nrrd_gz(folder):
    return itk(folder, "a.nrrd", compressed=True)


def nrrd_bz2(folder):
    header, voxels = nrrd(folder)["a.nrrd"].split(b"\n\n", 1)
    return {"a.nrrd": header.replace(b"encoding: raw", b"encoding: bzip2") + b"\n\n" + bz2.compress(voxels)}


def nhdr(folder):
    return itk(folder, "a.nhdr", "a.raw")


def mha(folder):
    return itk(folder, "a.mha")


def mha_zlib(folder):
    return itk(folder, "a.mha", compressed=True)


def mhd(folder):
    return itk(folder, "a.mhd", "a.raw")


def npy(folder):
    np.save(folder / "a.npy", VOXELS)
    sidecar = json.dumps({"spacing_mm": [1, 2, 3]}).encode()
    return {"a.npy": (folder / "a.npy").read_bytes(), "a.json": sidecar}


def npz(folder):
    np.savez_compressed(folder / "a.npz", VOXELS)
    return {"a.npz": (folder / "a.npz").read_bytes(), "a.json": npy(folder)["a.json"]}


def saved(datasets, folder):
    return {path.name: path.read_bytes() for path in dicom_samples.save(datasets, folder)}


def dicom(folder):
    return saved(dicom_samples.slices(VOXELS[:5], RescaleSlope=1, KVP=120), folder)


def dicom_frames(folder):
    return saved([dicom_samples.multi_frame(VOXELS[:5], slopes=[1] * 5)], folder)


def compressed(folder, syntax):
    return saved(dicom_samples.compress(dicom_samples.slices(np.tile(VOXELS[:4], (1, 3, 3))), syntax), folder)


def dicom_rle(folder):
    return compressed(folder, uid.RLELossless)


def dicom_jpeg(folder):
    return compressed(folder, uid.JPEGLosslessSV1)


def dicom_jpeg_ls(folder):
    return compressed(folder, uid.JPEGLSLossless)


def dicom_jpeg_2000(folder):
    return compressed(folder, uid.JPEG2000Lossless)


COMPRESSED_DICOM = (dicom_rle, dicom_jpeg, dicom_jpeg_ls, dicom_jpeg_2000)  # a quarter of the damage each


def damaged(data, random):
    """One random damage of a file, mostly of its header."""
    if data[:2] == b"\x1f\x8b" and random.random() < 0.7:  # damage what was compressed, not the compression
        return gzip.compress(damaged(gzip.decompress(data), random), 1)
    out = bytearray(data)
    first, last = (DICOM_HEADER.start, DICOM_HEADER.stop) if data[128:132] == b"DICM" else (0, HEADER_BYTES)
    if random.random() < 0.3:  # of the header or of everything
        last = len(out)

    def somewhere():
        return int(random.integers(min(first, len(out) - 1), min(last, len(out))))

    at, width = somewhere(), int(random.choice([1, 2, 4, 8]))
    match random.integers(7):
        case 0:  # flipped bits
            for _ in range(random.integers(1, 6)):
                out[somewhere()] ^= 1 << int(random.integers(8))
        case 1:  # cut
            del out[int(random.integers(len(out))) :]
        case 2:  # an absurd number
            out[at : at + width] = ABSURD[int(random.integers(len(ABSURD)))] * width
        case 3:  # random bytes
            out[at : at + width] = random.bytes(width)
        case 4:  # two fields swapped
            other = somewhere()
            out[at : at + width], out[other : other + width] = out[other : other + width], out[at : at + width]
        case 5:  # bytes too many, and others lost
            out[at:at] = random.bytes(width)
            del out[(end := somewhere()) : end + width]
        case 6:  # a word of text replaced, or lost
            words = list(re.finditer(rb"[\w.+-]+", bytes(out[first:last])))
            if words:
                word = words[int(random.integers(len(words)))]
                out[first + word.start() : first + word.end()] = ABSURD_WORDS[int(random.integers(len(ABSURD_WORDS)))]
    return bytes(out)


@pytest.fixture
def bounded_memory():
    """Refuse more address space than this process has, and a gigabyte."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
    "sample",
    [
        *(nifti, nifti2, nifti_gz, nifti_pair, mgh, mgz, nrrd, nrrd_gz, nrrd_bz2, nhdr, mha, mha_zlib, mhd, npy, npz),
        *(dicom, dicom_frames, *COMPRESSED_DICOM),
    ],
)
def test_damaged_files_are_scans_or_have_a_reason(tmp_path, sample):
    files = sample(tmp_path)
    options = ReadOptions(assume_orientation=True)
    whole = read_scan([SourceFile(tmp_path / name, data) for name, data in files.items()], options)
    random = np.random.default_rng(zlib.crc32(sample.__name__.encode()))
    outcomes = Counter()
    slowest_s = 0.0
    count = DAMAGED // 4 if sample in COMPRESSED_DICOM else DAMAGED
    for _ in range(count):
        victim = list(files)[int(random.integers(len(files)))]
        bad = {**files, victim: damaged(files[victim], random)}
        start = time.perf_counter()
        try:
            scan = read_scan([SourceFile(tmp_path / name, data) for name, data in bad.items()], options)
        except QuarantineError as error:
            outcomes[error.reason] += 1
        else:
            outcomes["scan"] += 1
            assert scan.voxels.ndim == 4
            assert scan.voxels.dtype.name in ("uint8", "int16", "uint16", "float32")
            assert np.isfinite(scan.voxels).all()
            assert np.isfinite(scan.affine).all()
        slowest_s = max(slowest_s, time.perf_counter() - start)
    assert whole.voxels.size > 0
    assert slowest_s < SLOWEST_S
    assert outcomes["scan"] < count  # some damage was found: the loop does what it says
    assert len(outcomes) > 2


def test_every_damaged_slice_is_in_exactly_one_series(tmp_path):
    paths = dicom_samples.save(dicom_samples.slices(VOXELS[:5]), tmp_path / "dicom")
    whole = {path: path.read_bytes() for path in paths}
    random = np.random.default_rng(0)
    problems = Counter()
    for _ in range(DAMAGED // 4):
        victim = paths[int(random.integers(len(paths)))]
        victim.write_bytes(damaged(whole[victim], random))
        series = find_series(paths)
        assert sorted(path for one in series for path in one.files) == paths
        problems.update(one.problem[0] for one in series if one.problem)
        victim.write_bytes(whole[victim])
    assert problems.keys() <= REASONS.keys()
    assert problems["unreadable"] > 0
