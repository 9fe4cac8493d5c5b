"""The pixels of one DICOM file as the scanner stored them, before rescale.

Which decoder reads which transfer syntax is fixed, so that a volume does not depend on what else is installed.
"""

import io
import struct
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid as uid
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder

from mimscale.ingest.formats.dicom_header import Header, parsing
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions

_NATIVE = {str(uid.ImplicitVRLittleEndian), str(uid.ExplicitVRLittleEndian), str(uid.ExplicitVRBigEndian)}
_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_PLUGIN: dict[str, str] = {
    **{str(syntax): "gdcm" for syntax in _JPEG},
    **{str(syntax): "pyjpegls" for syntax in _JPEG_LS},
    **{str(syntax): "pylibjpeg" for syntax in (*_JPEG_2000, uid.RLELossless)},
}
LOSSY = {str(one) for one in (*_JPEG[:2], uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)}
_FRAME_PIXELS = 2**26  # 8192 x 8192; decoders make room for what a frame claims
_ITEM_BYTES = 8  # of the tag and length before each compressed piece
_UNDEFINED_LENGTH = 0xFFFFFFFF


def frame_shape(header: Header, options: ReadOptions) -> tuple[int, int, int]:
    """(frames, rows, columns), checked before anything of that size is made.

    Raises:
        QuarantineError: too_large, unreadable.
    """
    shape = header.count("NumberOfFrames", 1), header.count("Rows"), header.count("Columns")
    frames, rows, columns = shape
    if min(shape) < 1:
        raise QuarantineError("unreadable", f"{frames} frames of {rows} x {columns} pixels")
    size = frames * rows * columns * raw_dtype(header).itemsize
    if rows * columns > _FRAME_PIXELS or size > options.max_volume_bytes:
        raise QuarantineError("too_large", f"{frames} frames of {rows} x {columns} pixels")
    return shape


def raw_dtype(header: Header) -> np.dtype[Any]:
    """The type that one pixel has after decoding.

    Raises:
        QuarantineError: unsupported_dtype.
    """
    bits, kind = header.count("BitsAllocated"), "i" if header.count("PixelRepresentation", 0) else "u"
    if bits not in (8, 16, 32):
        raise QuarantineError("unsupported_dtype", f"{bits} bits a pixel")
    return np.dtype(f"<{kind}{bits // 8}")


def frames(data: bytes, header: Header, shape: tuple[int, int, int]) -> Iterator[NDArray[Any]]:
    """Raw [rows, columns] of each frame, in the order of the file.

    Raises:
        QuarantineError: truncated, unsupported_encoding, unreadable.
    """
    dtype = raw_dtype(header)
    syntax = header.transfer_syntax
    if syntax in _NATIVE and (header.little_endian or dtype.itemsize > 1):
        found: Iterator[NDArray[Any]] = iter(_native(data, header, shape))
    elif syntax in _PLUGIN:
        found = _decoded(data, syntax, shape)
    else:
        raise QuarantineError("unsupported_encoding", "a transfer syntax that is not read")
    for frame in found:
        if frame.shape != shape[1:] or frame.dtype.newbyteorder("<") != dtype:
            raise QuarantineError("unreadable", f"a frame of {frame.shape} {frame.dtype}, the header says otherwise")
        yield _used_bits(frame, header)


def _native(data: bytes, header: Header, shape: tuple[int, int, int]) -> NDArray[Any]:
    """A view of uncompressed pixels: nothing is copied."""
    assert header.pixels_at is not None, "only of a header with pixels"
    order: Literal["<", ">"] = "<" if header.little_endian else ">"
    length_at = header.pixels_at + (4 if header.implicit else 8)
    if len(data) < length_at + 4:
        raise QuarantineError("truncated", "ends before its pixels")
    (length,) = struct.unpack_from(f"{order}I", data, length_at)
    dtype = raw_dtype(header).newbyteorder(order)
    count = shape[0] * shape[1] * shape[2]
    there = min(length, len(data) - length_at - 4)
    if length == _UNDEFINED_LENGTH:
        raise QuarantineError("unreadable", "pixels that are neither compressed nor of known length")
    if there < count * dtype.itemsize:
        raise QuarantineError("truncated", f"{there} bytes of pixels where {count * dtype.itemsize} were promised")
    return np.frombuffer(data, dtype, count, length_at + 4).reshape(shape)


def _decoded(data: bytes, syntax: str, shape: tuple[int, int, int]) -> Iterator[NDArray[Any]]:
    with parsing():
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        if len(dataset.PixelData) < _ITEM_BYTES:
            raise QuarantineError("truncated", "no compressed frame")
        streams = 0
        for stream in pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=shape[0]):
            streams += 1
            if syntax != uid.RLELossless and _codestream_shape(stream, syntax) != shape[1:]:
                raise QuarantineError("unreadable", "a compressed frame that is not of the header's rows and columns")
        if streams < shape[0]:
            raise QuarantineError("truncated", f"{streams} frames where {shape[0]} were promised")
        decoded = get_decoder(uid.UID(syntax)).iter_array(dataset, raw=True, decoding_plugin=_PLUGIN[syntax])
    while True:
        with parsing():  # not around the yield: there the caller's code runs
            frame, _ = next(decoded, (None, None))
        if frame is None:
            return
        yield frame


def _codestream_shape(stream: bytes, syntax: str) -> tuple[int, int] | None:
    """(rows, columns) of a compressed frame of one component, as the decoder will make room for them."""
    if syntax in {str(one) for one in _JPEG_2000}:
        at = stream.find(b"\xff\x4f\xff\x51", 0, 4096)  # start, size; in a JP2 box or not
        if at < 0 or len(stream) < at + 42:
            return None
        x, y, x_offset, y_offset = struct.unpack_from(">4I", stream, at + 8)
        (components,) = struct.unpack_from(">H", stream, at + 40)
        return (y - y_offset, x - x_offset) if components == 1 else None
    at = 2
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", stream, at + 5)
            return (rows, columns) if components == 1 else None
        else:
            at += 2 + length
    return None


def _used_bits(frame: NDArray[Any], header: Header) -> NDArray[Any]:
    """Without what stands in bits above BitsStored, such as old overlays; the sign goes up to the last bit."""
    bits = frame.dtype.itemsize * 8
    stored = header.count("BitsStored", bits)
    if header.count("HighBit", stored - 1) != stored - 1 or not 1 <= stored <= bits:
        raise QuarantineError("unsupported_encoding", f"{stored} of {bits} bits that are not the lowest")
    if stored == bits:
        return frame
    shift = frame.dtype.type(bits - stored)
    used: NDArray[Any] = np.right_shift(np.left_shift(frame, shift), shift)
    return used
