"""One reader a format: a file's bytes -> voxels in the file's own order, or a typed reason why not.

X Y Z source order, voxels | C channels
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from mimscale.ingest import geometry

# The reasons that a receipt may hold; scripts count them.
REASONS = {
    "missing_file": "no such file",
    "outside_source": "leads out of the folder of its list",
    "not_an_image": "no volume and no DICOM image",
    "missing_channel": "a channel has no file",
    "label_without_image": "a label map that belongs to no image",
    "empty_file": "0 bytes",
    "truncated": "ends early",
    "unreadable": "not a file of its format",
    "changed": "was changed while the ingest ran",
    "not_3d": "has not the axes that were asked for",
    "not_finite": "holds NaN or infinity",
    "unsupported_dtype": "holds no plain numbers",
    "bad_affine": "has no usable voxel -> world matrix",
    "no_orientation": "does not say where its axes point",
    "no_spacing": "an .npy without a .json that says spacing_mm",
    "label_grid_mismatch": "label lies on another grid than its image",
    "conflicting_labels": "image is stored already, with another label map",
    "unexpected_labels": "label holds values that class_names does not name",
}


class QuarantineError(Exception):
    """A source that cannot be stored; it never stops an ingest. `detail` names no file: it is kept inside the store."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Scan:
    """What a file holds."""

    voxels: NDArray[Any]  # [C, X, Y, Z] in the file's order; uint8, int16, uint16 or float32, little-endian, all finite
    affine: NDArray[np.float64]  # voxel (x, y, z, 1) -> world, RAS+, mm: [4, 4]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader must know from the config."""

    channels: int = 1
    assume_orientation: bool = False


def read_scan(path: Path, data: bytes, options: ReadOptions) -> Scan:
    """Decode the bytes of one volume file.

    Args:
        path: names the format; `.npy` has its spacing in a `.json` beside it.
        data: the whole file, so that what was hashed is what is stored.
        options: see `ReadOptions`.

    Raises:
        QuarantineError: with one of REASONS.
    """
    if not data:
        raise QuarantineError("empty_file", "0 bytes")
    for suffix, reader in _READERS.items():
        if path.name.lower().endswith(suffix):
            return reader(path, data, options)
    raise QuarantineError("unreadable", f"the name ends in none of {', '.join(_READERS)}")


def _read_nifti(path: Path, data: bytes, options: ReadOptions) -> Scan:
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)  # to the very end: the checksum stands there
        except EOFError as error:
            raise QuarantineError("truncated", f"{error}") from None
        except (OSError, zlib.error) as error:
            raise QuarantineError("unreadable", f"{error}") from None
    elif path.name.lower().endswith(".gz"):
        raise QuarantineError("unreadable", "no gzip file, though its name says so")
    header_bytes = {int.from_bytes(data[:4], order) for order in ("little", "big")}
    if len(data) < 348:
        raise QuarantineError("truncated", f"{len(data)} bytes are no NIfTI header")
    try:
        image = (nibabel.Nifti2Image if 540 in header_bytes else nibabel.Nifti1Image).from_bytes(data)
        proxy: Any = image.dataobj
        raw = np.asanyarray(proxy.get_unscaled())
    except OSError as error:  # nibabel's word for fewer bytes than the header promises
        raise QuarantineError("truncated", str(error)) from None
    except Exception as error:  # a damaged header fails anywhere in nibabel, and must not stop the others
        raise QuarantineError("unreadable", f"{type(error).__name__}: {error}") from None
    qform, sform = int(image.header["qform_code"]), int(image.header["sform_code"])
    if qform == sform == 0 and not options.assume_orientation:
        raise QuarantineError(
            "no_orientation",
            "qform and sform codes are both 0; if all files lie as nibabel assumes, set assume_orientation=true",
        )
    voxels = _with_channels(raw, options.channels)
    slope, intercept = float(proxy.slope), float(proxy.inter)
    return Scan(_to_stored_dtype(_scaled(voxels, slope, intercept)), _checked(image.affine))


def _read_npy(path: Path, data: bytes, options: ReadOptions) -> Scan:
    """A plain array, last axis fastest: [Z, Y, X] or [C, Z, Y, X] in RAS+, as inside a store."""
    sidecar = path.with_suffix(".json")
    try:
        spacing_mm = [float(edge) for edge in json.loads(sidecar.read_bytes())["spacing_mm"]]
        z, y, x = spacing_mm
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuarantineError(
            "no_spacing", f'needs a .json beside it with {{"spacing_mm": [z, y, x]}} ({type(error).__name__})'
        ) from None
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except EOFError as error:
        raise QuarantineError("truncated", f"{error}") from None
    except ValueError as error:
        reason = (
            "truncated"
            if data.startswith(b"\x93NUMPY") and ("EOF" in str(error) or "reshape" in str(error))
            else "unreadable"
        )
        raise QuarantineError(reason, f"{error}") from None
    if not isinstance(array, np.ndarray):
        raise QuarantineError("unreadable", "an .npz archive; save one plain array")
    wanted = 3 if options.channels == 1 else 4
    if array.ndim == 4 and options.channels == 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != wanted or 0 in array.shape or (wanted == 4 and array.shape[0] != options.channels):
        raise QuarantineError("not_3d", f"shape {array.shape}, channels={options.channels}")
    voxels = array.transpose(2, 1, 0)[None] if wanted == 3 else array.transpose(0, 3, 2, 1)
    return Scan(_to_stored_dtype(voxels), _checked(np.diag([x, y, z, 1.0])))


_READERS: dict[str, Callable[[Path, bytes, ReadOptions], Scan]] = {
    ".nii.gz": _read_nifti,
    ".nii": _read_nifti,
    ".npy": _read_npy,
}
SUFFIXES = tuple(_READERS)


def _checked(affine: NDArray[Any]) -> NDArray[np.float64]:
    affine = np.asarray(affine, dtype=np.float64)
    reason = geometry.why_not_an_affine(affine)
    if reason is not None:
        raise QuarantineError("bad_affine", f"the voxel -> world matrix {reason}")
    return affine


def _with_channels(raw: NDArray[Any], channels: int) -> NDArray[Any]:
    """[X, Y, Z] or [X, Y, Z, C] -> [C, X, Y, Z]; axes of length 1 at the end say nothing."""
    array = raw
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[3] != channels or 0 in array.shape:
        raise QuarantineError("not_3d", f"shape {raw.shape}, channels={channels}")
    return np.moveaxis(array, 3, 0)


def _scaled(raw: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """slope * raw + intercept, exact where both are whole and the result fits 32 bits."""
    if (slope, intercept) == (1.0, 0.0) or raw.dtype.kind not in "iuf":
        return raw
    if raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2 and slope.is_integer() and intercept.is_integer():
        bound = 65536.0 * abs(slope) + abs(intercept)
        if bound < 2**31:
            return raw.astype(np.int32) * int(slope) + int(intercept)
    scaled = np.empty(raw.shape, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found afterwards
        for plane in range(raw.shape[-1]):  # in float64, but not all of it at once
            scaled[..., plane] = raw[..., plane].astype(np.float64) * slope + intercept
    return scaled


def _to_stored_dtype(voxels: NDArray[Any]) -> NDArray[Any]:
    """The smallest of uint8 (as it came), int16, uint16 and float32 that loses nothing that float32 can hold."""
    if voxels.dtype.kind == "b":
        voxels = voxels.astype(np.uint8)
    if voxels.dtype.kind not in "iuf":
        raise QuarantineError("unsupported_dtype", f"{voxels.dtype}")
    low, high = voxels.min(), voxels.max()  # NaN passes on to both
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise QuarantineError("not_finite", f"{count} of {voxels.size} voxels are NaN or infinite")
    whole = voxels.dtype.kind in "iu" or bool(np.array_equal(voxels, np.rint(voxels)))
    if voxels.dtype == np.uint8:
        dtype: np.dtype[Any] = np.dtype("u1")
    elif whole and voxels.dtype.kind + str(voxels.dtype.itemsize) == "u2":
        dtype = np.dtype("<u2")
    elif whole and low >= -32768 and high <= 32767:
        dtype = np.dtype("<i2")
    elif whole and low >= 0 and high <= 65535:
        dtype = np.dtype("<u2")
    else:
        dtype = np.dtype("<f4")
        limit = float(np.finfo(np.float32).max)
        if float(low) < -limit or float(high) > limit:
            raise QuarantineError("not_finite", f"{low} to {high} is beyond what float32 can hold")
    return voxels.astype(dtype, copy=False)
