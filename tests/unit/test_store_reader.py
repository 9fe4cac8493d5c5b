import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import make_store, opened

from mimscale.errors import DataError
from mimscale.store import layout, shard
from mimscale.store.files import Files
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.writer import PackWriter


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("reader"))


def expected_box(volume, start, size, outside):
    """The slow way: pad far beyond everything, then cut."""
    padded = np.pad(volume, [(0, 0), (128, 128), (128, 128), (128, 128)], constant_values=outside)
    return padded[(slice(None), *(slice(128 + a, 128 + a + b) for a, b in zip(start, size, strict=True)))]


axis = st.tuples(st.integers(-20, 50), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(box=st.tuples(axis, axis, axis), overlay=st.sampled_from([None, "label"]), index=st.integers(0, 2))
def test_any_box_has_the_voxels_of_the_volume_and_the_outside_value_beyond_it(store, box, overlay, index):
    manifest, reader = opened(store)
    row = manifest.row(index)
    start, size = zip(*box, strict=True)
    outside = 255 if overlay else row.fill_value
    volume = reader.read_volume(row, overlay)
    assert np.array_equal(reader.read(row, start, size, overlay), expected_box(volume, start, size, outside))
    reader.close()


starts = st.lists(st.tuples(*[st.integers(-20, 40)] * 3), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(starts=starts, size=st.tuples(*[st.integers(1, 40)] * 3), overlay=st.sampled_from([None, "label"]))
def test_crops_that_are_read_together_are_those_that_are_read_alone(store, starts, size, overlay):
    manifest, reader = opened(store)
    row = manifest.row(0)
    crops = reader.read_crops(row, starts, size, overlay)
    assert len(crops) == len(starts)
    for start, crop in zip(starts, crops, strict=True):
        assert np.array_equal(crop, reader.read(row, start, size, overlay))
    reader.close()


def test_what_crops_share_is_decoded_once(store):
    manifest, reader = opened(store)
    out = [np.empty((1, 16, 16, 16), np.int16) for _ in range(3)]
    crops = reader.read_crops(manifest.row(0), [(0, 16, 16), (0, 16, 16), (0, 16, 12)], (16, 16, 16), out=out)
    assert all(crop is place for crop, place in zip(crops, out, strict=True))
    assert reader.voxels_decoded == 2 * 16**3


def test_voxels_are_put_into_the_array_that_is_given(store):
    manifest, reader = opened(store)
    out = np.full((1, 8, 8, 8), 99, dtype=np.float32)
    assert reader.read(manifest.row(0), (5, 10, 10), (8, 8, 8), out=out) is out
    assert np.array_equal(out, reader.read(manifest.row(0), (5, 10, 10), (8, 8, 8)))
    with pytest.raises(ValueError, match="the box needs"):
        reader.read(manifest.row(0), (0, 0, 0), (9, 8, 8), out=out)


def test_only_chunks_that_the_box_touches_are_read(store):
    manifest, reader = opened(store)
    row = manifest.row(0)
    reader.read(row, (0, 16, 16), (16, 16, 16))
    assert reader.voxels_decoded == 16**3
    assert reader.bytes_read < row.length_bytes / 3
    before = reader.bytes_read
    reader.read(row, (0, 16, 16), (16, 16, 16))
    assert reader.bytes_read - before < before  # the index came from the cache


def test_few_open_files_are_enough_for_many_packs(store):
    manifest = load_manifest(store)
    files = Files(max_open_files=1)
    reader = ShardReader(store, manifest, files, max_cached_indices=1)
    for _ in range(2):
        for index in range(len(manifest)):
            for overlay in (None, "label"):
                reader.read_volume(manifest.row(index), overlay)
    assert len(files._open) == 1
    assert len(reader._indices) == 1


def test_a_reader_works_in_a_forked_child(store):
    manifest, reader = opened(store)
    volume = reader.read_volume(manifest.row(0))
    child = os.fork()
    if child == 0:
        same = np.array_equal(reader.read_volume(manifest.row(0)), volume)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_volume_without_the_overlay_is_named(store):
    manifest, reader = opened(store)
    row = manifest.row(1)
    with pytest.raises(DataError, match=rf"volume {row.id}: has no overlay 'mask' \(it has: label\)"):
        reader.read(row, (0, 0, 0), (4, 4, 4), "mask")


def write_pack(folder, volume, fill=0.0, chunk_voxels=8, codec="zstd"):
    with PackWriter(folder / "packs" / "part-00000.zarr.zip", chunk_voxels=chunk_voxels, codec=codec) as pack:
        return pack.add("a" * 16, volume, fill_value=fill, spacing_mm=(1.0, 1.0, 1.0), attributes={})


def row_for(store, place, volume, fill):
    shape = {"shape": volume.shape, "dtype": volume.dtype.name, "fill_value": fill, "part": 0, "id": "a" * 16}
    where = {"offset_bytes": place.offset_bytes, "length_bytes": place.length_bytes}
    return dataclasses.replace(load_manifest(store).row(0), **shape, **where)


@pytest.mark.parametrize("codec", ["zstd", "fast"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 9, 8), (3, 17, 5, 24)])
def test_every_dtype_and_size_comes_back_as_it_was(tmp_path, store, dtype, shape, codec):
    volume = (np.random.RandomState(0).standard_normal(shape) * 100).astype(dtype)
    place = write_pack(tmp_path, volume, codec=codec)
    info = dataclasses.replace(layout.read_info(store), chunk_voxels=8, codec=codec)
    layout.write_info(tmp_path, info)
    reader = ShardReader(tmp_path, load_manifest(store))
    back = reader.read_volume(row_for(store, place, volume, 0.0))
    assert back.dtype == volume.dtype
    assert np.array_equal(back, volume)


def test_chunks_of_air_are_not_stored_and_come_back_as_air(tmp_path, store):
    volume = np.full((1, 32, 8, 8), -1024, dtype=np.int16)
    volume[0, :8] = np.arange(512).reshape(8, 8, 8)
    place = write_pack(tmp_path, volume, fill=-1024.0)
    *_, index = shard.encode_shard(volume, -1024.0, 8, shard.Blosc("zstd", 3, "shuffle"))
    empty = shard.parse_index(index, 10**6)[:, 0] == shard.EMPTY
    assert empty.tolist() == [False, True, True, True]
    layout.write_info(tmp_path, dataclasses.replace(layout.read_info(store), chunk_voxels=8))
    reader = ShardReader(tmp_path, load_manifest(store))
    assert np.array_equal(reader.read_volume(row_for(store, place, volume, -1024.0)), volume)


def test_a_codec_that_the_reader_does_not_know_is_left_to_zarr(tmp_path, store):
    zarr = pytest.importorskip("zarr")
    volume = (np.random.RandomState(0).rand(1, 20, 12, 9) * 1000).astype(np.int16)
    path = layout.pack_path(tmp_path, 0)
    path.parent.mkdir()
    with zarr.storage.ZipStore(path, mode="w") as files:
        group = zarr.create_group(files).create_group("a" * 16)
        array = group.create_array(
            "0", shape=volume.shape, dtype="int16", chunks=volume.shape, compressors=zarr.codecs.GzipCodec()
        )
        array[...] = volume
    layout.write_info(tmp_path, dataclasses.replace(layout.read_info(store), codec="gzip"))
    reader = ShardReader(tmp_path, load_manifest(store))
    row = dataclasses.replace(load_manifest(store).row(0), id="a" * 16, part=0, shape=volume.shape, fill_value=-5.0)
    box = reader.read(row, (-2, 4, 3), (9, 6, 8))
    assert np.array_equal(box, expected_box(volume, (-2, 4, 3), (9, 6, 8), -5))
    missing = dataclasses.replace(row, id="b" * 16)
    with pytest.raises(DataError, match="zarr-python cannot read it"):
        reader.read_volume(missing)


def test_the_same_volumes_give_the_same_pack(tmp_path):
    volume = (np.random.RandomState(0).rand(2, 20, 12, 9) * 1000).astype(np.int16)
    packs = []
    for name in ("one", "two"):
        write_pack(tmp_path / name, volume)
        packs.append((tmp_path / name / "packs" / "part-00000.zarr.zip").read_bytes())
    assert packs[0] == packs[1]


def test_a_pack_that_is_not_finished_has_no_final_name(tmp_path):
    def stop_half_way():
        with PackWriter(tmp_path / "pack.zarr.zip", chunk_voxels=8, codec="zstd") as pack:
            pack.add("a", np.ones((1, 8, 8, 8), np.int16), fill_value=0, spacing_mm=(1, 1, 1), attributes={})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


def test_a_volume_is_an_ome_zarr_image_in_millimetres(store):
    import zipfile

    row = load_manifest(store).row(0)
    with zipfile.ZipFile(layout.pack_path(store, row.part)) as pack:
        attributes = json.loads(pack.read(f"{row.id}/zarr.json"))["attributes"]
    image = attributes["ome"]["multiscales"][0]
    assert [axis["name"] for axis in image["axes"]] == ["c", "z", "y", "x"]
    assert image["axes"][1]["unit"] == "millimeter"
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 2.0, 1.5, 1.0]
    assert np.array_equal(np.ravel(attributes["mimscale"]["affine_xyz_to_ras_mm"]), row.affine)
