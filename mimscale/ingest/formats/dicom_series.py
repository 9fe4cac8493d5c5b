"""DICOM series in a heap of files: which of them are slices of one volume."""

import filecmp
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom

from mimscale import console
from mimscale.ingest.formats.detached import beside
from mimscale.ingest.formats.dicom_geometry import FEWEST_SLICES, SAME_POSITION_MM, Plane, same_orientation
from mimscale.ingest.formats.dicom_header import TAGS, Header, numbers, parsing, read_header, require_scan
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.pool import process_pool

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")  # long, and for the reader only
# What parts slices at one position into several volumes, tried in this order.
_PARTING = ("EchoNumbers", "EchoTime", "AcquisitionNumber", "ImageType")
_TAGS = [
    *(tag for tag in TAGS if tag not in _GROUPS),
    *("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "PatientID", *_PARTING),
]
_COPIES = ("copied_files", "byte for byte files that are there already; the others are read")
_DICOMDIR = "DICOMDIR"
_DICOMDIR_BYTES = 2**28
_MANY = 1000  # files from which on processes that share them are worth their start


@dataclass(frozen=True, kw_only=True)
class Series:
    """The files of one volume, or of something that is none."""

    files: tuple[Path, ...]  # a volume's in the order of their positions
    subject: str = ""  # PatientID, or the study where there is none; names a person, so it stays in memory
    modality: str | None = None  # as in the header, for example CT
    problem: tuple[str, str] | None = None  # reason and detail, of files that are no volume


@dataclass(frozen=True, kw_only=True)
class _Slice:
    path: Path
    series: str
    subject: str
    modality: str
    size: tuple[str, str]  # rows, columns
    plane: Plane | None  # None when this file's header does not say where it lies
    parting: tuple[str, ...]  # values of _PARTING
    number: str
    instance: str  # SOPInstanceUID
    many_frames: bool
    problem: tuple[str, str] | None


def find_series(files: Iterable[Path], workers: int = 1) -> list[Series]:
    """Sort files into volumes by what their headers say; only headers are read.

    Slices of one series make one volume when they have the same orientation and as many pixels; where several lie at
    one position, echo, acquisition or image type parts them if it can. A multi-frame file is a volume of its own, and
    a DICOMDIR stands for the files that it names.

    Every file is in exactly one result. What is no image has its reason in `problem`: DICOM objects by series, and all
    files that are no DICOM together. Second copies of files, byte for byte, are set apart in the same way.
    """
    slices: list[_Slice] = []
    problems: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path, result in _read_all(sorted(_with_named(files, problems)), workers):
        if isinstance(result, _Slice):
            slices.append(result)
        else:
            problems[result].append(path)
    groups = defaultdict(list)
    for one in slices:
        groups[one.series, one.size, one.problem, one.path if one.many_frames else None].append(one)
    found = []
    for group in groups.values():
        originals, copies = _apart_from_copies(group)
        found += [_series(part) for same in _parallel(originals) for part in _parted(same)]
        if copies:
            found.append(_series(copies, _COPIES))
    found += [Series(files=tuple(paths), problem=problem) for problem, paths in problems.items()]
    return sorted(found, key=lambda series: series.files)


def _read_all(paths: Sequence[Path], workers: int) -> Iterator[tuple[Path, _Slice | tuple[str, str]]]:
    """Each path with its slice, or with the reason and the detail why it has none."""
    if len(paths) < _MANY:
        yield from zip(paths, map(_read_or_why_not, paths), strict=True)
        return
    with process_pool(workers, len(paths) // _MANY + 1) as pool:
        results = map(_read_or_why_not, paths) if pool is None else pool.map(_read_or_why_not, paths, chunksize=64)
        yield from zip(paths, console.track(results, "read DICOM headers", len(paths)), strict=True)


def _read_or_why_not(path: Path) -> _Slice | tuple[str, str]:
    try:
        return _read(path)
    except QuarantineError as error:
        return error.reason, error.detail


def _with_named(files: Iterable[Path], problems: dict[tuple[str, str], list[Path]]) -> set[Path]:
    """The files, with what a DICOMDIR among them names in its place."""
    paths = set()
    for path in files:
        if path.name.upper() != _DICOMDIR:
            paths.add(path)
            continue
        try:
            named = _named_by(path)
        except QuarantineError as error:
            problems[error.reason, error.detail].append(path)
            continue
        paths |= named
    return paths


def _named_by(directory: Path) -> set[Path]:
    named = set()
    with parsing():
        if directory.stat().st_size > _DICOMDIR_BYTES:
            raise QuarantineError("too_large", f"a DICOMDIR of more than {_DICOMDIR_BYTES} bytes")
        dataset: Any = pydicom.dcmread(directory, specific_tags=["DirectoryRecordSequence"])
        for record in dataset.get("DirectoryRecordSequence") or []:
            parts = record.get("ReferencedFileID")
            if parts:
                name = parts if isinstance(parts, str) else "/".join(parts)
                named.add(beside(directory, name.replace("\\", "/")))
    return named


def _read(path: Path) -> _Slice:
    try:
        with path.open("rb") as file:
            header = read_header(file, _TAGS)
    except FileNotFoundError:
        raise QuarantineError("missing_file", "named by a DICOMDIR and not there") from None
    except OSError as error:
        raise QuarantineError("unreadable", str(error.strerror)) from None
    problem = None
    try:
        require_scan(header)
    except QuarantineError as error:
        problem = (error.reason, error.detail)
    series = header.text("SeriesInstanceUID") or str(path)
    return _Slice(
        path=path,
        series=series,
        subject=header.text("PatientID") or header.text("StudyInstanceUID") or series,
        modality=header.text("Modality"),
        size=(header.text("Rows"), header.text("Columns")),
        plane=_plane(header) if problem is None else None,
        parting=tuple(header.text(name) for name in _PARTING),
        number=header.text("InstanceNumber"),
        instance=header.text("SOPInstanceUID"),
        many_frames=header.text("NumberOfFrames") not in ("", "1"),
        problem=problem,
    )


def _plane(header: Header) -> Plane | None:
    position = numbers(header.dataset, "ImagePositionPatient", 3)
    directions = numbers(header.dataset, "ImageOrientationPatient", 6)
    if position is None or directions is None:
        return None
    return Plane(position=position, directions=directions, spacing_mm=())


def _apart_from_copies(group: Sequence[_Slice]) -> tuple[list[_Slice], list[_Slice]]:
    """The slices, and those among them whose file is byte for byte another one's."""
    originals, copies = [], []
    by_instance: dict[str, list[Path]] = defaultdict(list)
    for one in group:
        if one.instance and any(_same_bytes(one.path, other) for other in by_instance[one.instance]):
            copies.append(one)
        else:
            originals.append(one)
            by_instance[one.instance].append(one.path)
    return originals, copies


def _same_bytes(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:  # whoever reads the voxels says so
        return False


def _parallel(group: Sequence[_Slice]) -> list[list[_Slice]]:
    """Slices of the same orientation together; those that do not say theirs stay with the first."""
    parts: list[list[_Slice]] = []
    for one in sorted(group, key=lambda one: one.plane is None):
        for part in parts:
            there = part[0].plane
            if one.plane is None or there is None or same_orientation(there.directions, one.plane.directions):
                part.append(one)
                break
        else:
            parts.append([one])
    return parts


def _parted(part: list[_Slice]) -> list[list[_Slice]]:
    """Volumes that lie at the same positions, parted by the first words of _PARTING that leave whole volumes."""
    parts = [part]
    for index in range(len(_PARTING)):
        parts = [piece for one in parts for piece in _parted_by(one, index)]
    return parts


def _parted_by(part: list[_Slice], index: int) -> list[list[_Slice]]:
    crowd = _most_at_a_position(part)
    if crowd < 2:
        return [part]
    pieces = defaultdict(list)
    for one in part:
        pieces[one.parting[index]].append(one)
    whole = all(len(piece) >= FEWEST_SLICES and _most_at_a_position(piece) < crowd for piece in pieces.values())
    return [pieces[word] for word in sorted(pieces)] if whole else [part]


def _most_at_a_position(part: Sequence[_Slice]) -> int:
    depths = sorted(one.plane.depth_mm for one in part if one.plane is not None)
    most = run = 1
    for before, after in itertools.pairwise(depths):
        run = run + 1 if after - before <= SAME_POSITION_MM else 1
        most = max(most, run)
    return most


def _series(slices: Sequence[_Slice], problem: tuple[str, str] | None = None) -> Series:
    def place(one: _Slice) -> tuple[float, str, Path]:
        return (one.plane.depth_mm if one.plane else 0.0, one.number.zfill(8), one.path)

    first = slices[0]
    return Series(
        files=tuple(one.path for one in sorted(slices, key=place)),
        subject=first.subject,
        modality=first.modality or None,
        problem=problem or first.problem,
    )
