"""NIfTI-1 and NIfTI-2: .nii, .nii.gz, .hdr with .img. nibabel reads the header, the voxels stay where they are.

nibabel puts headers right in silence (a spacing of 0 becomes 1) and makes room for whatever they claim. So it is asked
for the raw fields only.
"""

import math
from collections.abc import Sequence
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from mimscale.ingest.formats import compression
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions, Scan, SourceFile
from mimscale.ingest.formats.voxels import checked_affine, rescaled, size_bytes, to_stored_dtype, view, with_channels

_KINDS: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}  # by bytes of the header
_EXTENSION_FLAG_BYTES = 4
_UNIT_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # metre, millimetre, micrometre; 0, unknown, is millimetre in practice


def read_nifti(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """One .nii or .nii.gz, or a .hdr and its .img.

    Raises:
        QuarantineError: see REASONS.
    """
    first = files[0]
    longest = max(_KINDS)
    head = _head(first, longest)
    header, single = _header(head)
    if first.path.suffix.lower() == ".hdr" and not single:
        if len(files) == 1:
            raise QuarantineError("missing_file", "the .hdr has no .img beside it")
        body, least = files[1], 0
    elif single:
        body, least = first, header.sizeof_hdr + _EXTENSION_FLAG_BYTES
    else:
        raise QuarantineError("unreadable", "the header of a .hdr and .img pair without its .img")
    dtype, shape, offset = _dtype(header), _shape(header), _offset(header, least)
    needed = offset + size_bytes(shape, dtype, options)
    data: bytes | memoryview = body.data
    if compression.is_gzip(body.data):
        data = compression.inflate(body.data, needed)
    voxels = with_channels(view(data, dtype, shape, offset), options.channels)
    affine = _affine(header, options)
    slope, intercept = _slope_intercept(header)
    return Scan(voxels=to_stored_dtype(rescaled(voxels, slope, intercept)), affine=affine)


def _head(file: SourceFile, count: int) -> bytes:
    if compression.is_gzip(file.data):
        return compression.inflate_head(file.data, count)
    if file.path.name.lower().endswith(".gz"):
        raise QuarantineError("unreadable", "no gzip file, though its name says so")
    return file.data[:count]


def _header(head: bytes) -> tuple[Any, bool]:
    """The raw header, and whether the voxels follow it in the same file."""
    if len(head) < min(_KINDS):
        raise QuarantineError("truncated", f"{len(head)} bytes are no NIfTI header")
    for byteorder, name in (("<", "little"), (">", "big")):
        kind = _KINDS.get(int.from_bytes(head[:4], "little" if name == "little" else "big"))
        if kind is None:
            continue
        if len(head) < kind.sizeof_hdr:
            raise QuarantineError("truncated", f"{len(head)} bytes are no NIfTI header")
        header = kind(head[: kind.sizeof_hdr], endianness=byteorder, check=False)
        magic = bytes(header["magic"].tobytes())[:4].rstrip(b"\0")
        if magic in (b"n+1", b"n+2"):
            return header, True
        if magic in (b"ni1", b"ni2"):
            return header, False
        raise QuarantineError("unreadable", "the header has no NIfTI magic; Analyze files do not say where they lie")
    raise QuarantineError("unreadable", "begins with no NIfTI header size")


def _dtype(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError):
        raise QuarantineError("unsupported_dtype", f"NIfTI datatype {code}") from None
    if dtype.names:
        raise QuarantineError("colour", f"NIfTI datatype {code}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise QuarantineError("unsupported_dtype", f"NIfTI datatype {code}, {dtype}")
    return dtype


def _shape(header: Any) -> tuple[int, ...]:
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise QuarantineError("unreadable", f"a header with {axes} axes")
    return tuple(int(edge) for edge in header["dim"][1 : axes + 1])


def _offset(header: Any, least: int) -> int:
    offset = float(header["vox_offset"])
    if offset == 0:
        return least  # some writers leave it empty
    if not (math.isfinite(offset) and offset >= least):
        raise QuarantineError("unreadable", f"voxels at byte {offset:g}, inside the header")
    return int(offset)


def _slope_intercept(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # the standard's, and everybody's, way to say that there is none
    return slope, intercept


def _affine(header: Any, options: ReadOptions) -> NDArray[np.float64]:
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0 and not options.assume_orientation:
        raise QuarantineError(
            "no_orientation",
            "qform and sform codes are both 0; if all files lie as nibabel assumes, set assume_orientation=true",
        )
    try:
        with np.errstate(all="ignore"):
            affine = np.array(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError):  # a quaternion or spacing that is none
        raise QuarantineError("bad_affine", "the header holds no usable quaternion or spacing") from None
    affine[:3] *= _UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    return checked_affine(affine)
