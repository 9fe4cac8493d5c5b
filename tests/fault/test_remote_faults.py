"""Servers that fail: what passes is tried again, what stays is named, and nothing false reaches a crop."""

import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from s3_server import S3Server, put, upload, use_server
from stream_stores import open_loader, write_store

from mimscale.errors import DataError
from mimscale.store import files
from mimscale.store.layout import read_info
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader

SHAPES = [(40, 36, 44)] * 3
PACK = "stores/one/packs/part-00001.zarr.zip"  # of vol_001


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(files, "READ_TIMEOUT_S", 1)
    server = S3Server()
    use_server(monkeypatch, server)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of the servers of other tests
    yield server
    server.close()


@pytest.fixture
def store(server, local) -> Path:
    return upload(server, local, "stores/one")


def opened(store: Path):
    manifest = load_manifest(store)
    return ShardReader(store, manifest), manifest.row(1)


@pytest.mark.parametrize(("fault", "times"), [("error500", 2), ("slow_down", 2), ("stall", 2), ("cut", 1)])
def test_a_fault_that_passes_costs_time_and_nothing_else(fault, times, server, store, local):
    reader, row = opened(store)
    server.fail(fault, times, of=PACK)
    voxels = reader.read_volume(row)
    assert server.faults_left == {}
    assert np.array_equal(voxels, opened(local)[0].read_volume(row))


def test_store_json_and_manifest_are_tried_again_too(server, store, local):
    server.fail("error500", 1, of="store.json")
    server.fail("slow_down", 1, of="manifest.parquet")
    assert len(load_manifest(store)) == 3
    assert server.faults_left == {}


def test_a_server_that_goes_on_failing_is_an_error_that_names_the_volume_and_the_object(server, store):
    reader, row = opened(store)
    server.fail("error500", 1000, of=PACK)
    with pytest.raises(DataError, match=rf"s3:/bucket/{PACK}: .*volume vol_001 lies in it"):
        reader.read_volume(row)


def test_a_server_that_does_not_answer_is_given_up_after_bounded_time(server, store, monkeypatch):
    monkeypatch.setattr(files, "ATTEMPTS", 2)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    reader, row = opened(store)
    server.fail("stall", 1000, of=PACK)
    began = time.monotonic()
    with pytest.raises(DataError, match="vol_001"):
        reader.read_volume(row)
    assert time.monotonic() - began < 60


def test_a_missing_object_is_named_at_once(server, store):
    reader, row = opened(store)
    put(server, PACK, None)
    server.gets.clear()
    with pytest.raises(DataError, match=rf"s3:/bucket/{PACK}: .*volume vol_001 lies in it; restore the pack"):
        reader.read_volume(row)
    assert len(server.gets) == 1, "an object that is not there does not come by asking again"


def test_a_range_that_comes_short_is_named(server, store):
    reader, row = opened(store)
    reader.read(row, (0, 0, 0), (8, 8, 8))  # the index is known
    server.fail("short", 1, of=PACK)
    with pytest.raises(DataError, match=rf"volume vol_001: s3:/bucket/{PACK}: truncated: ends at byte \d+, \d+ bytes"):
        reader.read_volume(row)


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_an_object_that_was_cut_off_is_named(kept, server, store, local):
    reader, row = opened(store)
    data = (local / PACK.removeprefix("stores/one/")).read_bytes()
    put(server, PACK, data[: int(len(data) * kept)])
    with pytest.raises(DataError, match=rf"volume vol_001: s3:/bucket/{PACK}: truncated: ends at byte"):
        reader.read_volume(row)


def test_a_flipped_bit_on_the_way_is_found(server, store, local):
    reader, row = opened(store)
    data = bytearray((local / PACK.removeprefix("stores/one/")).read_bytes())
    data[row.offset_bytes + 100] ^= 1
    put(server, PACK, bytes(data))
    with pytest.raises(DataError, match=r"volume vol_001: .*chunk"):
        reader.read_volume(row)


def test_the_stream_replaces_samples_of_a_missing_object_and_says_so(server, store):
    put(server, PACK, None)
    with open_loader(store) as loader:
        batches = [next(loader) for _ in range(2)]
        assert {bad.volume_id for bad in loader.bad_samples} == {"vol_001"}
    assert all("vol_001" not in batch.volume_ids for batch in batches)


def test_no_server_at_all_is_a_named_error(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setattr(files, "ATTEMPTS", 1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"s3:/bucket/store/store.json: .*127.0.0.1:9"):
        read_info(Path("s3://bucket/store"))
