"""Each way through the reader's decoding gives the voxels that were written: layouts, channels, air, slow storage."""

import dataclasses
import itertools
import os
from functools import partial

import numpy as np
import pytest
from store_samples import make_store

from mimscale.errors import DataError
from mimscale.store import layout, native, reader, shard
from mimscale.store.files import Files
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.writer import PackWriter

EDGE = 8
AIR = -1000


@pytest.fixture(autouse=True, params=["C, mapped", "C, read by calls", "Python"])
def decoded_by(request, monkeypatch):
    """Both loops over chunks must do the same, and the one in C wherever it takes the bytes from."""
    if request.param == "Python":
        monkeypatch.setattr(native, "read_boxes", None)
    elif native.read_boxes is None:
        pytest.skip(native.description)
    read_by = "map" if request.param == "C, mapped" else "pread"
    monkeypatch.setattr(reader, "Files", partial(Files, read_by=read_by))
    return request.param


@pytest.fixture(scope="module")
def volume():
    """Three channels of whole and cut-off chunks, some of them of nothing but air."""
    voxels = np.random.RandomState(0).randint(0, 500, (3, 40, 37, 33)).astype(np.int16)
    voxels[0, 8:24, 8:16, 16:32] = AIR
    voxels[2, :, :16] = AIR
    return voxels


@pytest.fixture(scope="module")
def pack(tmp_path_factory, volume):
    """A store of one volume, its manifest and its row."""
    folder = tmp_path_factory.mktemp("paths")
    model = make_store(folder / "model", count=1)
    row, info = load_manifest(model).row(0), layout.read_info(model)
    with PackWriter(layout.pack_path(folder, 0), chunk_voxels=EDGE, codec="fast") as pack:
        place = pack.add("a" * 16, volume, fill_value=AIR, spacing_mm=(1.0, 1.0, 1.0), attributes={})
    layout.write_info(folder, dataclasses.replace(info, chunk_voxels=EDGE, codec="fast"))
    row = dataclasses.replace(
        row,
        id="a" * 16,
        part=0,
        shape=volume.shape,
        dtype="int16",
        fill_value=float(AIR),
        offset_bytes=place.offset_bytes,
        length_bytes=place.length_bytes,
    )
    return folder, load_manifest(model), row


@pytest.fixture
def opened(pack, decoded_by):
    """A reader of one volume, and its row."""
    folder, manifest, row = pack
    return ShardReader(folder, manifest), row


def box_of(volume, start, size):
    """The slow way: pad far beyond everything, then cut."""
    padded = np.pad(volume, [(0, 0), *[(128, 128)] * 3], constant_values=AIR)
    return padded[(slice(None), *(slice(128 + a, 128 + a + edge) for a, edge in zip(start, size, strict=True)))]


@pytest.mark.parametrize("start", [(0, 0, 0), (8, 16, 16), (5, 3, 7), (8, 5, 16), (24, 13, 9)])
@pytest.mark.parametrize("size", [(8, 8, 8), (16, 24, 8), (13, 11, 17), (1, 1, 1)])
def test_a_box_on_the_chunk_grid_or_off_it_has_the_voxels_of_all_channels(opened, volume, start, size):
    source, row = opened
    assert np.array_equal(source.read(row, start, size), box_of(volume, start, size))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, 13, 11, 17), np.int16),
        np.empty((3, 13, 11, 17), np.float32),
        np.empty((3, 13, 11, 17), ">i2"),
        np.empty((17, 11, 13, 3), np.int16).T,
        np.empty((3, 13, 11, 34), np.int16)[..., ::2],
        np.empty((4, 20, 20, 20), np.int16)[1:, 3:16, 5:16, 2:19],
    ],
    ids=["same", "wider", "big-endian", "transposed", "every-second", "part"],
)
def test_voxels_are_put_into_memory_of_any_layout_and_dtype(opened, volume, out):
    source, row = opened
    source.read(row, (4, 5, 12), out.shape[1:], out=out)
    assert np.array_equal(out, box_of(volume, (4, 5, 12), out.shape[1:]))


def test_crops_may_overlap_repeat_and_reach_beyond_the_volume(opened, volume):
    source, row = opened
    starts = [(-4, 0, 0), (2, 2, 2), (2, 2, 2), (33, 30, 28), (100, 0, 0)]
    for start, crop in zip(starts, source.read_crops(row, starts, (12, 12, 12)), strict=True):
        assert np.array_equal(crop, box_of(volume, start, (12, 12, 12)))


def test_a_bad_chunk_is_named_when_several_crops_are_read(opened, tmp_path, volume):
    source, row = opened
    pack = layout.pack_path(tmp_path, 0)
    pack.parent.mkdir()
    data = bytearray(layout.pack_path(source._store, 0).read_bytes())
    data[row.offset_bytes + 100] ^= 1  # in the first chunk
    pack.write_bytes(data)
    layout.write_info(tmp_path, layout.read_info(source._store))
    damaged = ShardReader(tmp_path, source.manifest)
    with pytest.raises(DataError, match=rf"volume {row.id}: .*chunk \(0, 0, 0, 0\): wrong crc32c"):
        damaged.read_crops(row, [(20, 20, 20), (1, 1, 1)], (8, 8, 8))
    (crop,) = damaged.read_crops(row, [(20, 20, 20)], (8, 8, 8))
    assert np.array_equal(crop, box_of(volume, (20, 20, 20), (8, 8, 8)))


def test_slow_storage_is_asked_for_fewer_and_larger_ranges(opened, volume, monkeypatch):
    source, row = opened
    monkeypatch.setattr(reader, "Files", partial(Files, read_by="pread"))
    requests = []
    read = os.preadv

    def counted(file, buffers, position):
        requests.append(sum(map(len, buffers)))
        return read(file, buffers, position)

    monkeypatch.setattr(os, "preadv", counted)
    asked = {}
    for name, tick_s in (("fast", 1e-9), ("slow", 1e-3)):
        clock = itertools.count(step=tick_s)
        monkeypatch.setattr(reader.time, "perf_counter", lambda clock=clock: next(clock))
        fresh = ShardReader(source._store, source.manifest)
        for _ in range(100):
            requests.clear()
            box = fresh.read(row, (9, 9, 9), (10, 10, 10))
        assert np.array_equal(box, box_of(volume, (9, 9, 9), (10, 10, 10)))
        asked[name] = list(requests)
    assert len(asked["slow"]) < len(asked["fast"])
    assert sum(asked["slow"]) > sum(asked["fast"])


def test_a_long_run_of_chunks_is_read_in_pieces(opened, volume, monkeypatch):
    source, row = opened
    monkeypatch.setattr(reader, "_LARGEST_READ_BYTES", 3000)
    fresh = ShardReader(source._store, source.manifest)
    assert np.array_equal(fresh.read_volume(row), volume)
    assert len(fresh._buffer) < 10_000  # the index and single chunks


def test_a_chunk_whose_header_lies_is_refused():
    chunk = shard.Blosc("lz4hc", 5, "shuffle").compress(np.arange(512, dtype=np.int16).reshape(8, 8, 8))
    out = np.empty(1024, np.uint8)
    shard.decode_chunk(chunk + shard.crc32c(chunk), out.data)
    assert np.array_equal(out.view(np.int16), np.arange(512))
    for at in (4, 12):  # decoded and encoded length, little-endian
        lying = bytearray(chunk)
        lying[at : at + 4] = (10**6).to_bytes(4, "little")
        with pytest.raises(ValueError, match="by its header, instead of"):
            shard.decode_chunk(bytes(lying) + shard.crc32c(lying), out.data)
    with pytest.raises(ValueError, match="by its header"):
        shard.decode_chunk(b"short" + shard.crc32c(b"short"), out.data)
