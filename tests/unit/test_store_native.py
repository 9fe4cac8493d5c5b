"""The loop over chunks in C: the voxels that zarr-python reads, no trust in what a file says, and no need of it."""

import ctypes
import mmap
import os
import subprocess
import sys
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from store_samples import make_store

from mimscale.errors import DataError
from mimscale.store import layout, native, shard
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.writer import PackWriter

EDGE = 8
CHUNK = (EDGE,) * 3
GUARD = 0xA5
TMPFS = 0x01021994

pytestmark = pytest.mark.skipif(native.read_boxes is None, reason=f"chunks are decoded by {native.description}")


def encoded(chunk, compressor="lz4hc", shuffle="shuffle"):
    data = shard.Blosc(compressor, 5, shuffle).compress(np.ascontiguousarray(chunk))
    return data + shard.crc32c(data)


def read_one(data, dtype=np.int16, read_boxes=native.read_boxes, **changed):
    """Decode one chunk that lies at the start of a shard into the middle of guarded memory."""
    guarded = np.full(3 * EDGE**3 * np.dtype(dtype).itemsize, GUARD, np.uint8)
    third = len(guarded) // 3
    view = guarded[third : 2 * third].view(dtype).reshape(1, *CHUNK)
    arguments = {
        "index": np.array([[0, len(data)]], np.uint64),
        "grid": (1, 1, 1, 1),
        "edge": EDGE,
        "fill": bytes(np.dtype(dtype).itemsize),
        "boxes": [((0, 0, 0), CHUNK, view)],
        "gap_bytes": 0,
        "largest_read_bytes": 1 << 20,
        "announce": None,
        "source": lambda offset, length: memoryview(data)[offset : offset + length],
        "file": -1,
        "position": 0,
        **changed,
    }
    answer = read_boxes(*arguments.values())
    assert (guarded[:third] == GUARD).all(), "wrote before the box"
    assert (guarded[2 * third :] == GUARD).all(), "wrote behind the box"
    return answer, view[0]


@pytest.mark.parametrize("codec", ["zstd", "fast"])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "uint16", "float32"])
def test_the_voxels_are_those_of_zarr_python_bit_for_bit(tmp_path, dtype, codec):
    random = np.random.RandomState(0)
    volume = (random.rand(2, 27, 20, 33) * 200).astype(dtype)
    volume[:, 8:16, :8, 8:24] = volume[1] = 7  # whole chunks of air, and a channel of nothing else
    volume[1, 20:, 3:9] = random.randint(0, 99, volume[1, 20:, 3:9].shape)
    model = make_store(tmp_path / "model", count=1)
    info = layout.read_info(model)
    with PackWriter(layout.pack_path(tmp_path, 0), chunk_voxels=EDGE, codec=codec) as pack:
        place = pack.add("a" * 16, volume, fill_value=7, spacing_mm=(1.0, 1.0, 1.0), attributes={})
    manifest = load_manifest(model)
    fields = {"id": "a" * 16, "part": 0, "shape": volume.shape, "dtype": dtype, "fill_value": 7.0}
    row = SimpleNamespace(**fields, offset_bytes=place.offset_bytes, length_bytes=place.length_bytes, overlays={})
    layout.write_info(tmp_path, type(info)(**{**vars(info), "chunk_voxels": EDGE, "codec": codec}))
    with zipfile.ZipFile(layout.pack_path(tmp_path, 0)) as pack:
        pack.extractall(tmp_path / "unzipped")
    reference = zarr.open_array(tmp_path / "unzipped" / ("a" * 16) / "0", mode="r")
    reader = ShardReader(tmp_path, manifest)
    for _ in range(30):
        start = [int(random.randint(edge)) for edge in volume.shape[1:]]
        size = [int(random.randint(1, edge - low + 1)) for edge, low in zip(volume.shape[1:], start, strict=True)]
        box = tuple(slice(low, low + edge) for low, edge in zip(start, size, strict=True))
        voxels = reader.read(row, tuple(start), tuple(size))
        assert voxels.dtype == reference.dtype
        assert voxels.tobytes() == np.asarray(reference[(slice(None), *box)]).tobytes()


@pytest.mark.parametrize("compressor", ["lz4hc", "zstd"])
@pytest.mark.parametrize("shuffle", ["shuffle", "bitshuffle"])
def test_a_chunk_that_lies_about_itself_writes_nothing_outside_of_its_place(compressor, shuffle):
    random = np.random.RandomState(1)
    chunk = (np.arange(EDGE**3) // 3 + random.randint(0, 9, EDGE**3)).astype(np.int16).reshape(CHUNK)
    good = encoded(chunk, compressor, shuffle)[: -shard.CRC_BYTES]
    assert np.array_equal(read_one(good + shard.crc32c(good))[1], chunk)
    refused = 0
    for number in range(4000):
        data = bytearray(good)
        # The header and the first bytes behind it say how long everything is; the checksum is that of the lie.
        for _ in range(1 + number % 3):
            data[random.randint(min(len(data), 40) if number % 2 else len(data))] = random.randint(256)
        if number % 5 == 0:
            del data[random.randint(len(data)) :]
            data[12:16] = len(data).to_bytes(4, "little")
        data += shard.crc32c(data)
        (decoded, damaged, _), _ = read_one(bytes(data))
        assert (decoded, damaged) in ((1, None), (0, (0, bytes(data))))
        refused += damaged is not None
    assert refused > 1000  # the rest decodes to other voxels, which only a true checksum can tell


def test_a_damaged_chunk_comes_back_with_its_number_and_bytes():
    data = bytearray(encoded(np.arange(EDGE**3, dtype=np.int16).reshape(CHUNK)))
    data[30] ^= 1
    assert read_one(bytes(data))[0] == (0, (0, bytes(data)), 0)
    assert read_one(b"short")[0] == (0, (0, b"short"), 0)
    assert read_one(b"")[0] == (0, (0, b""), 0)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"grid": (1, 1, 1, 2)}, "grid"),
        ({"grid": (1, 2**62, 2**62, 1)}, "grid"),
        ({"grid": (1, 0, 1, 1)}, "grid"),
        ({"index": np.zeros(15, np.uint8)}, "grid"),
        ({"edge": 0}, "edge"),
        ({"edge": 2**40}, "edge"),
        ({"fill": b""}, "edge, fill"),
        ({"boxes": [((0, 0, 0), (8, 8, 9), np.zeros((1, 8, 8, 9), np.int16))]}, "beyond the chunks"),
        ({"boxes": [((-1, 0, 0), (7, 8, 8), np.zeros((1, 8, 8, 8), np.int16))]}, "beyond the chunks"),
        ({"boxes": [((0, 0, 0), (8, 8, 8), np.zeros((1, 8, 8, 7), np.int16))]}, "not as large as its view"),
        ({"boxes": [((0, 0, 0), (0, 8, 8), np.zeros((1, 0, 8, 8), np.int16))]}, "empty"),
        ({"boxes": [((0, 0, 0), CHUNK, np.zeros((2, 8, 8, 8), np.int16))]}, "not \\[C, Z, Y, X\\]"),
        ({"boxes": [((0, 0, 0), CHUNK, np.zeros((1, 8, 8, 8), np.int32))]}, "not \\[C, Z, Y, X\\]"),
        ({"boxes": [((0, 0, 0), CHUNK, np.zeros((1, 8, 8, 16), np.int16)[..., ::2])]}, "without gaps"),
        ({"index": np.array([[2**63, 2**63]], np.uint64)}, "beyond any file"),
        ({"source": lambda offset, length: bytes(length - 1)}, "fewer bytes"),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(changed, why):
    with pytest.raises(ValueError, match=why):
        read_one(encoded(np.zeros(CHUNK, np.int16)), **changed)


def test_what_reading_raises_comes_through():
    def broken(offset, length):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        read_one(encoded(np.zeros(CHUNK, np.int16)), source=broken)


def test_a_library_that_hides_its_functions_is_named(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace())
    decode, file_system, description = native._load()
    assert decode is None
    assert file_system is None
    assert "imagecodecs._blosc has no blosc_decompress_ctx" in description
    assert "C compiler" in description


def test_without_the_compiled_part_everything_is_read_in_python(tmp_path):
    store = make_store(tmp_path, count=1)
    code = (
        "import sys; sys.modules['mimscale.store._chunks'] = None\n"
        "from pathlib import Path\n"
        "from mimscale.store import native\n"
        "from mimscale.store.manifest import load_manifest\n"
        "from mimscale.store.reader import ShardReader\n"
        "manifest = load_manifest(Path(sys.argv[1]))\n"
        "volume = ShardReader(Path(sys.argv[1]), manifest).read_volume(manifest.row(0))\n"
        "print(native.read_boxes, 'Python' in native.description, volume.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True)
    manifest = load_manifest(store)
    volume = ShardReader(store, manifest).read_volume(manifest.row(0))
    assert done.stdout.split() == ["None", "True", str(volume.sum())]


def test_a_shard_index_that_names_one_chunk_twice_gives_it_twice(tmp_path):
    chunk = np.arange(EDGE**3, dtype=np.int16).reshape(CHUNK)
    data = encoded(chunk)
    twice = np.zeros((1, 8, 8, 16), np.int16)
    (decoded, damaged, _), _ = read_one(
        data,
        index=np.array([[0, len(data)]] * 2, np.uint64),
        grid=(1, 1, 1, 2),
        boxes=[((0, 0, 0), (8, 8, 16), twice)],
    )
    assert (decoded, damaged) == (2, None)
    assert np.array_equal(twice[0], np.concatenate([chunk, chunk], axis=2))


def test_an_error_of_a_damaged_chunk_names_the_volume_as_the_python_loop_does(tmp_path, monkeypatch):
    store = make_store(tmp_path, count=1)
    manifest = load_manifest(store)
    row = manifest.row(0)
    path = layout.pack_path(store, row.part)
    data = bytearray(path.read_bytes())
    data[row.offset_bytes + 40] ^= 1
    path.write_bytes(data)
    said = []
    for read_boxes in (native.read_boxes, None):
        monkeypatch.setattr(native, "read_boxes", read_boxes)
        with pytest.raises(DataError) as error:
            ShardReader(store, manifest).read_volume(row)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert row.id in said[0]


BROKEN_BLOSC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(
    lambda data, to, most, threads: -1
)


def with_libraries(blosc=None, lz4=None):
    """The loop with other addresses of C-Blosc and LZ4."""
    addresses = native.read_boxes.args
    chosen = (addresses[0] if blosc is None else blosc, addresses[1] if lz4 is None else lz4, addresses[2])
    return partial(native.read_boxes.func, *chosen)


def noisy(dtype, edge=32):
    """A chunk of smooth voxels whose low bytes are noise: these do not get smaller, the high ones do."""
    random = np.random.RandomState(2)
    wave = np.add.outer(np.add.outer(np.arange(edge), np.arange(edge)), np.arange(edge))
    return (wave * 8 + random.randint(0, 256, (edge,) * 3)).astype(dtype)


FLAT = np.arange(32**3).reshape((32,) * 3) // 1000  # gets smaller altogether


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("voxels", [noisy(np.float64), FLAT], ids=["noisy", "flat"])
@pytest.mark.parametrize("compressor", ["lz4", "lz4hc", "zstd", "blosclz"])
@pytest.mark.parametrize("shuffle", ["shuffle", "bitshuffle"])
def test_what_is_decoded_without_blosc_is_what_blosc_decodes(dtype, voxels, compressor, shuffle):
    chunk = voxels.astype(dtype)
    data = encoded(chunk, compressor, shuffle)
    shape = {"edge": 32, "boxes": [((0, 0, 0), (32,) * 3, np.empty((1, 32, 32, 32), dtype))]}
    shape["fill"] = bytes(chunk.itemsize)
    for lz4 in (None, 0):
        shape["boxes"][0][2].fill(1)
        answer, _ = read_one(data, dtype, with_libraries(lz4=lz4), **shape)
        assert answer == (1, None, 0)
        assert shape["boxes"][0][2].tobytes() == chunk.tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
@pytest.mark.parametrize("voxels", [noisy(np.float64), FLAT], ids=["noisy", "flat"])
def test_chunks_of_the_preset_for_speed_need_no_blosc(dtype, voxels):
    chunk = voxels.astype(dtype)
    blosc = ctypes.cast(BROKEN_BLOSC, ctypes.c_void_p).value
    view = np.empty((1, 32, 32, 32), dtype)
    shape = {"edge": 32, "boxes": [((0, 0, 0), (32,) * 3, view)], "fill": bytes(chunk.itemsize)}
    (decoded, damaged, _), _ = read_one(encoded(chunk), dtype, with_libraries(blosc), **shape)
    assert (decoded, damaged) == (1, None)
    assert np.array_equal(view[0], chunk)
    assert read_one(encoded(chunk), dtype, with_libraries(blosc, lz4=0), **shape)[0][1] is not None


def test_rows_of_every_length_from_every_voxel_are_joined_right():
    chunk = noisy(np.int16)
    data = encoded(chunk)
    for low in range(32):
        for stop in range(low + 1, 33):
            guarded = np.full((1, 2, 3, stop - low + 8), -1, np.int16)
            box = ((7, 5, low), (9, 8, stop), guarded[..., 4:-4])
            assert read_one(data, edge=32, boxes=[box])[0] == (1, None, 0)
            assert np.array_equal(guarded[0, ..., 4:-4], chunk[7:9, 5:8, low:stop])
            assert (guarded[..., :4] == -1).all()
            assert (guarded[..., -4:] == -1).all()


def test_a_mapping_is_read_where_it_lies_and_never_beyond_its_end():
    chunk = np.arange(EDGE**3, dtype=np.int16).reshape(CHUNK)
    data = encoded(chunk)
    answer, voxels = read_one(data, source=data)
    assert answer == (1, None, len(data))
    assert np.array_equal(voxels, chunk)
    assert read_one(data, source=data[:-1])[0] == (0, (0, b""), 0)
    assert read_one(data, source=b"")[0] == (0, (0, b""), 0)
    flipped = bytearray(data)
    flipped[40] ^= 1
    assert read_one(data, source=flipped)[0] == (0, (0, b""), len(data))
    with pytest.raises(TypeError):
        read_one(data, source=None)


def test_a_mapping_is_left_alone_where_the_page_cache_lacks_a_range(tmp_path):
    chunk = np.arange(EDGE**3, dtype=np.int16).reshape(CHUNK)
    data, position = encoded(chunk), 3 * mmap.PAGESIZE
    (tmp_path / "pack").write_bytes(bytes(position) + data)
    with (tmp_path / "pack").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        given = {"source": memoryview(mapped)[position:], "file": file.fileno(), "position": position}
        assert read_one(data, **given)[0] == (1, None, len(data))
        given["source"].release()
    with (tmp_path / "pack").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        lacks = native.file_system(file.fileno()) != TMPFS  # which is nothing but page cache
        expected = (0, (0, b""), 0) if lacks else (1, None, len(data))
        assert read_one(data, source=data, file=file.fileno(), position=position)[0] == expected
