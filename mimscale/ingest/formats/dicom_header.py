"""The header of one DICOM file: what a volume needs of it, as plain numbers.

pydicom parses. Whatever it cannot parse is `unreadable`; it repeats values of the header in its own messages and
warnings, so none of these is passed on.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pydicom
import pydicom.config
import pydicom.multival
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from mimscale.ingest.formats.reasons import QuarantineError

# Their logs repeat what headers hold, and the names of files; what is wrong with a file becomes a reason anyway.
for _library in ("pydicom", "pylibjpeg", "openjpeg", "jpeg_ls"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)

_PREAMBLE_BYTES = 128
_PREFIX = b"DICM"
_BARE_STARTS = (b"\x08\x00", b"\x02\x00")  # the first group of files that were written without a preamble
_META_BYTES = 2**16  # the transfer syntax stands at the very start
_PIXEL_DATA = b"\x7f\xe0\x00\x10"
MODALITIES = {"CT": "ct", "MR": "mr", "PT": "pt", "NM": "nm", "US": "us", "XA": "xa", "MG": "mg"}  # of scans
_NO_SCANS = {"SEG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT", "SR", "PR", "KO", "REG", "DOC", "FID", "ECG", "SC", "OT"}
_SOP_CLASSES_WITHOUT_SCANS = (
    "1.2.840.10008.1.3.10",  # DICOMDIR
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture: screenshots and dose sheets
    "1.2.840.10008.5.1.4.1.1.66",  # registrations, segmentations, surfaces
    "1.2.840.10008.5.1.4.1.1.481",  # radiotherapy
)
_COLOURS = ("RGB", "YBR", "PALETTE", "HSV", "CMYK", "ARGB")
# What is parsed of a file; everything else is skipped.
TAGS = [
    *("SpecificCharacterSet", "SOPClassUID", "Modality", "ImageType", "BurnedInAnnotation", "LossyImageCompression"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelPaddingValue"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "InstanceNumber"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of one file."""

    dataset: Any  # pydicom.Dataset of the fields that were asked for
    transfer_syntax: str
    implicit: bool  # whether elements have no type
    little_endian: bool
    pixels_at: int | None  # byte of the pixel data element

    def texts(self, name: str) -> tuple[str, ...]:
        """The values of a field as text; none when it is not there."""
        value = self.dataset.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, pydicom.multival.MultiValue) else [value]
        return tuple(str(one).strip() for one in values)

    def text(self, name: str) -> str:
        """A field as text, empty when it is not there."""
        return "\\".join(self.texts(name))

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number that must be there, unless there is a default.

        Raises:
            QuarantineError: unreadable.
        """
        found = numbers(self.dataset, name, 1)
        if found is not None:
            return int(found[0])
        if default is None:
            raise QuarantineError("unreadable", f"the header has no {name}")
        return default


@contextmanager
def parsing() -> Iterator[None]:
    """Turn what pydicom and the decoders raise into `unreadable`, and keep what they would say out of the logs."""
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except (QuarantineError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails anywhere in them, and must not stop the others
        raise QuarantineError("unreadable", f"damaged ({type(error).__name__})") from None


def read_header(stream: IO[bytes], tags: Sequence[str] = TAGS) -> Header:
    """Read up to the pixel data.

    Raises:
        QuarantineError: not_dicom, unreadable, unsupported_encoding.
    """
    head = stream.read(_META_BYTES)
    stream.seek(0)
    if head[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4] != _PREFIX and head[:2] not in _BARE_STARTS:
        raise QuarantineError("not_dicom", "neither a DICOM prefix nor a first DICOM group")
    if DeflatedExplicitVRLittleEndian.encode() in head:  # pydicom would inflate all of it, without a bound
        raise QuarantineError("unsupported_encoding", "a deflated data set")
    with parsing():
        dataset: Any = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(tags), force=True)
        for _ in dataset.iterall():  # values are converted when they are first looked at: here, and nowhere else
            pass
        pixels_at = stream.tell()
        tag = stream.read(4)
        implicit, little_endian = dataset.original_encoding
        number = tag[1::-1] + tag[:1:-1] if little_endian else tag
        if number[:2] != _PIXEL_DATA[:2]:
            at = None
        elif number == _PIXEL_DATA:
            at = pixels_at
        else:
            raise QuarantineError("unsupported_dtype", "voxels as floats, which only parametric maps have")
        syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or ImplicitVRLittleEndian)
        return Header(
            dataset=dataset,
            transfer_syntax=syntax,
            implicit=bool(implicit),
            little_endian=bool(little_endian),
            pixels_at=at,
        )


def require_scan(header: Header) -> None:
    """Refuse what is no slice of a volume of intensities.

    Raises:
        QuarantineError: not_an_image, missing_pixels, localizer, colour.
    """
    modality, sop_class = header.text("Modality"), header.text("SOPClassUID")
    if sop_class.startswith(_SOP_CLASSES_WITHOUT_SCANS) or modality in _NO_SCANS:
        raise QuarantineError("not_an_image", "its class or modality is not that of a scan")
    if header.pixels_at is None:
        if "Rows" in header.dataset or modality in MODALITIES:
            raise QuarantineError("missing_pixels", "the header is that of a scan, no pixels follow")
        raise QuarantineError("not_an_image", "it has neither rows nor pixels")
    if "LOCALIZER" in header.texts("ImageType"):
        raise QuarantineError("localizer", "its image type says so")
    colour = header.text("PhotometricInterpretation").startswith(_COLOURS)
    if colour or header.count("SamplesPerPixel", 1) != 1:
        raise QuarantineError("colour", "several samples a pixel, or a palette")


def numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers of a field, or None when it is empty or not there.

    Raises:
        QuarantineError: unreadable, for something else in it.
    """
    value = dataset.get(name)
    if value is None or value == "":
        return None
    try:
        values = tuple(float(one) for one in ([value] if count == 1 else value))
    except (TypeError, ValueError, OverflowError):
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise QuarantineError("unreadable", f"{name} is not {count} finite numbers")
    return values
