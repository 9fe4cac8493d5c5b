"""A mapped pack that cannot be read: the process lives, the volume is named, and another's SIGBUS goes to the other."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from fault_injector import flip_bit
from stream_stores import voxels_of, write_store

from mimscale.errors import DataError
from mimscale.store import layout, native
from mimscale.store.files import Files
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader

SHAPE = (48, 40, 44)

pytestmark = pytest.mark.skipif(native.read_boxes is None, reason=f"chunks are decoded by {native.description}")


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", [SHAPE] * 3)
    return tmp_path / "store"


def mapped_reader(store):
    """A reader that has mapped all packs, and the manifest."""
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, Files(read_by="map"))
    for index in range(len(manifest)):
        reader.read_volume(manifest.row(index))
    assert reader.bytes_mapped > 0
    return reader, manifest


def in_another_process(call, path):
    subprocess.run([sys.executable, "-c", f"import os, sys; {call}", str(path)], check=True)


def truncate(path, to):
    in_another_process(f"os.truncate(sys.argv[1], {to})", path)


@pytest.mark.parametrize("kept", [0.0, 0.4])
def test_a_pack_that_is_truncated_while_it_is_mapped_is_named_and_the_others_can_be_read(store, kept, capfd):
    reader, manifest = mapped_reader(store)
    row = manifest.row(1)
    path = layout.pack_path(store, row.part)
    to = row.offset_bytes + int(kept * row.length_bytes)
    truncate(path, to)
    for _ in range(3):
        with pytest.raises(DataError, match=rf"volume {row.id}: {path}: truncated: ends at byte {to}, \d+ bytes early"):
            reader.read_volume(row)
    for index in (0, 2):
        assert np.array_equal(reader.read_volume(manifest.row(index)), voxels_of(index, SHAPE))
    assert capfd.readouterr().err == "", "a fault that is expected is not worth a traceback"


def test_a_crop_of_the_part_that_is_left_is_read(store):
    reader, manifest = mapped_reader(store)
    row = manifest.row(1)
    truncate(layout.pack_path(store, row.part), row.offset_bytes + row.length_bytes // 2)
    crop = reader.read(row, (0, 0, 0), (16, 40, 44))
    assert np.array_equal(crop, voxels_of(1, SHAPE)[:, :16])


def test_zeros_where_a_pack_was_cut_off_and_made_long_again_are_found(store):
    reader, manifest = mapped_reader(store)
    row = manifest.row(1)
    path = layout.pack_path(store, row.part)
    size = path.stat().st_size
    truncate(path, row.offset_bytes + 100)
    truncate(path, size)
    with pytest.raises(DataError, match=rf"volume {row.id}: {path}: chunk \(0, 0, 0, 0\): wrong crc32c"):
        reader.read_volume(row)


def test_a_bit_that_flips_while_its_pack_is_mapped_is_found(store):
    reader, manifest = mapped_reader(store)
    row = manifest.row(2)
    path = layout.pack_path(store, row.part)
    with path.open("r+b") as file:  # in place: the mapping sees it
        file.seek(row.offset_bytes + 40)
        byte = file.read(1)[0]
        file.seek(row.offset_bytes + 40)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match=rf"volume {row.id}: {path}: chunk \(0, 0, 0, 0\): wrong crc32c"):
        reader.read_volume(row)
    flip_bit(layout.pack_path(store, 0), manifest.row(0).offset_bytes + 40)
    reader.close()
    with pytest.raises(DataError, match=r"volume vol_000: .*wrong crc32c"):
        reader.read_volume(manifest.row(0))


def test_a_pack_that_is_deleted_while_it_is_mapped_is_still_there_for_its_reader(store):
    reader, manifest = mapped_reader(store)
    row = manifest.row(1)
    layout.pack_path(store, row.part).unlink()
    assert np.array_equal(reader.read_volume(row), voxels_of(1, SHAPE))
    reader.close()
    with pytest.raises(DataError, match=rf"No such file.*volume {row.id} lies in it"):
        reader.read_volume(row)


def test_threads_that_fault_at_once_each_get_their_own_error(store):
    readers = [mapped_reader(store) for _ in range(4)]
    for index in (0, 1):
        truncate(layout.pack_path(store, index), 100)
    wrong = []

    def read(reader, manifest, index):
        for _ in range(100):
            try:
                voxels = reader.read_volume(manifest.row(index))
            except DataError as error:
                if index == 2 or f"vol_00{index}" not in str(error):
                    wrong.append(error)
            else:
                if index != 2 or not np.array_equal(voxels, voxels_of(2, SHAPE)):
                    wrong.append(index)

    threads = [threading.Thread(target=read, args=(*opened, number % 3)) for number, opened in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What a program does around readings of a truncated pack; `bus_error()` is a fault of its own.
PRELUDE = """
    import ctypes, faulthandler, mmap, os, signal, sys
    from pathlib import Path
    from mimscale.errors import DataError
    from mimscale.store.files import Files
    from mimscale.store.manifest import load_manifest
    from mimscale.store.reader import ShardReader

    store = Path(sys.argv[1])
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, Files(read_by="map"))

    def survive(index):
        reader.read_volume(manifest.row(index))
        os.truncate(next((store / "packs").glob(f"*{index}.zarr.zip")), 100)
        try:
            reader.read_volume(manifest.row(index))
        except DataError:
            print("survived", flush=True)

    def bus_error():
        with open(store / "own", "w+b") as file:
            file.truncate(8192)
            mapped = mmap.mmap(file.fileno(), 8192)
            file.truncate(0)
        mapped[5000]
"""
PROGRAMS = {
    "nobody else": "survive(0); survive(1); bus_error()",
    "faulthandler before": "faulthandler.enable(); survive(0); survive(1); bus_error()",
    "faulthandler between": "survive(0); faulthandler.enable(); survive(1); bus_error()",
    "faulthandler after": "survive(0); survive(1); faulthandler.enable(); bus_error()",
    "torch's workers": "import torch; torch._C._set_worker_signal_handlers(); survive(0); survive(1); bus_error()",
    "sent by kill": "faulthandler.enable(); survive(0); survive(1); os.kill(os.getpid(), signal.SIGBUS)",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bus_error_that_is_not_ours_goes_to_whom_it_went_before(store, program):
    code = textwrap.dedent(PRELUDE) + PROGRAMS[program]
    words = [sys.executable, "-c", code, str(store)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["survived"] * 2, done.stderr
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == ("faulthandler" in PROGRAMS[program])
    assert done.stderr.count("bus error encountered in worker") == ("torch" in program)


def test_a_forked_child_of_a_process_that_has_mapped_packs_survives_too(store):
    reader, manifest = mapped_reader(store)
    row = manifest.row(1)
    truncate(layout.pack_path(store, row.part), 100)
    child = os.fork()
    if child == 0:
        try:
            reader.read_volume(row)
        except DataError as error:
            os._exit(7 if row.id in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
