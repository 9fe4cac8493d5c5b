"""Damage on disk: every read says so, and names the volume."""

import os
import shutil
from functools import partial

import numpy as np
import pytest
from fault_injector import flip_bit
from store_samples import config_of, make_store, opened, rows_of, shard_index

from mimscale.errors import DataError
from mimscale.ingest.pool import process_pool
from mimscale.ingest.run import ingest
from mimscale.store import layout, reader, shard
from mimscale.store.files import Files
from mimscale.store.manifest import load_manifest, write_manifest
from mimscale.store.verify import verify


@pytest.fixture(autouse=True, params=["map", "pread"])
def read_by(request, monkeypatch):
    """Every damage is found and named in the same words, whether packs are mapped or read by calls."""
    monkeypatch.setattr(reader, "Files", partial(Files, read_by=request.param))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("pristine"), count=4)


@pytest.fixture
def store(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "store")


def read_all(store, row, overlay=None):
    return opened(store)[1].read_volume(row, overlay)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9])
def test_a_flipped_bit_in_a_chunk_is_named_with_volume_pack_and_chunk(store, where):
    row = load_manifest(store).row(1)
    data_bytes = row.length_bytes - shard.index_bytes(row.shape, 16)
    flip_bit(layout.pack_path(store, row.part), row.offset_bytes + int(where * data_bytes))
    with pytest.raises(
        DataError, match=rf"volume {row.id}: .*part-0000{row.part}\.zarr\.zip: chunk \(0, .*crc32c.*--verify"
    ):
        read_all(store, row)
    (bad,) = [bad for bad in verify(store) if "chunk" in bad.reason]
    assert (bad.volume, bad.path) == (row.id, str(layout.pack_path(store, row.part)))


def test_chunks_beside_the_damaged_one_can_be_read(store):
    manifest, reader = opened(store)
    row = manifest.row(1)
    whole = reader.read_volume(row)
    flip_bit(layout.pack_path(store, row.part), row.offset_bytes + 5)  # the first chunk
    box = opened(store)[1].read(row, (16, 16, 16), (5, 16, 16))
    assert np.array_equal(box, whole[:, 16:21, 16:32, 16:32])


def test_a_flipped_bit_in_the_index_is_named(store):
    row = load_manifest(store).row(0)
    flip_bit(layout.pack_path(store, row.part), row.offset_bytes + row.length_bytes - 20)
    with pytest.raises(DataError, match=rf"volume {row.id}: .*the shard index has a wrong crc32c"):
        read_all(store, row)
    assert row.id in {bad.volume for bad in verify(store)}


def test_a_damaged_overlay_is_named(store):
    row = load_manifest(store).row(2)
    place = row.overlays["label"]
    flip_bit(layout.overlay_path(store, "label", place.part), place.offset_bytes + 9)
    with pytest.raises(DataError, match=rf"volume {row.id}: .*overlays/label/part"):
        read_all(store, row, "label")
    assert read_all(store, row).shape == row.shape
    assert row.id in {bad.volume for bad in verify(store) if "overlays" in bad.path}


def test_a_truncated_pack_is_named(store):
    row = load_manifest(store).row(0)
    os.truncate(layout.pack_path(store, row.part), row.offset_bytes + row.length_bytes // 2)
    with pytest.raises(DataError, match=rf"volume {row.id}: .*truncated: ends at byte"):
        read_all(store, row)
    reasons = [bad.reason for bad in verify(store) if bad.path == str(layout.pack_path(store, row.part))]
    assert any("truncated" in reason for reason in reasons)
    assert any("not a readable pack" in reason for reason in reasons)


@pytest.mark.parametrize("overlay", [None, "label"])
def test_a_missing_pack_is_an_error_and_not_air(store, overlay):
    row = load_manifest(store).row(0)
    path = layout.overlay_path(store, overlay, row.part) if overlay else layout.pack_path(store, row.part)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: No such file.*volume {row.id} lies in it"):
        read_all(store, row, overlay)
    assert row.id in {bad.volume for bad in verify(store)}


def test_a_pack_of_another_store_under_this_name_is_an_error(store, tmp_path):
    row = load_manifest(store).row(0)
    other = make_store(tmp_path / "other", count=2, chunk_voxels=8)
    shutil.copy(next((other / "packs").iterdir()), layout.pack_path(store, row.part))
    with pytest.raises(DataError, match=f"volume {row.id}"):
        read_all(store, row)


def test_verify_sees_a_flipped_bit_outside_of_every_shard(store):
    assert verify(store) == []
    row = load_manifest(store).row(0)
    path = layout.pack_path(store, row.part)
    flip_bit(path, path.read_bytes().index(b'"millimeter"') + 3)
    assert [bad.path for bad in verify(store)] == [str(path)]


def test_every_bad_chunk_is_named_not_just_the_first(store):
    row = load_manifest(store).row(1)
    path = layout.pack_path(store, row.part)
    for offset, _ in shard_index(path, row, layout.read_info(store).chunk_voxels)[[0, 2]].tolist():
        flip_bit(path, row.offset_bytes + offset + 9)
    assert [bad.volume for bad in verify(store) if "chunk" in bad.reason] == [row.id, row.id]


@pytest.mark.parametrize("overlay", [None, "label"])
def test_verify_names_every_volume_of_a_missing_pack(store, overlay):
    row = load_manifest(store).row(0)
    path = layout.overlay_path(store, overlay, row.part) if overlay else layout.pack_path(store, row.part)
    path.unlink()
    lost = {other.id for other in rows_of(store) if other.part == row.part}
    bad = verify(store)
    assert {item.volume for item in bad} == lost
    assert {item.path for item in bad} == {str(path)}
    assert all("missing; restore it" in item.reason for item in bad)


@pytest.mark.parametrize("name", ["packs/part-00007.zarr.zip", "packs/notes.txt", "overlays/mask/part-00000.zarr.zip"])
def test_verify_names_a_file_among_the_packs_that_the_manifest_does_not_know(store, name):
    (store / name).parent.mkdir(exist_ok=True)
    shutil.copy(layout.pack_path(store, 0), store / name)
    (bad,) = verify(store)
    assert (bad.volume, bad.path) == ("", str(store / name))
    assert "the manifest knows no such pack" in bad.reason


def test_verify_in_several_processes_finds_what_one_finds(store):
    row = load_manifest(store).row(1)
    flip_bit(layout.pack_path(store, row.part), row.offset_bytes + 5)
    layout.overlay_path(store, "label", 1 - row.part).unlink()
    with process_pool(2, 4) as pool:
        assert pool is not None
        found = verify(store, pool)
    assert found
    assert found == verify(store)


def test_a_shard_of_a_volume_that_is_not_in_the_manifest_is_checked_by_its_zip(store):
    rows = rows_of(store)
    write_manifest(store, rows[1:])
    assert verify(store) == []
    flip_bit(layout.pack_path(store, rows[0].part), rows[0].offset_bytes + 5)
    (bad,) = verify(store)
    assert (bad.volume, bad.path) == (rows[0].id, str(layout.pack_path(store, rows[0].part)))


def test_a_damaged_pack_is_repaired_as_the_error_says(store, pristine):
    row = load_manifest(store).row(0)
    path = layout.pack_path(store, row.part)
    before = path.read_bytes()
    path.unlink()
    layout.receipt_path(store, row.part).unlink()
    for name in ("store.subject_key", "store.plan.jsonl"):
        shutil.copy(pristine.parent / name, store.parent / name)
    folder = pristine.parent / "sources"
    sources = {kind: str(folder / kind / "*.nii.gz") for kind in ("images", "labels")}
    ingest(config_of(sources, store, parts=2, chunk_voxels=16))
    assert path.read_bytes() == before
