"""MetaImage: .mha, or .mhd with its data file (https://itk.org/Wiki/ITK/MetaIO/Documentation)."""

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

_LAST_FIELD = re.compile(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*([^\r\n]*)\r?(?:\n|\Z)", re.MULTILINE)
_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# Names that writers have used for one thing.
_ORIENTATION = ("TransformMatrix", "Rotation", "Orientation")
_ORIGIN = ("Offset", "Position", "Origin")
_BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_ATTACHED = "LOCAL"


def read_metaimage(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """One .mha, or a .mhd and its data file.

    Raises:
        QuarantineError: see REASONS.
    """
    first = files[0]
    fields, after_header = parse_header(first.data)
    dtype = _dtype(fields)
    edges = integers(fields, "DimSize")
    components = integer(fields, "ElementNumberOfChannels", 1)
    shape = [components, *edges]  # the channels of a voxel lie side by side
    size = size_bytes(shape, dtype, options)
    name = detached_name(fields)
    body = first if name is None else data_file(files, first, name)
    data, offset = _decoded(fields, body.data, after_header if name is None else 0, size)
    raw = view(data, dtype, shape, offset)
    voxels = with_channels(np.moveaxis(raw, 0, -1), options.channels)
    return Scan(voxels=to_stored_dtype(voxels), affine=checked_affine(_affine(fields, len(edges), options)))


def parse_header(data: bytes) -> tuple[dict[str, str], int]:
    """The fields, and where the voxels of an attached header begin.

    Raises:
        QuarantineError: unreadable.
    """
    last = _LAST_FIELD.search(data, 0, HEADER_BYTES)
    if last is None:
        raise QuarantineError("unreadable", "no ElementDataFile, which ends a MetaImage header")
    fields: dict[str, str] = {}
    for line in data[: last.end()].decode("utf-8", errors="replace").splitlines():
        name, _, value = line.partition("=")
        fields[name.strip()] = value.strip()
    return fields, last.end()


def detached_name(fields: Mapping[str, str]) -> str | None:
    """The data file that a header names, or None for an attached one.

    Raises:
        QuarantineError: unsupported_encoding for a list of files.
    """
    name = field(fields, "ElementDataFile")
    if name.upper() == _ATTACHED:
        return None
    if name.upper().startswith("LIST") or "%" in name:
        raise QuarantineError("unsupported_encoding", "a MetaImage header of several data files")
    return name


def _dtype(fields: Mapping[str, str]) -> np.dtype[Any]:
    name = field(fields, "ElementType").upper()
    if name not in _DTYPES:
        raise QuarantineError("unsupported_dtype", "a MetaImage type that is no plain number of known width")
    dtype = np.dtype(_DTYPES[name])
    return dtype.newbyteorder(">" if any(_flag(fields, name) for name in _BIG_ENDIAN) else "<")


def _decoded(fields: Mapping[str, str], data: bytes, start: int, size: int) -> tuple[bytes | memoryview, int]:
    """Bytes that hold the `size` bytes of voxels, and the offset of the first."""
    if not _flag(fields, "BinaryData", default=True):
        raise QuarantineError("unsupported_encoding", "voxels as text")
    skip = integer(fields, "HeaderSize", 0)
    if skip < -1:
        raise QuarantineError("unreadable", f"HeaderSize {skip}")
    if _flag(fields, "CompressedData"):
        return compression.inflate(data, size, start + max(skip, 0)), 0
    return data, len(data) - size if skip == -1 else start + skip


def _affine(fields: Mapping[str, str], axes: int, options: ReadOptions) -> NDArray[np.float64]:
    spacing_name = next((name for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    if spacing_name is None:
        raise QuarantineError("no_spacing", "neither ElementSpacing nor ElementSize")
    orientation_name = next((name for name in _ORIENTATION if name in fields), None)
    origin_name = next((name for name in _ORIGIN if name in fields), None)
    if (orientation_name is None or origin_name is None) and not options.assume_orientation:
        raise QuarantineError(
            "no_orientation",
            "needs TransformMatrix and Offset; to take axes to run to left, posterior and superior, set "
            "assume_orientation=true",
        )
    if axes < 3:
        raise QuarantineError("not_3d", f"{axes} axes")
    spacing = _numbers(fields[spacing_name], axes)
    if min(spacing) <= 0:
        raise QuarantineError("no_spacing", "a spacing that is not above 0")
    # A row is the direction of an axis.
    rows = np.eye(axes) if orientation_name is None else np.array(_numbers(fields[orientation_name], axes * axes))
    origin = [0.0] * axes if origin_name is None else _numbers(fields[origin_name], axes)
    affine = np.eye(4)
    affine[:3, :3] = rows.reshape(axes, axes)[:3, :3].T * spacing[:3]
    affine[:3, 3] = origin[:3]
    return lps_to_ras(affine)


def _flag(fields: Mapping[str, str], name: str, default: bool = False) -> bool:
    return fields[name][:1].upper() in ("T", "1", "Y") if name in fields else default


def _numbers(text: str, count: int) -> list[float]:
    numbers = floats(text)
    if len(numbers) != count:
        raise QuarantineError("bad_affine", f"{len(numbers)} numbers where {count} must stand")
    return numbers
