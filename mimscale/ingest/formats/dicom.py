"""A DICOM volume: the slices of a series, or one file of many frames.

X column, Y row, Z slice of the source order
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest.formats import dicom_pixels
from mimscale.ingest.formats.dicom_geometry import FEWEST_SLICES, Plane, stack
from mimscale.ingest.formats.dicom_header import MODALITIES, TAGS, Header, numbers, read_header, require_scan
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions, Scan, SourceFile
from mimscale.ingest.formats.voxels import checked_affine, rescaled, to_stored_dtype

# How a volume was acquired: all that is kept of its headers.
_KEPT_NUMBERS = {
    "kvp": "KVP",
    "slice_thickness_mm": "SliceThickness",
    "field_strength_t": "MagneticFieldStrength",
    "repetition_time_ms": "RepetitionTime",
    "echo_time_ms": "EchoTime",
    "inversion_time_ms": "InversionTime",
    "flip_angle_deg": "FlipAngle",
}
_KEPT_WORDS = {
    "manufacturer": "Manufacturer",
    "model": "ManufacturerModelName",
    "kernel": "ConvolutionKernel",
    "body_part": "BodyPartExamined",
    "sequence": "ScanningSequence",
}
# Read only so that what they hold can be kept out of the words above: people write anything anywhere.
_PRIVATE = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "AccessionNumber", "InstitutionName"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "StationName"),
)
_PLAIN_WORDS = re.compile(r"[A-Za-z0-9 ._/+-]{1,64}")
_NUMBER_OF_SOMEBODY = re.compile(r"\d{6}|\d+\.\d+\.\d+")  # a date, an identifier, a UID
# Functional groups of one frame, then those that all frames share; None in a file of a single slice.
Groups = tuple[Any, Any] | None


def read_dicom(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """The slices of one series in any order, or one multi-frame file.

    Raises:
        QuarantineError: see REASONS.
    """
    if options.channels != 1:
        raise QuarantineError("not_3d", f"a DICOM series has one channel, channels={options.channels}")
    tags = [*TAGS, *_KEPT_NUMBERS.values(), *_KEPT_WORDS.values(), *_PRIVATE]
    headers = [read_header(io.BytesIO(file.data), tags) for file in files]
    for header in headers:
        require_scan(header)
    shapes = [dicom_pixels.frame_shape(file.data, header, options) for file, header in zip(files, headers, strict=True)]
    if len({shape[1:] for shape in shapes}) > 1:
        raise QuarantineError("mixed_grids", "slices differ in rows or columns")
    count, (rows, columns) = sum(shape[0] for shape in shapes), shapes[0][1:]
    if count < FEWEST_SLICES:
        raise QuarantineError("too_few_slices", f"{count} slices, {FEWEST_SLICES} needed")
    dtype = np.result_type(*(dicom_pixels.raw_dtype(header) for header in headers))
    if count * rows * columns * dtype.itemsize > options.max_volume_bytes:
        raise QuarantineError("too_large", f"{count} slices of {rows} x {columns} pixels")
    frames = [frame for header, shape in zip(headers, shapes, strict=True) for frame in _frames(header, shape[0])]
    order, affine = stack([_plane(header, groups) for header, groups in frames])
    affine = checked_affine(affine)
    slopes, intercepts = np.array([_rescale(header, groups) for header, groups in frames])[order].T
    raw = np.empty((count, rows, columns), dtype)
    place = iter(np.argsort(order))  # of each frame among the slices
    for file, header, shape in zip(files, headers, shapes, strict=True):
        for frame in dicom_pixels.frames(file.data, header, shape):
            raw[next(place)] = frame
    voxels = rescaled(raw.transpose(2, 1, 0)[None], slopes, intercepts, overwrite=True)  # [1, X, Y, Z]
    return Scan(
        voxels=to_stored_dtype(voxels),
        affine=affine,
        modality=MODALITIES.get(headers[0].text("Modality")),
        header=_acquisition(headers[0]),
        warnings=_warnings(headers),
        padding_value=_padding_value(headers, slopes, intercepts),
    )


def planes_of(header: Header, count: int) -> list[Plane]:
    """Where each of the `count` frames of a file lies, in the order of the file.

    Raises:
        QuarantineError: no_orientation, no_spacing, truncated, unreadable.
    """
    return [_plane(header, groups) for header, groups in _frames(header, count)]


def _frames(header: Header, count: int) -> list[tuple[Header, Groups]]:
    """Each frame's header and functional groups."""
    own = header.dataset.get("PerFrameFunctionalGroupsSequence")
    if own is None:
        if count > 1:
            raise QuarantineError("no_orientation", "many frames, and no word where each of them lies")
        return [(header, None)]
    if len(own) != count:
        raise QuarantineError("truncated", f"{len(own)} frames are described, {count} promised")
    shared = header.dataset.get("SharedFunctionalGroupsSequence") or [{}]
    return [(header, (item, shared[0])) for item in own]


def _group(header: Header, groups: Groups, name: str) -> Any:
    """The data set that holds the fields of a functional group; in a file of one frame, the whole header."""
    if groups is None:
        return header.dataset
    for group in groups:
        found = group.get(name)
        if found:
            return found[0]
    return {}


def _plane(header: Header, groups: Groups) -> Plane:
    position = numbers(_group(header, groups, "PlanePositionSequence"), "ImagePositionPatient", 3)
    directions = numbers(_group(header, groups, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    spacing_mm = numbers(_group(header, groups, "PixelMeasuresSequence"), "PixelSpacing", 2)
    if position is None or directions is None:
        raise QuarantineError("no_orientation", "a slice without ImagePositionPatient or ImageOrientationPatient")
    if spacing_mm is None or min(spacing_mm) <= 0:
        raise QuarantineError("no_spacing", "a slice without PixelSpacing")
    return Plane(position=position, directions=directions, spacing_mm=spacing_mm)


def _rescale(header: Header, groups: Groups) -> tuple[float, float]:
    if header.dataset.get("ModalityLUTSequence"):
        raise QuarantineError("bad_rescale", "a lookup table instead of slope and intercept")
    fields = _group(header, groups, "PixelValueTransformationSequence")
    slope, intercept = numbers(fields, "RescaleSlope", 1), numbers(fields, "RescaleIntercept", 1)
    return slope[0] if slope else 1.0, intercept[0] if intercept else 0.0


def _padding_value(
    headers: Sequence[Header], slopes: NDArray[np.float64], intercepts: NDArray[np.float64]
) -> float | None:
    """PixelPaddingValue after rescale, when all slices have the same."""
    values = set()
    for header in headers:
        found = numbers(header.dataset, "PixelPaddingValue", 1)
        if found is None:
            return None
        raw, bits = found[0], header.count("BitsAllocated")
        if header.count("PixelRepresentation", 0) and raw >= 2 ** (bits - 1):
            raw -= 2**bits  # its type in the file is wrong often: that of the pixels counts
        values.add(raw)
    if len(values) > 1 or np.ptp(slopes) > 0 or np.ptp(intercepts) > 0:
        return None
    return float(values.pop() * slopes[0] + intercepts[0])


def _warnings(headers: Sequence[Header]) -> tuple[str, ...]:
    words = []
    if any(header.text("BurnedInAnnotation") == "YES" for header in headers):
        words.append("burned_in_annotation")
    if any(
        header.text("LossyImageCompression") == "01" or header.transfer_syntax in dicom_pixels.LOSSY
        for header in headers
    ):
        words.append("lossy_compression")
    return tuple(words)


def _acquisition(header: Header) -> dict[str, str]:
    kept = {}
    for name, field in _KEPT_NUMBERS.items():
        value = numbers(header.dataset, field, 1)
        if value is not None:
            kept[name] = f"{value[0]:g}"
    private = {
        word.casefold()
        for field in _PRIVATE
        for word in re.findall(r"\w{3,}", " ".join(header.texts(field)).replace("_", " "))
    }
    for name, field in _KEPT_WORDS.items():
        text = " ".join(header.texts(field))
        named = any(word in text.casefold() for word in private)
        if _PLAIN_WORDS.fullmatch(text) and not _NUMBER_OF_SOMEBODY.search(text) and not named:
            kept[name] = text
    return kept
