"""One volume as one Zarr v3 shard (`sharding_indexed`): encoded chunks, then an index with a crc32c.

    C channels | Z Y X volume, voxels

Inner chunks are cubes of `chunk_voxels` over Z, Y, X and one channel thick; each is Blosc followed by crc32c (Blosc
alone decodes a flipped bit to wrong voxels without a word). They lie in C order of the chunk grid. The index holds
offset and length of each; both 2^64-1 means that all voxels are the fill value and nothing is stored.
"""

import struct
from itertools import product
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from mimscale.store.layout import CODECS

# Blosc with its own thread pool neither survives a fork nor writes the same bytes for every number of threads.
numcodecs.blosc.use_threads = False

EMPTY = 2**64 - 1
CRC_BYTES = 4
_SHUFFLES = {"shuffle": numcodecs.blosc.SHUFFLE, "bitshuffle": numcodecs.blosc.BITSHUFFLE}


def chunk_grid(shape: tuple[int, ...], chunk_voxels: int) -> tuple[int, int, int, int]:
    """Number of inner chunks along C, Z, Y, X of an array [C, Z, Y, X]."""
    channels, z, y, x = shape
    return (channels, -(-z // chunk_voxels), -(-y // chunk_voxels), -(-x // chunk_voxels))


def index_bytes(shape: tuple[int, ...], chunk_voxels: int) -> int:
    """Length of the shard index, its crc32c included."""
    return int(np.prod(chunk_grid(shape, chunk_voxels))) * 16 + CRC_BYTES


def crc32c(data: bytes | memoryview) -> bytes:
    """The four bytes that the crc32c codec appends."""
    return struct.pack("<I", google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data))


def encode_shard(volume: NDArray[Any], fill_value: float, chunk_voxels: int, codec: str) -> bytes:
    """Encode a volume [C, Z, Y, X]; the same voxels always give the same bytes."""
    compressor, level, shuffle = CODECS[codec]
    fill = np.asarray(fill_value, dtype=volume.dtype)
    little = volume.dtype.newbyteorder("<")
    grid = chunk_grid(volume.shape, chunk_voxels)
    index = np.full((int(np.prod(grid)), 2), EMPTY, dtype="<u8")
    chunks: list[bytes] = []
    offset = 0
    for number, (channel, *corner) in enumerate(product(*map(range, grid))):
        box = tuple(slice(edge * chunk_voxels, (edge + 1) * chunk_voxels) for edge in corner)
        inside = volume[channel][box]
        if np.array_equal(inside, np.broadcast_to(fill, inside.shape)):
            continue
        chunk = np.full((chunk_voxels,) * 3, fill, dtype=little)
        chunk[tuple(slice(edge) for edge in inside.shape)] = inside
        data = numcodecs.blosc.compress(chunk, compressor.encode(), level, _SHUFFLES[shuffle])
        data += crc32c(data)
        index[number] = offset, len(data)
        offset += len(data)
        chunks.append(data)
    entries = index.tobytes()
    return b"".join([*chunks, entries, crc32c(entries)])


def parse_index(data: bytes, data_bytes: int) -> NDArray[np.uint64]:
    """Check and parse a shard index: [number of chunks, 2] = offset, length.

    Args:
        data: the index with its crc32c.
        data_bytes: length of the chunks before it.

    Raises:
        ValueError: the crc32c or a range is wrong.
    """
    entries, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if crc32c(entries) != crc:
        raise ValueError("the shard index has a wrong crc32c")
    index = np.frombuffer(entries, dtype="<u8").reshape(-1, 2).astype(np.uint64)
    stored = index[index[:, 0] != EMPTY]
    # The crc covers what was written; a range outside the chunks can only come from another writer.
    if (stored > data_bytes).any() or (stored.sum(axis=1) > data_bytes).any():
        raise ValueError(f"the shard index points beyond its {data_bytes} bytes of chunks")
    return index


def check_chunk(data: bytes | memoryview) -> None:
    """Check an encoded chunk against its crc32c.

    Raises:
        ValueError: a bit differs from what was written.
    """
    if len(data) <= CRC_BYTES or crc32c(data[:-CRC_BYTES]) != bytes(data[-CRC_BYTES:]):
        raise ValueError("wrong crc32c")


def decode_chunk(data: bytes | memoryview, out: NDArray[Any]) -> None:
    """Check an encoded chunk and decode it into `out`, a contiguous array of a chunk's shape and dtype.

    Raises:
        ValueError: a bit differs from what was written, or the chunk has another size.
    """
    check_chunk(data)
    body = bytes(data[:-CRC_BYTES])
    size = int.from_bytes(body[4:8], "little")  # Blosc's own header; it would fill a part of `out` without a word
    if size != out.nbytes:
        raise ValueError(f"decodes to {size} bytes instead of {out.nbytes}")
    try:
        numcodecs.blosc.decompress(body, out)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"does not decode ({error})") from None


def array_metadata(
    shape: tuple[int, ...], dtype: np.dtype[Any], fill_value: float, chunk_voxels: int, codec: str
) -> dict[str, Any]:
    """`zarr.json` of the array that a shard holds: only codecs of the Zarr v3 specification."""
    compressor, level, shuffle = CODECS[codec]
    grid = chunk_grid(shape, chunk_voxels)
    blosc = {"typesize": dtype.itemsize, "cname": compressor, "clevel": level, "shuffle": shuffle, "blocksize": 0}
    # A single byte has no endianness, and the specification asks to leave it out.
    order = {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "fill_value": float(fill_value) if dtype.kind == "f" else int(fill_value),
        "dimension_names": ["c", "z", "y", "x"],
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [grid[0], *(edge * chunk_voxels for edge in grid[1:])]},
        },
        # c.0.0.0.0 instead of four nested folders: an unzipped copy takes four inodes less a volume.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, chunk_voxels, chunk_voxels, chunk_voxels],
                    "codecs": [order, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "storage_transformers": [],
    }
