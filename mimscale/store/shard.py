"""One volume as one Zarr v3 shard (`sharding_indexed`): encoded chunks, then an index with a crc32c.

    C channels | Z Y X volume, voxels

Inner chunks are cubes of `chunk_voxels` over Z, Y, X and one channel thick; each is Blosc followed by crc32c (Blosc
alone decodes a flipped bit to wrong voxels without a word). They lie in C order of the chunk grid. The index holds
offset and length of each; both 2^64-1 means that all voxels are the fill value and nothing is stored.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import crc32c as crc32c_of_buffer
import imagecodecs
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from mimscale.store.layout import CODECS

# Blosc with its own thread pool neither survives a fork nor writes the same bytes for every number of threads.
numcodecs.blosc.use_threads = False

EMPTY = 2**64 - 1
CRC_BYTES = 4
# The crc32c of any data with its own crc32c behind it: one pass over a chunk, nothing to cut off and compare.
_CRC_RESIDUE = 0x48674BC7
_BLOSC_HEADER = struct.Struct("<4x3I")  # decoded bytes, bytes a block, encoded bytes
_HEADER_BYTES = _BLOSC_HEADER.size + CRC_BYTES
_SHUFFLES = {"bitshuffle": numcodecs.blosc.BITSHUFFLE, "shuffle": numcodecs.blosc.SHUFFLE}
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_PLACES_TRIED = 64
_CHUNKS_SAMPLED = 16


def chunk_grid(shape: tuple[int, ...], chunk_voxels: int) -> tuple[int, int, int, int]:
    """Number of inner chunks along C, Z, Y, X of an array [C, Z, Y, X]."""
    channels, z, y, x = shape
    return (channels, -(-z // chunk_voxels), -(-y // chunk_voxels), -(-x // chunk_voxels))


def index_bytes(shape: tuple[int, ...], chunk_voxels: int) -> int:
    """Length of the shard index, its crc32c included."""
    return int(np.prod(chunk_grid(shape, chunk_voxels))) * 16 + CRC_BYTES


def crc32c(data: bytes | memoryview) -> bytes:
    """The four bytes that the crc32c codec appends."""
    return struct.pack("<I", crc32c_of_buffer.crc32c(data))


@dataclass(frozen=True)
class Blosc:
    """How the chunks of one array are compressed."""

    compressor: str
    level: int
    shuffle: str  # "shuffle" or "bitshuffle"

    def compress(self, chunk: NDArray[Any]) -> bytes:
        """One contiguous chunk, without its crc32c."""
        data: bytes = numcodecs.blosc.compress(chunk, self.compressor.encode(), self.level, _SHUFFLES[self.shuffle])
        return data


def choose_blosc(volume: NDArray[Any], fill_value: float, chunk_voxels: int, codec: str) -> Blosc:
    """The settings of preset `codec` for a volume [C, Z, Y, X], with the shuffle that fits its voxels.

    `fast` is there to be read: bits take 2.5 times as long as bytes to put back, and save a tenth. Otherwise a few
    chunks are compressed with each; which is smaller depends on noise and range, and the wrong one costs up to 15 %.
    The same voxels always give the same choice.
    """
    compressor, level = CODECS[codec]
    if codec == "fast":
        return Blosc(compressor, level, "shuffle")
    corners = list(product(*map(range, chunk_grid(volume.shape, chunk_voxels))))
    # Multiples of the golden ratio lie all over the grid; a fixed stride may see nothing but its border.
    places = dict.fromkeys(int(number * _GOLDEN_RATIO % 1 * len(corners)) for number in range(_PLACES_TRIED))
    chunks = _chunks(volume, fill_value, chunk_voxels, [corners[place] for place in places])
    sample = list(islice((chunk.copy() for chunk in chunks if chunk is not None), _CHUNKS_SAMPLED))
    choices = [Blosc(compressor, level, shuffle) for shuffle in _SHUFFLES]
    return min(choices, key=lambda blosc: sum(len(blosc.compress(chunk)) for chunk in sample))


def encode_shard(volume: NDArray[Any], fill_value: float, chunk_voxels: int, blosc: Blosc) -> Iterator[bytes]:
    """Encode a volume [C, Z, Y, X], piece by piece; the same voxels always give the same bytes."""
    corners = list(product(*map(range, chunk_grid(volume.shape, chunk_voxels))))
    index = np.full((len(corners), 2), EMPTY, dtype="<u8")
    offset = 0
    for number, chunk in enumerate(_chunks(volume, fill_value, chunk_voxels, corners)):
        if chunk is not None:
            data = blosc.compress(chunk)
            data += crc32c(data)
            index[number] = offset, len(data)
            offset += len(data)
            yield data
    entries = index.tobytes()
    yield entries + crc32c(entries)


def _chunks(
    volume: NDArray[Any], fill_value: float, chunk_voxels: int, corners: Sequence[tuple[int, ...]]
) -> Iterator[NDArray[Any] | None]:
    """The chunks at `corners` (c, z, y, x of the chunk grid), filled up where they reach beyond the volume.

    None stands for a chunk of nothing but the fill value. All others lie in one buffer, each valid until the next.
    """
    shape = (chunk_voxels,) * 3
    chunk = np.empty(shape, dtype=volume.dtype.newbyteorder("<"))
    nothing = np.full(shape, fill_value, dtype=chunk.dtype).tobytes()
    for channel, *corner in corners:
        inside = volume[channel][tuple(slice(edge * chunk_voxels, (edge + 1) * chunk_voxels) for edge in corner)]
        if inside.shape != shape:
            chunk[...] = fill_value
        chunk[tuple(slice(edge) for edge in inside.shape)] = inside
        yield None if chunk.tobytes() == nothing else chunk  # as bytes: ten times faster than voxel by voxel


def parse_index(data: bytes | memoryview, data_bytes: int) -> NDArray[np.uint64]:
    """Check and parse a shard index: [number of chunks, 2] = offset, length.

    Args:
        data: the index with its crc32c.
        data_bytes: length of the chunks before it.

    Raises:
        ValueError: the crc32c or a range is wrong.
    """
    if crc32c_of_buffer.crc32c(data) != _CRC_RESIDUE:
        raise ValueError("the shard index has a wrong crc32c")
    index = np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(-1, 2).astype(np.uint64)
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
    if len(data) <= CRC_BYTES or crc32c_of_buffer.crc32c(data) != _CRC_RESIDUE:
        raise ValueError("wrong crc32c")


def decode_chunk(data: bytes | memoryview, out: memoryview) -> None:
    """Check an encoded chunk and decode it into `out`, the bytes of a chunk.

    Raises:
        ValueError: a bit differs from what was written, or the chunk has another size.
    """
    check_chunk(data)
    # Blosc trusts its header: it would fill a part of `out`, or read beyond the data, without a word.
    decoded_bytes, _, encoded_bytes = _BLOSC_HEADER.unpack_from(data) if len(data) >= _HEADER_BYTES else (0, 0, 0)
    if decoded_bytes != out.nbytes or encoded_bytes != len(data) - CRC_BYTES:
        raise ValueError(
            f"is {encoded_bytes} bytes that decode to {decoded_bytes}, by its header, instead of "
            f"{len(data) - CRC_BYTES} that decode to {out.nbytes}"
        )
    try:
        # The same C-Blosc as numcodecs has, 5 % faster a chunk, for it takes no lock and keeps no state.
        imagecodecs.blosc_decode(data, out=out, numthreads=1)  # type: ignore[arg-type]  # takes any buffer
    except imagecodecs.BloscError as error:
        raise ValueError(f"does not decode ({error})") from None


def array_metadata(
    shape: tuple[int, ...], dtype: np.dtype[Any], fill_value: float, chunk_voxels: int, blosc: Blosc
) -> dict[str, Any]:
    """`zarr.json` of the array that a shard holds: only codecs of the Zarr v3 specification."""
    grid = chunk_grid(shape, chunk_voxels)
    compression = {
        "typesize": dtype.itemsize,
        "cname": blosc.compressor,
        "clevel": blosc.level,
        "shuffle": blosc.shuffle,
        "blocksize": 0,
    }
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
                    "codecs": [order, {"name": "blosc", "configuration": compression}, {"name": "crc32c"}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "storage_transformers": [],
    }
