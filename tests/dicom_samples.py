"""DICOM series made in a test."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pydicom.pixels
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_CLASSES = {"CT": (CTImageStorage, EnhancedCTImageStorage), "MR": (MRImageStorage, EnhancedMRImageStorage)}


def slices(
    voxels: NDArray[Any],
    *,
    positions: Sequence[Sequence[float]] | None = None,
    directions: Sequence[float] = AXIAL,
    spacing_mm: Sequence[float] = (0.8, 0.7),
    step_mm: float = 2.5,
    modality: str = "CT",
    **fields: Any,
) -> list[Dataset]:
    """One data set a slice of raw voxels [Z, Y, X]; `fields` go into all of them."""
    normal = np.cross(directions[:3], directions[3:])
    if positions is None:
        positions = [np.array([-50.0, -60.0, 70.0]) + normal * step_mm * z for z in range(len(voxels))]
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    found = []
    for number, (pixels, position) in enumerate(zip(voxels, positions, strict=True)):
        dataset = _pixels(pixels, _CLASSES[modality][0], modality)
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = series, study, frame
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [f"{one:.6f}" for one in position]
        dataset.ImageOrientationPatient = [f"{one:.9f}" for one in directions]
        dataset.PixelSpacing = list(spacing_mm)
        dataset.SliceThickness = 3.3  # wrong on purpose, as it often is
        dataset.SpacingBetweenSlices = 9.9
        for name, value in fields.items():
            setattr(dataset, name, value)
        found.append(dataset)
    return found


def multi_frame(
    voxels: NDArray[Any],
    *,
    slopes: Sequence[float] | None = None,
    step_mm: float = 2.5,
    modality: str = "CT",
    directions: Sequence[float] = AXIAL,
) -> Dataset:
    """One enhanced data set of raw voxels [Z, Y, X]."""
    dataset = _pixels(voxels, _CLASSES[modality][1], modality)
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    dataset.NumberOfFrames = len(voxels)
    normal = np.cross(directions[:3], directions[3:])
    shared = Dataset()
    shared.PixelMeasuresSequence = [_group(PixelSpacing=[0.8, 0.7], SliceThickness=3.3)]
    shared.PlaneOrientationSequence = [_group(ImageOrientationPatient=list(directions))]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number in range(len(voxels)):
        frame = Dataset()
        position = [float(one) for one in np.array([-50.0, -60.0, 70.0]) + normal * step_mm * number]
        frame.PlanePositionSequence = [_group(ImagePositionPatient=position)]
        if slopes is not None:
            frame.PixelValueTransformationSequence = [
                _group(RescaleSlope=slopes[number], RescaleIntercept=-1024, RescaleType="HU")
            ]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    return dataset


def _group(**fields: Any) -> Dataset:
    dataset = Dataset()
    for name, value in fields.items():
        setattr(dataset, name, value)
    return dataset


def _pixels(pixels: NDArray[Any], sop_class: str, modality: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality, dataset.PatientID = modality, "P1"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def save(datasets: Sequence[Dataset], folder: Path, names: Sequence[str] | None = None, **options: Any) -> list[Path]:
    """Write the data sets, in files without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, dataset in enumerate(datasets):
        path = folder / (names[number] if names else f"IM{number:04d}")
        pydicom.dcmwrite(path, dataset, enforce_file_format=True, **options)
        paths.append(path)
    return paths


def compress(datasets: Sequence[Dataset], syntax: str, **options: Any) -> list[Dataset]:
    """The data sets with their pixels compressed."""
    encode = {
        JPEGBaseline8Bit: imagecodecs.jpeg8_encode,
        JPEGExtended12Bit: imagecodecs.jpeg8_encode,
        JPEGLossless: partial(imagecodecs.jpeg8_encode, lossless=True, predictor=4),
        JPEGLosslessSV1: partial(imagecodecs.jpeg8_encode, lossless=True, predictor=1),
        JPEGLSLossless: imagecodecs.jpegls_encode,
        JPEG2000Lossless: partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k"),
        RLELossless: None,
    }[syntax]
    for dataset in datasets:
        if encode is None:
            dataset.compress(RLELossless, generate_instance_uid=False)
            continue
        frames = pydicom.pixels.pixel_array(dataset).reshape(-1, dataset.Rows, dataset.Columns)
        if syntax != JPEG2000Lossless:  # the others know no sign
            frames = frames.view(f"u{frames.dtype.itemsize}")
        dataset.PixelData = encapsulate([encode(np.ascontiguousarray(frame), **options) for frame in frames])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    return list(datasets)
