"""Mapped parts of packs: bounded, let go with their file, and only where mapping serves."""

import os
from pathlib import Path

import numpy as np
import pytest
from stream_stores import write_store

from mimscale.store import native, windows
from mimscale.store.files import Files, LocalFile
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.windows import Windows, is_local

pytestmark = pytest.mark.skipif(native.read_boxes is None, reason=f"chunks are decoded by {native.description}")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    write_store(folder, [(40, 36, 44)] * 3)
    return folder


@pytest.fixture
def pack(tmp_path):
    path = tmp_path / "pack"
    path.write_bytes(bytes(range(256)) * 200)
    return path


def mapped_parts(path):
    """How often this process has `path` mapped."""
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_window_has_the_bytes_of_its_part_and_is_mapped_once(pack):
    file, kept = LocalFile(pack), Windows()
    window = kept.of(pack, file.fileno(), 4097, 300)
    assert window == pack.read_bytes()[4097 : 4097 + 300]
    assert kept.of(pack, file.fileno(), 4097, 300) is window
    assert mapped_parts(pack) == 1
    kept.clear()
    del window
    assert mapped_parts(pack) == 0


def test_the_least_recently_used_windows_are_unmapped_beyond_the_limits(pack):
    file = LocalFile(pack)
    for kept in (Windows(most_bytes=3000), Windows(most_windows=3)):
        for position in (0, 1000, 2000, 0, 3000):
            kept.of(pack, file.fileno(), position, 1000)
        assert [position for _, position, _ in kept._windows] == [2000, 0, 3000]
        assert mapped_parts(pack) == 3
        kept.clear()
    alone = Windows(most_bytes=10)
    assert alone.of(pack, file.fileno(), 0, 1000) is not None, "one may be larger than the limit"
    assert len(alone._windows) == 1


def test_what_a_file_does_not_have_cannot_be_mapped(pack):
    file, kept = LocalFile(pack), Windows()
    assert kept.of(pack, file.fileno(), 50_000, 5000) is None
    os.truncate(pack, 0)
    assert kept.of(pack, file.fileno(), 0, 100) is None


def test_windows_go_with_their_file(store):
    manifest, files = load_manifest(store), Files(read_by="map", max_open_files=2)
    reader = ShardReader(store, manifest, files)
    for index in range(len(manifest)):
        reader.read_volume(manifest.row(index))
    assert len(files._windows._windows) == 2
    assert sum(mapped_parts(path) for path in (store / "packs").iterdir()) == 2
    reader.close()
    assert sum(mapped_parts(path) for path in (store / "packs").iterdir()) == 0


@pytest.mark.parametrize(("read_by", "is_on_this_machine", "maps"), [
    ("auto", True, True), ("auto", False, False), ("map", False, True), ("pread", True, False),
])  # fmt: skip
def test_packs_are_mapped_on_file_systems_of_this_machine_unless_the_recipe_says_else(
    store, monkeypatch, read_by, is_on_this_machine, maps
):
    magic = 0xEF53 if is_on_this_machine else 0x0BD00BD0  # ext4, Lustre
    monkeypatch.setattr(native, "file_system", lambda file: magic)
    manifest = load_manifest(store)
    row = manifest.row(0)
    reader = ShardReader(store, manifest, Files(read_by=read_by))
    plain = ShardReader(store, manifest, Files(read_by="pread"))
    assert np.array_equal(reader.read_volume(row), plain.read_volume(row))
    assert (reader.bytes_mapped > 0) == maps
    assert plain.bytes_mapped == 0
    assert reader.bytes_read >= plain.bytes_read - 4096  # gaps between chunks are not read


def test_nothing_is_mapped_without_the_loop_in_c(store, monkeypatch):
    monkeypatch.setattr(native, "read_boxes", None)
    monkeypatch.setattr(native, "file_system", None)
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest)
    reader.read_volume(manifest.row(0))
    assert reader.bytes_mapped == 0


def test_the_kind_of_a_file_system_is_that_of_the_kernel(tmp_path, pack):
    kinds = {entry.split()[1]: entry.split()[2] for entry in Path("/proc/mounts").read_text().splitlines()}
    place = max((point for point in kinds if tmp_path.is_relative_to(point)), key=len)
    file = LocalFile(pack)
    assert file.is_local == (kinds[place].replace("ext2", "ext4").replace("ext3", "ext4") in windows._LOCAL.values())
    with Path("/proc/self/status").open() as status:
        assert not is_local(status.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.file_system(10**6)
