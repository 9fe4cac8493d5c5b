"""Decompression that a damaged or hostile file cannot turn into unbounded memory or time."""

import bz2
from collections.abc import Iterator
from typing import Any

import numpy as np
from isal import isal_zlib

from mimscale.ingest.formats.reasons import QuarantineError

_GZIP = b"\x1f\x8b"
_GZIP_WBITS, _ZLIB_WBITS = 31, 15
_DEFLATE_RATIO = 1032  # no deflate stream holds more bytes than this for each of its own (zlib's technical notes)
_FEED_BYTES = 2**18
_PIECE_BYTES = 2**20
_TRAILING_BYTES = 2**20  # after the voxels; writers put tags there, bombs their load


def is_gzip(data: bytes, start: int = 0) -> bool:
    """Whether the bytes from `start` on begin as gzip does."""
    return data[start : start + 2] == _GZIP


def inflate_head(data: bytes, count: int) -> bytes:
    """The first `count` bytes, or as many as there are, of gzip or zlib `data`.

    Raises:
        QuarantineError: truncated or unreadable.
    """
    head = bytearray()
    for piece in _inflated(data):
        head += piece
        if len(head) >= count:
            break
    return bytes(head[:count])


def inflate(data: bytes, count: int, start: int = 0) -> memoryview:
    """The first `count` bytes of gzip or zlib `data` from `start` on, read to its end: the checksum stands there.

    Raises:
        QuarantineError: truncated or unreadable.
    """
    if count > len(data) * _DEFLATE_RATIO:
        raise QuarantineError("truncated", f"{len(data)} compressed bytes cannot hold the {count} that were promised")
    return _first(_inflated(data, start), np.empty(count, dtype=np.uint8))


def bunzip(data: bytes, count: int, start: int = 0) -> memoryview:
    """The first `count` bytes of bzip2 `data` from `start` on, read to its end.

    Raises:
        QuarantineError: truncated or unreadable.
    """
    return _first(_bunzipped(data, start), np.empty(count, dtype=np.uint8))


def _first(pieces: Iterator[bytes], kept: np.ndarray[Any, np.dtype[np.uint8]]) -> memoryview:
    filled = total = 0
    for piece in pieces:
        total += len(piece)
        if total > kept.size + _TRAILING_BYTES:
            raise QuarantineError("unreadable", f"goes on for more than {_TRAILING_BYTES} bytes after the voxels")
        wanted = min(len(piece), kept.size - filled)
        kept[filled : filled + wanted] = np.frombuffer(piece, np.uint8, wanted)
        filled += wanted
    if filled < kept.size:
        raise QuarantineError("truncated", f"{filled} bytes where {kept.size} were promised")
    return kept.data


def _inflated(data: bytes, start: int = 0) -> Iterator[bytes]:
    at, wbits = start, _GZIP_WBITS if is_gzip(data, start) else _ZLIB_WBITS
    while True:  # one gzip member after the other
        member: Any = isal_zlib.decompressobj(wbits=wbits)
        while not member.eof:
            # Fed in small pieces, since what is left of one is copied whenever it gives more than one piece.
            feed = data[at : at + _FEED_BYTES]
            if not feed:
                raise QuarantineError("truncated", "the compressed data ends early")
            at += len(feed)
            piece = b""
            while not member.eof and (feed or len(piece) == _PIECE_BYTES):
                try:
                    piece = member.decompress(feed, _PIECE_BYTES)
                except isal_zlib.error:  # type: ignore[misc]  # its stub calls it an instance
                    raise QuarantineError("unreadable", "the compressed data is damaged") from None
                if piece:
                    yield piece
                feed = member.unconsumed_tail
        at -= len(member.unused_data)
        if wbits == _ZLIB_WBITS or data.count(0, at) == len(data) - at:  # zeros: padding to a block of a tape
            return
        if data[at : at + 2] != _GZIP:
            raise QuarantineError("unreadable", "other bytes follow the compressed data")


def _bunzipped(data: bytes, start: int) -> Iterator[bytes]:
    stream, at = bz2.BZ2Decompressor(), start
    while not stream.eof:
        feed = b""
        if stream.needs_input:
            feed = data[at : at + _FEED_BYTES]
            at += len(feed)
            if not feed:
                raise QuarantineError("truncated", "the compressed data ends early")
        try:
            piece = stream.decompress(feed, _PIECE_BYTES)
        except OSError:
            raise QuarantineError("unreadable", "the compressed data is damaged") from None
        yield piece
