"""The pixels of one DICOM file as the scanner stored them, before rescale.

Decoders were chosen by what damaged frames do to them: GDCM ends the process on some JPEGs, imagecodecs on some frames
of run lengths (not on a segment of one), and CharLS, whoever wraps it, counts for seconds to minutes on cut JPEG-LS.
"""

import io
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal

import imagecodecs
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid as uid
from numpy.typing import NDArray

from mimscale.ingest.formats.dicom_header import Header, parsing
from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.scan import ReadOptions

_NATIVE = {str(uid.ImplicitVRLittleEndian), str(uid.ExplicitVRLittleEndian), str(uid.ExplicitVRBigEndian)}
_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    **dict.fromkeys(map(str, _JPEG), imagecodecs.jpeg8_decode),
    **dict.fromkeys(map(str, _JPEG_LS), imagecodecs.jpegls_decode),
    **dict.fromkeys(map(str, _JPEG_2000), imagecodecs.jpeg2k_decode),
}
LOSSY = {str(one) for one in (*_JPEG[:2], uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)}
_FRAME_PIXELS = 2**26  # 8192 x 8192; decoders make room for what a frame claims
_COMPRESSION_RATIO = 10_000  # an empty slice of 512 x 512 becomes some hundred bytes
_END_OF_IMAGE = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000; after it a byte of 0 makes the length even
_RLE_LONGEST_RUN = 128
_RLE_HEADER = struct.Struct("<16I")  # segments, and where each begins
_ITEM_BYTES = 8  # of the tag and length before each compressed piece
_UNDEFINED_LENGTH = 0xFFFFFFFF


def frame_shape(data: bytes, header: Header, options: ReadOptions) -> tuple[int, int, int]:
    """(frames, rows, columns) of a file, checked before anything of that size is made.

    Raises:
        QuarantineError: too_large, truncated, unreadable.
    """
    shape = header.count("NumberOfFrames", 1), header.count("Rows"), header.count("Columns")
    frames, rows, columns = shape
    if min(shape) < 1:
        raise QuarantineError("unreadable", f"{frames} frames of {rows} x {columns} pixels")
    size = frames * rows * columns * raw_dtype(header).itemsize
    if rows * columns > _FRAME_PIXELS or size > options.max_volume_bytes:
        raise QuarantineError("too_large", f"{frames} frames of {rows} x {columns} pixels")
    if size > len(data) * (1 if header.transfer_syntax in _NATIVE else _COMPRESSION_RATIO):
        raise QuarantineError("truncated", f"{len(data)} bytes cannot hold {frames} frames of {rows} x {columns}")
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
    dtype, syntax = raw_dtype(header), header.transfer_syntax
    if syntax in _NATIVE and (header.little_endian or dtype.itemsize > 1):  # bytes are swapped in pairs otherwise
        found: Iterator[NDArray[Any]] = iter(_native(data, header, shape))
    elif syntax in _DECODERS or syntax == uid.RLELossless:
        found = _decoded(data, syntax, shape, dtype)
    else:
        raise QuarantineError("unsupported_encoding", "a transfer syntax that is not read")
    for frame in found:
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


def _decoded(data: bytes, syntax: str, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    with parsing():
        pixels = pydicom.dcmread(io.BytesIO(data), force=True).PixelData
        if len(pixels) < _ITEM_BYTES:
            raise QuarantineError("truncated", "no compressed frame")
        streams = list(pydicom.encaps.generate_frames(pixels, number_of_frames=shape[0]))
    if len(streams) < shape[0]:
        raise QuarantineError("truncated", f"{len(streams)} frames where {shape[0]} were promised")
    for stream in streams[: shape[0]]:
        with parsing():  # not around the yield: there the caller's code runs
            frame = _decoded_frame(stream, syntax, shape[1:], dtype)
        yield frame


def _decoded_frame(stream: bytes, syntax: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    if syntax == uid.RLELossless:
        return _rle_frame(stream, shape, dtype)
    if _codestream_shape(stream, syntax) != shape:
        raise QuarantineError("unreadable", "a compressed frame that is not of the header's rows and columns")
    if not stream.rstrip(b"\0").endswith(_END_OF_IMAGE):  # decoders fill in what is missing, and say nothing
        raise QuarantineError("truncated", "a compressed frame without its end")
    frame = np.asarray(_DECODERS[syntax](stream))
    if frame.shape != shape or frame.dtype.kind not in "iu" or frame.dtype.itemsize > dtype.itemsize:
        raise QuarantineError("unreadable", f"a compressed frame of {frame.dtype}, the header says {dtype}")
    if frame.dtype.itemsize < dtype.itemsize:  # few bits in wide pixels
        frame = frame.astype(f"{frame.dtype.kind}{dtype.itemsize}")
    return frame.view(dtype)  # the codestream may say nothing about signs, or something else than the header


def _rle_frame(stream: bytes, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Each byte of all pixels is a segment of its own, the highest first (PS3.5, annex G)."""
    if len(stream) < _RLE_HEADER.size:
        raise QuarantineError("truncated", "ends inside the header of its run lengths")
    segments, *starts = _RLE_HEADER.unpack_from(stream)
    if segments != dtype.itemsize:
        raise QuarantineError("unreadable", f"{segments} segments of run lengths, {dtype.itemsize} bytes a pixel")
    pixels = shape[0] * shape[1]
    values = np.empty((pixels, dtype.itemsize), dtype=np.uint8)
    for index, (start, stop) in enumerate(itertools.pairwise([*starts[:segments], len(stream)])):
        values[:, dtype.itemsize - 1 - index] = _rle_segment(stream[start:stop], pixels)
    return values.view(dtype).reshape(shape)


def _rle_segment(segment: bytes, count: int) -> NDArray[np.uint8]:
    try:
        decoded = imagecodecs.packbits_decode(segment)
    except imagecodecs.PackbitsError:
        decoded = imagecodecs.packbits_decode(segment.removesuffix(b"\0"))  # which made the length even
    if not count <= len(decoded) <= count + _RLE_LONGEST_RUN:  # some writers fill up the last run
        reason = "truncated" if len(decoded) < count else "unreadable"
        raise QuarantineError(reason, f"{len(decoded)} bytes of run lengths where {count} were promised")
    return np.frombuffer(decoded, np.uint8, count)


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
