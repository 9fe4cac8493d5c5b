"""Masks as a DICOM segmentation of the series that they were made of. highdicom writes the object.

    X column, Y row, Z slice of the source order | K segments

Each frame refers to the instance that it lies on, and has that instance's position as it stands in its header.
"""

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.valuerep import DA, TM

from mimscale import durable
from mimscale.console import say
from mimscale.errors import ConfigError, DataError
from mimscale.ingest.formats.dicom import planes_of
from mimscale.ingest.formats.dicom_geometry import stack
from mimscale.ingest.formats.dicom_header import Header, parsing

for _library in ("highdicom", "pydicom"):  # their logs repeat what headers hold
    logging.getLogger(_library).setLevel(logging.CRITICAL)

SCHEME = "99MIMSCALE"  # of codes that nobody gave: a class means what the run's store calls it
_LONG, _SHORT = 64, 16  # characters that DICOM allows a label and a code
# Must be there, and may be empty. Anonymisers leave them out.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    "StudyTime",
)
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
_SEXES = ("", "M", "F", "O")
_OWN_SERIES_NUMBERS = 1000  # are added to that of the source
_WAY_OUT = "write NIfTI instead: format=nifti"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What a segment is called, and what it is."""

    name: str
    code: tuple[str, str, str] | None  # scheme, code and meaning; None: its name is all that is known


class _Masks(np.ndarray[Any, Any]):
    """Masks whose sum over at most 255 segments stays in their 8 bits: highdicom asks for it to find overlaps.

    numpy's own would take 8 bytes a voxel, the largest array of a prediction.
    """

    def sum(self, axis: Any = None, **words: Any) -> Any:  # type: ignore[override]
        return super().sum(axis=axis, **{"dtype": np.uint8, **words})


def require_highdicom() -> None:
    """Raise ConfigError when the library that writes the object is not installed."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise ConfigError(
            "DICOM-SEG is written by highdicom, which is not installed: pip install 'mimscale[dicom-seg]', or "
            "write NIfTI (format=nifti)"
        ) from None


def write_dicom_seg(
    path: Path, masks: NDArray[np.uint8], files: Sequence[str], segments: Sequence[Segment], algorithm: str
) -> None:
    """Write a segmentation, complete or not at all.

    Args:
        path: of the file.
        masks: segment numbers from 1 on [X, Y, Z], or a mask of each segment [K, X, Y, Z]; slices in the order of
            their positions.
        files: of the series, in any order, or one file of many frames.
        segments: number 1, 2, ...
        algorithm: a name for what drew them.

    Raises:
        QuarantineError: headers that cannot be read any more.
        DataError: headers that no segmentation can refer to, or a file that cannot be written.
    """
    with _quiet():
        sources, frames = _sources(files)
    by_frame = masks.transpose(2, 1, 0) if masks.ndim == 3 else masks.transpose(3, 2, 1, 0)  # [Z, Y, X(, K)]
    if frames != list(range(len(frames))):
        by_frame = by_frame[np.argsort(frames)]
    way_out = "free some space, or choose another folder: out=DIR"
    with _quiet():
        segmentation = _segmentation(sources, by_frame.view(_Masks), segments, algorithm)
    with _quiet(), durable.explained(DataError, path, way_out), durable.open_atomically(path) as file:
        pydicom.dcmwrite(file, segmentation, enforce_file_format=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Values that are not quite DICOM's pass as they came; nothing that a header holds goes into a log."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _sources(files: Sequence[str]) -> tuple[list[Any], list[int]]:
    """The instances in the order of their positions, and for each place which frame of them is there."""
    with parsing():
        found: list[Any] = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    for one in found:
        missing = [name for name in _NEEDED if not one.get(name)]
        if missing:
            raise DataError(f"a DICOM header without {', '.join(missing)}, which a segmentation must name; {_WAY_OUT}")
    planes = [plane for one in found for plane in planes_of(_header(one), int(one.get("NumberOfFrames") or 1))]
    order, affine = stack(planes)
    step_mm = float(np.linalg.norm(affine[:3, 2]))
    for one in found:
        _complete(one, step_mm)
        if one.get("ImageOrientationPatient"):  # equal but for what a reader tolerates; highdicom tolerates nothing
            one.ImageOrientationPatient = found[0].ImageOrientationPatient
    if len(found) == 1:
        return found, order
    return [found[index] for index in order], list(range(len(order)))


def _header(dataset: Any) -> Header:
    return Header(dataset=dataset, transfer_syntax="", implicit=False, little_endian=True, pixels_at=None)


def _complete(dataset: Any, step_mm: float) -> None:
    """Put right in memory what highdicom would copy as it is, or refuse."""
    for name in _MAY_BE_EMPTY:
        if name not in dataset or dataset.get(name) is None:
            setattr(dataset, name, "")
    for name, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            kind(dataset.get(name))
        except ValueError:
            _leave_empty(dataset, name)
    if dataset.PatientSex not in _SEXES:
        _leave_empty(dataset, "PatientSex")
    measures = dataset
    if "SharedFunctionalGroupsSequence" in dataset or "PerFrameFunctionalGroupsSequence" in dataset:
        measures = _shared_measures(dataset)
    # Positions say how far apart slices are. The field that should say so is wrong often.
    measures.SpacingBetweenSlices = pydicom.valuerep.format_number_as_ds(step_mm)
    if not measures.get("SliceThickness"):
        measures.SliceThickness = measures.SpacingBetweenSlices


def _shared_measures(dataset: Any) -> Any:
    """Pixel measures that all frames share; they and the orientation may stand in each frame alone."""
    if not dataset.get("SharedFunctionalGroupsSequence"):
        dataset.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    shared, first = dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence[0]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if not shared.get(name):
            setattr(shared, name, first.get(name))
    return shared.PixelMeasuresSequence[0]


def _leave_empty(dataset: Any, name: str) -> None:
    say(f"{name} of the source is no value that DICOM knows; it stays empty in the segmentation")
    setattr(dataset, name, "")


def _segmentation(sources: list[Any], masks: Any, segments: Sequence[Segment], algorithm: str) -> Any:
    import highdicom

    family = codes.cid7162.ArtificialIntelligence
    own = version("mimscale")
    identification = highdicom.AlgorithmIdentificationSequence(name=algorithm[:_LONG], family=family, version=own)
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=segment.name[:_LONG],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=highdicom.sr.CodedConcept(*_code(segment)),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=identification,
        )
        for number, segment in enumerate(segments, start=1)
    ]
    try:
        return highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=masks,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=described,
            series_instance_uid=highdicom.UID(),
            series_number=_OWN_SERIES_NUMBERS + math.floor(float(sources[0].get("SeriesNumber") or 0)),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="mimscale",
            manufacturer_model_name="mimscale predict",
            software_versions=own,
            device_serial_number="0",
            content_description=algorithm[:_LONG],
            series_description=f"mimscale {algorithm}"[:_LONG],
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        # Without its words: they may hold what a header holds.
        raise DataError(
            f"highdicom refuses the headers of this series ({type(error).__name__} in {_where(error)}); {_WAY_OUT}"
        ) from error


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else trace.tb_frame.f_code.co_name


def _code(segment: Segment) -> tuple[str, str, str]:
    """Value, scheme and meaning."""
    if segment.code is not None:
        scheme, value, meaning = segment.code
        return value, scheme, meaning
    name = segment.name
    value = name if len(name) <= _SHORT else hashlib.blake2b(name.encode(), digest_size=_SHORT // 2).hexdigest()
    return value, SCHEME, name[:_LONG]


def segments_of(names: Sequence[str], given: Mapping[str, tuple[str, str, str]]) -> list[Segment]:
    """Segments of these names.

    Raises:
        ConfigError: a code for something that is not among them, or one that DICOM has no room for.
    """
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise ConfigError(f"codes: names {', '.join(unknown)}; the networks draw {', '.join(names)}")
    for name, (scheme, value, meaning) in given.items():
        if not 0 < len(scheme) <= _SHORT or not value or not 0 < len(meaning) <= _LONG:
            raise ConfigError(
                f"codes.{name}={[scheme, value, meaning]}: give scheme (at most {_SHORT} characters), code and meaning "
                f"(at most {_LONG}), for example [SCT, '10200004', Liver]"
            )
    return [Segment(name=name, code=given.get(name)) for name in names]
