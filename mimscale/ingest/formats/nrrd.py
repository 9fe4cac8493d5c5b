"""NRRD: .nrrd, or .nhdr with its data file (http://teem.sourceforge.net/nrrd/format.html).

Own code, since pynrrd opens whatever path a header names and decompresses without a bound.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest.formats import compression
from mimscale.ingest.formats.detached import data_file
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions, Scan, SourceFile
from mimscale.ingest.formats.text_header import HEADER_BYTES, field, floats, integer, integers
from mimscale.ingest.formats.voxels import checked_affine, lps_to_ras, size_bytes, to_stored_dtype, view, with_channels

_HEADER_END = re.compile(rb"\r?\n\r?\n")
_VECTOR = re.compile(r"none|\(([^()]*)\)")
_DTYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPE_OF = {name: np.dtype(code) for code, names in _DTYPES.items() for name in names}
# Signs that turn a space's first two axes into Right and Anterior. scanner-xyz says nothing about the patient.
_RAS_SIGNS = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_UNIT_MM = {"mm": 1.0, "millimeter": 1.0, "": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "μm": 0.001, "µm": 0.001}
_COLOUR_KINDS = {"rgb-color", "rgba-color", "hsv-color", "xyz-color", "3-color", "4-color"}


def read_nrrd(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """One .nrrd, or a .nhdr and its data file.

    Raises:
        QuarantineError: see REASONS.
    """
    first = files[0]
    fields, after_header = parse_header(first.data)
    dtype, shape = _dtype(fields), integers(fields, "sizes")
    size = size_bytes(shape, dtype, options)
    name = detached_name(fields)
    body = first if name is None else data_file(files, first, name)
    data, offset = _decoded(fields, body.data, after_header if name is None else 0, size)
    spatial, affine = _spatial_axes_and_affine(fields, len(shape), options)
    raw = view(data, dtype, shape, offset)
    others = [axis for axis in range(len(shape)) if axis not in spatial]
    voxels = with_channels(raw.transpose(*spatial, *others), options.channels)
    return Scan(voxels=to_stored_dtype(voxels), affine=checked_affine(affine))


def parse_header(data: bytes) -> tuple[dict[str, str], int]:
    """The fields, and where the voxels of an attached header begin. Key/value pairs, which may name anybody, are left.

    Raises:
        QuarantineError: unreadable.
    """
    if not data.startswith(b"NRRD000"):
        reason = "truncated" if data == b"NRRD000"[: len(data)] else "unreadable"
        raise QuarantineError(reason, "does not begin as an NRRD file does")
    end = _HEADER_END.search(data, 0, HEADER_BYTES)
    if end is None and len(data) > HEADER_BYTES:
        raise QuarantineError("unreadable", f"a header of more than {HEADER_BYTES} bytes")
    text = data[: end.start() if end else len(data)].decode("utf-8", errors="replace")
    fields: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        name, colon, value = line.partition(": ")
        if colon and not line.startswith("#") and ":=" not in name:
            fields[name.strip().lower()] = value.strip()
    return fields, end.end() if end else len(data)


def detached_name(fields: Mapping[str, str]) -> str | None:
    """The data file that a header names, or None for an attached one.

    Raises:
        QuarantineError: unsupported_encoding for a list of files.
    """
    name = fields.get("data file", fields.get("datafile"))
    if name is not None and (name.upper().startswith("LIST") or re.search(r"%\d*d", name)):
        raise QuarantineError("unsupported_encoding", "an NRRD header of several data files")
    return name


def _dtype(fields: Mapping[str, str]) -> np.dtype[Any]:
    name = " ".join(field(fields, "type").lower().split())
    if name not in _DTYPE_OF:
        raise QuarantineError("unsupported_dtype", "an NRRD type that is no plain number")
    dtype = _DTYPE_OF[name]
    if dtype.itemsize == 1:
        return dtype
    match field(fields, "endian").lower():
        case "little":
            return dtype.newbyteorder("<")
        case "big":
            return dtype.newbyteorder(">")
    raise QuarantineError("unreadable", "endian is neither little nor big")


def _decoded(fields: Mapping[str, str], data: bytes, start: int, size: int) -> tuple[bytes | memoryview, int]:
    """Bytes that hold the `size` bytes of voxels, and the offset of the first."""
    lines, skip = (integer(fields, name, 0) for name in ("line skip", "byte skip"))
    if lines < 0 or skip < -1 or skip > HEADER_BYTES:
        raise QuarantineError("unreadable", f"line skip {lines}, byte skip {skip}")
    for _ in range(lines):
        start = data.find(b"\n", start) + 1
        if start == 0:
            raise QuarantineError("truncated", f"ends before the {lines} lines that line skip leaves out")
    encoding = field(fields, "encoding").lower()
    if encoding == "raw":
        return data, len(data) - size if skip == -1 else start + skip
    if skip == -1:
        raise QuarantineError("unreadable", "byte skip -1 in a compressed file")
    if encoding in ("gzip", "gz"):
        if not compression.is_gzip(data, start):
            reason = "unreadable" if start < len(data) else "truncated"
            raise QuarantineError(reason, "no gzip data, though the header says so")
        return compression.inflate(data, skip + size, start), skip
    if encoding in ("bzip2", "bz2"):
        return compression.bunzip(data, skip + size, start), skip
    raise QuarantineError("unsupported_encoding", "an NRRD encoding other than raw, gzip and bzip2")


def _spatial_axes_and_affine(
    fields: Mapping[str, str], axes: int, options: ReadOptions
) -> tuple[list[int], NDArray[np.float64]]:
    """Which three axes lie in space, and voxel -> RAS+, mm."""
    kinds = fields.get("kinds", "").lower().split()
    if _COLOUR_KINDS & set(kinds):
        raise QuarantineError("colour", "an axis of colours")
    if "complex" in kinds:
        raise QuarantineError("unsupported_dtype", "an axis of complex numbers")
    space = fields.get("space", "").lower()
    if "time" in space:
        raise QuarantineError("not_3d", "its space has a time axis")
    if space not in _RAS_SIGNS or "space directions" not in fields or "space origin" not in fields:
        if not options.assume_orientation:
            raise QuarantineError(
                "no_orientation",
                "needs space (RAS, LAS or LPS), space directions and space origin; to take axes to run to left, "
                "posterior and superior, set assume_orientation=true",
            )
        return _assumed(fields, axes)
    vectors = [match.group(1) for match in _VECTOR.finditer(fields["space directions"].lower())]
    spatial = [axis for axis, vector in enumerate(vectors) if vector is not None]
    if len(vectors) != axes or len(spatial) != 3:
        raise QuarantineError("not_3d", f"{axes} axes, {len(spatial)} of them with a direction in space")
    affine = np.eye(4)
    for column, axis in enumerate(spatial):
        affine[:3, column] = _vector(str(vectors[axis]))
    affine[:3, 3] = _vector(fields["space origin"].strip("()"))
    affine[:3] *= np.array(_RAS_SIGNS[space])[:, None] * _unit_mm(fields)
    return spatial, affine


def _assumed(fields: Mapping[str, str], axes: int) -> tuple[list[int], NDArray[np.float64]]:
    if "space directions" in fields:  # in a space that says nothing about the patient: its lengths count
        found = [match.group(1) for match in _VECTOR.finditer(fields["space directions"].lower())]
        edges = [math.nan if vector is None else float(np.linalg.norm(_vector(vector))) for vector in found]
    else:
        if "spacings" not in fields:
            raise QuarantineError("no_spacing", "neither space directions nor spacings")
        edges = floats(fields["spacings"])
    spatial = [axis for axis, edge in enumerate(edges) if not math.isnan(edge)]
    if len(edges) != axes or len(spatial) != 3:
        raise QuarantineError("not_3d", f"{axes} axes, {len(spatial)} of them with a spacing")
    if min(edges[axis] for axis in spatial) <= 0:
        raise QuarantineError("no_spacing", "a spacing that is not above 0")
    return spatial, lps_to_ras(np.diag([*(edges[axis] for axis in spatial), 1.0]))


def _unit_mm(fields: Mapping[str, str]) -> float:
    units = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', fields.get("space units", ""))}
    if len(units) > 1 or not units <= _UNIT_MM.keys():
        raise QuarantineError("no_spacing", "space units that are no one length")
    return _UNIT_MM[units.pop()] if units else 1.0


def _vector(text: str) -> list[float]:
    numbers = floats(text, ",")
    if len(numbers) != 3:
        raise QuarantineError("bad_affine", f"a direction or origin of {len(numbers)} numbers")
    return numbers
