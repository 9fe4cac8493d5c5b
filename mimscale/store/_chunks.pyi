from collections.abc import Callable

from typing_extensions import Buffer

def read_boxes(
    decompress: int,
    lz4: int,
    crc32c: int,
    index: Buffer,
    grid: tuple[int, int, int, int],
    edge: int,
    fill: Buffer,
    boxes: list[tuple[tuple[int, int, int], tuple[int, int, int], Buffer]],
    gap_bytes: int,
    largest_read_bytes: int,
    announce: Callable[[list[tuple[int, int]]], None] | None,
    source: Callable[[int, int], Buffer] | Buffer,
    file: int,
    position: int,
) -> tuple[int, tuple[int, bytes] | None, int]:
    """Decode the chunks of a shard that boxes touch into their views.

    Args:
        decompress: address of C-Blosc's `blosc_decompress_ctx`.
        lz4: address of LZ4's `LZ4_decompress_safe`, or 0.
        crc32c: address of crc32c's `crc32c_extend`.
        index: [chunks, 2] uint64, offset and length of each chunk; an offset of 2^64-1 stands for air.
        grid: chunks along C, Z, Y, X.
        edge: of a chunk along Z, Y and X, voxels.
        fill: the bytes of a voxel of air.
        boxes: low and stop along Z, Y, X, not beyond the chunks, and a view [C, Z, Y, X] of the shard's voxels.
        gap_bytes: chunks that are nearer than this are read at once.
        largest_read_bytes: unless more than this would be read at once; a single chunk may be larger.
        announce: told of all ranges (offset, length) before the first is read, when there are several, or a mapping.
        source: a function that returns the bytes of a range (offset, length), which need to be valid until its next
            call; or the shard itself as a mapping.
        file: what is mapped: the mapping is left alone when the page cache lacks the beginning of a range. -1: nobody
            asks, and pages are read as they are touched.
        position: of the shard in it.

    Returns:
        number of decoded chunks; None, or the number and the bytes of a chunk that is damaged, of a mapping no bytes,
        and also when it cannot be read: all views are then undefined; and how many bytes were copied out of a mapping.

    Raises:
        ValueError: arguments that do not fit each other.
    """

def file_system(file: int) -> int:
    """The magic number of the kind of file system that an open file lies on, as in statfs(2); 0 where it is unknown.

    Raises:
        OSError: it cannot be told.
    """
