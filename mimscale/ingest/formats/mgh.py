"""FreeSurfer's MGH and MGZ. nibabel reads the header, the voxels stay where they are."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

from mimscale.ingest.formats import compression
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions, Scan, SourceFile
from mimscale.ingest.formats.voxels import checked_affine, size_bytes, to_stored_dtype, view, with_channels

_HEADER_BYTES = 284
# Big-endian: version, edges, frames, type, degrees of freedom, whether the matrix means anything.
_FIRST_FIELDS = struct.Struct(">7ih")
_VERSION = 1
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(">u1"),
    1: np.dtype(">i4"),
    3: np.dtype(">f4"),
    4: np.dtype(">i2"),
    10: np.dtype(">u2"),
}


def read_mgh(files: Sequence[SourceFile], options: ReadOptions) -> Scan:
    """One .mgh or .mgz.

    Raises:
        QuarantineError: see REASONS.
    """
    data: bytes | memoryview = files[0].data
    packed = compression.is_gzip(files[0].data)
    head = compression.inflate_head(files[0].data, _HEADER_BYTES) if packed else files[0].data[:_HEADER_BYTES]
    if len(head) < _HEADER_BYTES:
        raise QuarantineError("truncated", f"{len(head)} bytes are no MGH header")
    version, *shape, code, _, has_matrix = _FIRST_FIELDS.unpack_from(head)
    if version != _VERSION:
        raise QuarantineError("unreadable", f"MGH version {version}")
    if code not in _DTYPES:
        raise QuarantineError("unsupported_dtype", f"MGH type {code}")
    dtype = _DTYPES[code]
    needed = _HEADER_BYTES + size_bytes(shape, dtype, options)
    if packed:
        data = compression.inflate(files[0].data, needed)
    voxels = with_channels(view(data, dtype, shape, _HEADER_BYTES), options.channels)
    if has_matrix != 1 and not options.assume_orientation:
        raise QuarantineError(
            "no_orientation",
            "goodRASFlag is not 1; to take FreeSurfer's default orientation, set assume_orientation=true",
        )
    with np.errstate(all="ignore"):
        header: Any = MGHHeader(head, check=False)  # type: ignore[no-untyped-call]
        affine = header.get_affine()
    return Scan(voxels=to_stored_dtype(voxels), affine=checked_affine(affine))
