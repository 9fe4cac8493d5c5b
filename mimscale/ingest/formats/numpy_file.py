"""NPY and NPZ with their spacing in a .json beside them. Nothing is ever unpickled."""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions, Scan, SourceFile
from mimscale.ingest.formats.voxels import checked_affine, size_bytes, to_stored_dtype, view

_HEADER_BYTES = 10_000  # numpy's own limit
_SIDECAR_BYTES = 2**20
_PIECE_BYTES = 2**18


def read_numpy(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """One .npy, or an .npz of one array, and its .json: {"spacing_mm": [z, y, x]}.

    The array is [Z, Y, X] or [C, Z, Y, X] in RAS+, as inside a store.

    Raises:
        QuarantineError: see REASONS.
    """
    z, y, x = _spacing_zyx_mm(files[1:])
    read = _npz if files[0].path.suffix.lower() == ".npz" else _npy
    array = read(files[0].data, options)
    if array.ndim == 4 and options.channels == 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and options.channels == 1:
        array = array[None]
    if array.ndim != 4 or array.shape[0] != options.channels:
        raise QuarantineError("not_3d", f"shape {array.shape}, channels={options.channels}")
    return Scan(voxels=to_stored_dtype(array.transpose(0, 3, 2, 1)), affine=checked_affine(np.diag([x, y, z, 1.0])))


def _spacing_zyx_mm(sidecars: Sequence[SourceFile]) -> tuple[float, float, float]:
    wanted = 'needs a .json beside it with {"spacing_mm": [z, y, x]}'
    if not sidecars:
        raise QuarantineError("no_spacing", wanted)
    try:
        tree = json.loads(sidecars[0].data[:_SIDECAR_BYTES])
        z, y, x = (float(edge) for edge in tree["spacing_mm"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise QuarantineError("no_spacing", f"{wanted} ({type(error).__name__})") from None
    if not all(math.isfinite(edge) and edge > 0 for edge in (z, y, x)):
        raise QuarantineError("no_spacing", f"spacing_mm is {z:g}, {y:g}, {x:g}")
    return z, y, x


def _npy(data: bytes | memoryview, options: ReadOptions) -> NDArray[Any]:
    shape, column_major, dtype, offset = _npy_header(data)
    size_bytes(shape, dtype, options)
    if column_major:
        return view(data, dtype, shape, offset)
    return view(data, dtype, shape[::-1], offset).transpose()


def _npy_header(data: bytes | memoryview) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    stream = io.BytesIO(data[: _HEADER_BYTES + 16])
    if len(data) < 10 and bytes(data) == npy.MAGIC_PREFIX[: len(data)]:
        raise QuarantineError("truncated", f"{len(data)} bytes are no .npy header")
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, column_major, dtype = read(stream, max_header_size=_HEADER_BYTES)
    except Exception as error:  # the header is a Python literal: what fails in reading one is not enumerable
        raise QuarantineError("unreadable", f"no .npy header ({type(error).__name__})") from None
    if dtype.hasobject:
        raise QuarantineError("unsupported_dtype", "pickled Python objects, which are never read")
    if dtype.names or dtype.subdtype or dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise QuarantineError("unsupported_dtype", "no plain numbers")
    return shape, column_major, dtype, stream.tell()


def _npz(data: bytes, options: ReadOptions) -> NDArray[Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if len(members) != 1:
                raise QuarantineError("not_3d", f"{len(members)} arrays; save one volume a file")
            if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise QuarantineError("unsupported_encoding", f"zip method {members[0].compress_type}")
            with archive.open(members[0]) as file:
                head = file.read(_HEADER_BYTES + 16)
                shape, _, dtype, offset = _npy_header(head)
                needed = offset + size_bytes(shape, dtype, options)
                if needed > members[0].file_size:
                    raise QuarantineError("truncated", f"{members[0].file_size} bytes where {needed} were promised")
                whole = np.empty(max(needed, len(head)), dtype=np.uint8)
                whole[: len(head)] = np.frombuffer(head, np.uint8)
                filled = len(head)
                while filled < needed and (piece := file.read(min(_PIECE_BYTES, needed - filled))):
                    whole[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
                    filled += len(piece)
                file.read(1)  # at the end zipfile compares the checksum
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, OSError, ValueError, NotImplementedError) as error:
        raise QuarantineError("unreadable", f"no .npz archive, or a damaged one ({type(error).__name__})") from None
    return _npy(whole[:filled].data, options)
