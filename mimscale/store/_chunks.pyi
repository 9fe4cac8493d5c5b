from collections.abc import Callable

from typing_extensions import Buffer

def read_boxes(
    decompress: int,
    crc32c: int,
    index: Buffer,
    grid: tuple[int, int, int, int],
    edge: int,
    fill: Buffer,
    boxes: list[tuple[tuple[int, int, int], tuple[int, int, int], Buffer]],
    gap_bytes: int,
    largest_read_bytes: int,
    announce: Callable[[list[tuple[int, int]]], None] | None,
    read: Callable[[int, int], Buffer],
) -> tuple[int, tuple[int, bytes] | None]:
    """Decode the chunks of a shard that boxes touch into their views.

    Args:
        decompress: address of C-Blosc's `blosc_decompress_ctx`.
        crc32c: address of crc32c's `crc32c_extend`.
        index: [chunks, 2] uint64, offset and length of each chunk; an offset of 2^64-1 stands for air.
        grid: chunks along C, Z, Y, X.
        edge: of a chunk along Z, Y and X, voxels.
        fill: the bytes of a voxel of air.
        boxes: low and stop along Z, Y, X, not beyond the chunks, and a view [C, Z, Y, X] of the shard's voxels.
        gap_bytes: chunks that are nearer than this are read at once.
        largest_read_bytes: unless more than this would be read at once; a single chunk may be larger.
        announce: told of all ranges (offset, length) before the first is read, when there are several.
        read: returns the bytes of a range (offset, length); they need to be valid until its next call.

    Returns:
        number of decoded chunks; and None, or the number and the bytes of a chunk that is damaged: all views are then
        undefined.

    Raises:
        ValueError: arguments that do not fit each other.
    """
