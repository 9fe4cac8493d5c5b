"""From the bytes and the claims of a header to checked voxels and a checked matrix.

X Y Z source order, voxels | C channels

Voxels are laid out with X fastest and Z slowest in every format, so what needs a copy is done one Z at a time.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest import geometry
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions

_INT16, _UINT16 = np.iinfo(np.int16), np.iinfo(np.uint16)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def size_bytes(shape: Sequence[int], dtype: np.dtype[Any], options: ReadOptions) -> int:
    """Bytes that a header claims, checked before anything of that size is made.

    Raises:
        QuarantineError: not_3d for an edge below 1, too_large.
    """
    if not shape or min(shape) < 1:
        raise QuarantineError("not_3d", f"shape {tuple(shape)[:8]}")
    size = math.prod(shape) * dtype.itemsize
    if size > options.max_volume_bytes:
        raise QuarantineError("too_large", f"shape {tuple(shape)[:8]} of {dtype}: more than {options.max_volume_bytes}")
    return size


def view(data: bytes | memoryview, dtype: np.dtype[Any], shape: Sequence[int], offset: int) -> NDArray[Any]:
    """`data` from `offset` on as an array, first axis fastest; nothing is copied.

    Raises:
        QuarantineError: truncated.
    """
    count = math.prod(shape)
    needed = offset + count * dtype.itemsize
    if offset < 0 or len(data) < needed:
        raise QuarantineError("truncated", f"{len(data)} bytes where {needed} were promised")
    return np.frombuffer(data, dtype, count, offset).reshape(shape, order="F")


def with_channels(raw: NDArray[Any], channels: int) -> NDArray[Any]:
    """[X, Y, Z, ...] -> [C, X, Y, Z]; axes of length 1 after the third say nothing.

    Raises:
        QuarantineError: not_3d.
    """
    array = raw.squeeze(axis=tuple(axis for axis in range(3, raw.ndim) if raw.shape[axis] == 1))
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[3] != channels:
        raise QuarantineError("not_3d", f"shape {raw.shape}, channels={channels}")
    return np.moveaxis(array, 3, 0)


def rescaled(
    raw: NDArray[Any],
    slope: float | NDArray[np.float64],
    intercept: float | NDArray[np.float64],
    overwrite: bool = False,
) -> NDArray[Any]:
    """slope * raw + intercept of [C, X, Y, Z]: whole numbers where all are whole and 16 bits hold them, else float32.

    Args:
        raw: voxels as stored.
        slope: one for all, or one a Z: [Z].
        intercept: as `slope`.
        overwrite: whether `raw` may be overwritten, which saves an array of its size.

    Raises:
        QuarantineError: bad_rescale.
    """
    slopes, intercepts = (np.broadcast_to(np.float64(one), raw.shape[-1]) for one in (slope, intercept))
    if not (np.isfinite(slopes).all() and np.isfinite(intercepts).all() and slopes.all()):
        raise QuarantineError("bad_rescale", f"slope {slopes[0]:g}, intercept {intercepts[0]:g}")
    if raw.dtype.kind not in "iuf" or ((slopes == 1).all() and (intercepts == 0).all()):
        return raw
    dtype = np.dtype("<f4")
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found afterwards
        if raw.dtype.kind in "iu" and (slopes % 1 == 0).all() and (intercepts % 1 == 0).all():
            ends = np.array([raw.min(axis=(0, 1, 2)), raw.max(axis=(0, 1, 2))]) * slopes + intercepts
            dtype = whole_dtype(ends.min(), ends.max()) or dtype
        same_size = overwrite and dtype.itemsize == raw.dtype.itemsize
        values = raw.view(dtype) if same_size else np.empty(raw.shape, dtype, order="F")
        for z in range(raw.shape[-1]):
            values[..., z] = raw[..., z].astype(np.float64) * slopes[z] + intercepts[z]
    return values


def whole_dtype(low: float, high: float) -> np.dtype[Any] | None:
    """int16 or uint16, whichever holds all whole numbers from low to high; None when neither does."""
    if _INT16.min <= low and high <= _INT16.max:
        return np.dtype("<i2")
    if _UINT16.min <= low and high <= _UINT16.max:
        return np.dtype("<u2")
    return None


def to_stored_dtype(voxels: NDArray[Any]) -> NDArray[Any]:
    """[C, X, Y, Z] as uint8 (when it came as that), int16, uint16 or float32: the first that loses nothing.

    float64 and wide integers are rounded to float32 when they are not whole numbers of 16 bits.

    Raises:
        QuarantineError: unsupported_dtype, not_finite.
    """
    kind, width = voxels.dtype.kind, voxels.dtype.itemsize
    if kind == "b":
        return voxels.view(np.uint8)
    if kind not in "iuf" or width > 8:
        raise QuarantineError("unsupported_dtype", f"{voxels.dtype}")
    if (kind, width) in (("u", 1), ("i", 2), ("u", 2)):  # already one of them, in the range of its type
        return voxels.astype(voxels.dtype.newbyteorder("<"), copy=False)
    low, high = float(voxels.min()), float(voxels.max())  # NaN passes on to both
    if not (math.isfinite(low) and math.isfinite(high)):
        count = sum(int(np.count_nonzero(~np.isfinite(voxels[..., z]))) for z in range(voxels.shape[-1]))
        raise QuarantineError("not_finite", f"{count} of {voxels.size} voxels are NaN or infinite")
    if low < -_FLOAT32_MAX or high > _FLOAT32_MAX:
        raise QuarantineError("not_finite", f"{low:g} to {high:g} is beyond what float32 can hold")
    dtype = whole_dtype(low, high)
    if dtype is None or (kind == "f" and not _all_whole(voxels)):
        dtype = np.dtype("<f4")
    return voxels.astype(dtype, copy=False)


def _all_whole(voxels: NDArray[Any]) -> bool:
    return all(bool((np.rint(voxels[..., z]) == voxels[..., z]).all()) for z in range(voxels.shape[-1]))


def checked_affine(affine: NDArray[Any]) -> NDArray[np.float64]:
    """The matrix in float64.

    Raises:
        QuarantineError: bad_affine.
    """
    affine = np.asarray(affine, dtype=np.float64)
    reason = geometry.why_not_an_affine(affine)
    if reason is not None:
        raise QuarantineError("bad_affine", f"the voxel -> world matrix {reason}")
    return affine


def lps_to_ras(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """A matrix to a world of Left, Posterior, Superior as one to Right, Anterior, Superior, or back."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
