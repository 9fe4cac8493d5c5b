"""A stage holds complete, verified copies of packs within its limit, and nothing else under a final name."""

import errno
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
from stream_stores import write_store

from mimscale.errors import DataError
from mimscale.lock import sole_writer
from mimscale.store import layout, stage
from mimscale.store.files import Files
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.stage import STAGE_COLUMNS, Added, Pack, Stage, packs_of

SHAPES = [(40, 36, 44)] * 4
GIB = 2**30


@pytest.fixture
def store(tmp_path) -> Path:
    write_store(tmp_path / "store", SHAPES)
    return tmp_path / "store"


def a_stage(store: Path, folder: Path, limit_bytes: int = GIB, overlay: str | None = None) -> Stage:
    return Stage(folder, limit_bytes, packs_of(store, load_manifest(store, STAGE_COLUMNS), overlay))


def pack(store: Path, part: int) -> Path:
    return layout.pack_path(store, part)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_copy_is_its_pack_byte_for_byte(store, tmp_path):
    staged = a_stage(store, tmp_path / "stage", overlay="label")
    for path in (pack(store, 1), layout.overlay_path(store, "label", 1)):
        assert staged.copy_of(path) is None
        assert staged.add(path) is Added.COPIED
        copy = staged.copy_of(path)
        assert copy.read_bytes() == path.read_bytes()
        assert staged.add(path) is Added.THERE
    assert len(names(tmp_path / "stage")) == 2, "locks and drafts are gone"


def test_a_reader_reads_the_copy_as_soon_as_it_is_there_and_the_pack_when_it_is_gone(store, tmp_path, monkeypatch):
    monkeypatch.setattr("mimscale.store.files.LOOK_FOR_COPY_EVERY_S", 0.0)
    staged = a_stage(store, tmp_path / "stage")
    manifest = load_manifest(store)
    files = Files(staged)
    reader = ShardReader(store, manifest, files)
    row = manifest.row(2)
    expected = reader.read_volume(row)
    assert (files.hits, files.misses) == (0, 1)
    staged.add(pack(store, row.part))
    assert np.array_equal(reader.read_volume(row), expected)
    assert (files.hits, files.misses) == (1, 1)
    pack(store, row.part).rename(tmp_path / "aside")  # the store is not needed for it any more
    assert np.array_equal(reader.read_volume(row), expected)
    (tmp_path / "aside").rename(pack(store, row.part))
    staged.discard(pack(store, row.part))
    assert np.array_equal(reader.read_volume(row), expected)
    assert (files.hits, files.misses) == (2, 2)
    held = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [name for name in held if str(tmp_path / "stage") in name], "an evicted copy still takes up the disk"


def test_the_least_recently_used_copies_make_room(store, tmp_path):
    size = pack(store, 0).stat().st_size
    staged = a_stage(store, tmp_path / "stage", limit_bytes=int(2.5 * size))
    now = time.time()
    for part in (0, 1):
        assert staged.add(pack(store, part)) is Added.COPIED
        os.utime(staged.copy_of(pack(store, part)), (now - 100 + part, now - 100 + part))
    staged.mark_used(staged.copy_of(pack(store, 0)))
    assert staged.add(pack(store, 2)) is Added.COPIED
    assert staged.copy_of(pack(store, 1)) is None, "1 was used before 0"
    assert staged.copy_of(pack(store, 0)) is not None
    assert sum(path.stat().st_size for path in (tmp_path / "stage").iterdir()) <= 2.5 * size


def test_a_copy_that_is_still_needed_never_makes_room(store, tmp_path):
    size = pack(store, 0).stat().st_size
    staged = a_stage(store, tmp_path / "stage", limit_bytes=int(1.5 * size))
    staged.add(pack(store, 0))
    assert staged.add(pack(store, 1), keep=frozenset({pack(store, 0)})) is Added.FULL
    assert staged.copy_of(pack(store, 0)) is not None
    assert staged.add(pack(store, 1)) is Added.COPIED


def test_a_pack_larger_than_the_limit_pushes_nothing_out(store, tmp_path):
    size = pack(store, 0).stat().st_size
    a_stage(store, tmp_path / "stage").add(pack(store, 0))
    small = a_stage(store, tmp_path / "stage", limit_bytes=size // 2)
    assert small.add(pack(store, 1)) is Added.FULL
    assert small.copy_of(pack(store, 0)) is not None


@pytest.mark.parametrize("where", ["fallocate", "write", "lock"])
def test_a_full_disk_leaves_nothing_behind(where, store, tmp_path, monkeypatch):
    staged = a_stage(store, tmp_path / "stage")

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "lock":
        monkeypatch.setattr(stage, "sole_writer", lambda *arguments: (_ for _ in ()).throw(DataError("disk is full")))
    else:
        monkeypatch.setattr(os, {"fallocate": "posix_fallocate", "write": "pwrite"}[where], full)
    assert staged.add(pack(store, 0)) is Added.FULL
    assert names(tmp_path / "stage") == set()


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "empty"])
def test_a_damaged_pack_gets_no_copy(damage, store, tmp_path):
    path = pack(store, 0)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        row = load_manifest(store).row(0)
        data[row.offset_bytes + row.length_bytes // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes({"flip": data, "truncate": data[: len(data) // 3], "empty": b""}[damage])
    staged = a_stage(store, tmp_path / "stage")
    assert staged.add(path) is Added.UNREADABLE
    assert names(tmp_path / "stage") == set()


def test_a_pack_that_somebody_else_is_copying_is_left_to_them(store, tmp_path):
    staged = a_stage(store, tmp_path / "stage")
    name = staged.packs[pack(store, 0)].name
    with sole_writer(tmp_path / "stage" / f"{name}.lock", "another run"):
        assert staged.add(pack(store, 0)) is Added.BUSY
    assert staged.add(pack(store, 0)) is Added.COPIED


def test_two_stores_of_one_content_share_copies_and_two_contents_under_one_path_do_not(store, tmp_path):
    a_stage(store, tmp_path / "stage").add(pack(store, 0))
    store.rename(tmp_path / "moved")
    moved = a_stage(tmp_path / "moved", tmp_path / "stage")
    assert moved.copy_of(pack(tmp_path / "moved", 0)) is not None
    write_store(store, [(44, 36, 40)] * 4)  # other voxels at the old path
    assert a_stage(store, tmp_path / "stage").copy_of(pack(store, 0)) is None


def test_the_draft_of_a_killed_copier_is_removed_and_that_of_a_living_one_is_not(store, tmp_path):
    folder = tmp_path / "stage"
    staged = a_stage(store, folder)
    dead = folder / ".tmp-0123456789abcdef-part-00009.zarr.zip.999999.1"
    ticks = stage.Process.this().start_ticks
    alive = folder / f".tmp-0123456789abcdef-part-00008.zarr.zip.{os.getpid()}.{ticks}"
    for path in (dead, alive):
        path.write_bytes(b"half")
    assert staged.add(pack(store, 0)) is Added.COPIED
    assert not dead.exists()
    assert alive.exists()


def test_a_folder_that_cannot_be_written_is_refused_by_name(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=rf"{tmp_path}/file: .*choose another stream.stage_dir"):
        a_stage(store, tmp_path / "file")


def test_a_shard_whose_sha256_ends_in_a_zero_byte_is_copied_too(tmp_path):
    # An array of byte strings drops zeros at the end.
    data = next(d for n in range(10**5) if hashlib.sha256(d := n.to_bytes(4, "big")).digest()[-1] == 0)
    (tmp_path / "pack").write_bytes(data)
    digests = np.array([hashlib.sha256(data).digest()], dtype="S32")
    shards = Pack(tmp_path / "pack", "0-part-00000.zarr.zip", np.array([0]), np.array([4]), digests)
    assert Stage(tmp_path / "stage", GIB, [shards]).add(tmp_path / "pack") is Added.COPIED
