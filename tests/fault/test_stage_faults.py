"""A stage may be full, damaged or torn down at any moment: the store itself is read, and nothing half-made stays."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from disks import small_disk
from processes import is_alive
from stream_stores import open_loader, write_store

from mimscale.store import files, layout
from mimscale.store.manifest import load_manifest
from mimscale.store.stage import STAGE_COLUMNS, Stage, packs_of
from mimscale.stream.loader import StreamLoader
from mimscale.stream.staging import Copier

SHAPES = [(40, 36, 44)] * 6


@pytest.fixture
def store(tmp_path) -> Path:
    write_store(tmp_path / "store", SHAPES)
    return tmp_path / "store"


def a_stage(store: Path, folder: Path) -> Stage:
    return Stage(folder, 2**30, packs_of(store, load_manifest(store, STAGE_COLUMNS)))


def all_packs(store: Path):
    return lambda batch: [layout.pack_path(store, part) for part in range(len(SHAPES))]


def same_batches(store: Path, loader: StreamLoader, count: int = 8) -> None:
    with loader, open_loader(store, crops_per_volume=4) as plain:
        for _ in range(count):
            ours, theirs = next(loader), next(plain)
            assert ours.volume_ids == theirs.volume_ids
            assert np.array_equal(ours.volume, theirs.volume)
            assert not ours.bad


def test_a_full_stage_disk_costs_copies_and_no_sample(store, tmp_path, capfd):
    size_kb = layout.pack_path(store, 0).stat().st_size // 1024
    with small_disk(tmp_path / "disk", size_kb=int(2.5 * size_kb) + 24) as disk:
        stage = a_stage(store, disk / "stage")
        copier = Copier(stage, all_packs(store), horizon=1, start_batch=0)
        copier.start()
        deadline_s = time.monotonic() + 20
        while "no room" not in (said := capfd.readouterr().err) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert "no room for more copies yet; the rest is read from the store" in said
        same_batches(store, open_loader(store, crops_per_volume=4, stage=stage, copier=copier))
        left = list((disk / "stage").glob("[0-9a-f]*.zarr.zip"))
        assert left
        for copy in left:
            assert copy.read_bytes() in [path.read_bytes() for path in (store / "packs").iterdir()]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_copy_that_went_bad_is_thrown_away_and_no_sample_is_lost(damage, store, tmp_path):
    stage = a_stage(store, tmp_path / "stage")
    for path in stage.packs:
        stage.add(path)
    for copy in (tmp_path / "stage").iterdir():
        data = bytearray(copy.read_bytes())
        middle = slice(len(data) // 8, len(data) // 2)
        data[middle] = bytes(255 - byte for byte in data[middle])
        copy.write_bytes(data if damage == "flip" else data[: len(data) // 8])
    same_batches(store, open_loader(store, crops_per_volume=4, stage=stage))
    assert not any(stage.copy_of(path) for path in stage.packs)


def test_a_killed_copier_is_reported_and_the_run_goes_on(store, tmp_path, capsys):
    stage = a_stage(store, tmp_path / "stage")
    copier = Copier(stage, all_packs(store), horizon=1, start_batch=0)
    copier.start()
    os.kill(copier._process.pid, signal.SIGKILL)
    copier._process.join()
    same_batches(store, open_loader(store, crops_per_volume=4, stage=stage, copier=copier))
    said = capsys.readouterr().err
    assert said.count("the process that copies packs ended with code -9; what is not there yet is read from") == 1


def slow(path: Path):
    class Slow(files.LocalFile):
        def read_into(self, position: int, data: memoryview) -> int:
            time.sleep(0.3)
            return super().read_into(position, data)

    return Slow(path)


def test_a_copier_killed_half_way_leaves_nothing_under_a_final_name_and_the_next_one_cleans_up(
    store, tmp_path, monkeypatch
):
    folder = tmp_path / "stage"
    stage = a_stage(store, folder)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_file", slow)
        copier = Copier(stage, all_packs(store), horizon=1, start_batch=0)
        copier.start()
        deadline_s = time.monotonic() + 20
        while not list(folder.glob(".tmp-*.zarr.zip.*")) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        copier.close()
    assert list(folder.glob(".tmp-*.zarr.zip.*")), "it was killed too late to show anything"
    assert not list(folder.glob("[0-9a-f]*.zarr.zip"))
    for path in stage.packs:
        assert stage.add(path).name == "COPIED"  # the lock of the dead one is taken over
    assert not list(folder.glob(".tmp-*"))


SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    from mimscale.store import layout
    from mimscale.store.manifest import load_manifest
    from mimscale.store.stage import STAGE_COLUMNS, Stage, packs_of
    from mimscale.stream.staging import Copier

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    store, folder = Path(sys.argv[1]), Path(sys.argv[2])
    stage = Stage(folder, 2**30, packs_of(store, load_manifest(store, STAGE_COLUMNS)))
    copier = Copier(stage, lambda batch: [layout.pack_path(store, 0)], 1, 0)
    copier.start()
    while not any(folder.glob("*.zarr.zip")):
        time.sleep(0.01)
    print(copier._process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_copier_dies_with_its_trainer(store, tmp_path, number):
    words = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(store), str(tmp_path / "stage")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as trainer:
        pid = int(trainer.stdout.readline())
        assert is_alive(pid)
        trainer.send_signal(number)
        try:
            trainer.wait(timeout=20)
        finally:
            trainer.kill()
    deadline_s = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_runs_that_share_a_folder_copy_each_pack_once(store, tmp_path):
    stages = [a_stage(store, tmp_path / "stage") for _ in range(3)]
    copiers = [Copier(stage, all_packs(store), horizon=1, start_batch=0) for stage in stages]
    try:
        for copier in copiers:
            copier.start()
        deadline_s = time.monotonic() + 30
        while not all(stages[0].copy_of(path) for path in stages[0].packs) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(0.5)
        size = sum(path.stat().st_size for path in stages[0].packs)
        assert sum(copier.copied_bytes for copier in copiers) == size
        for path in stages[0].packs:
            assert stages[0].copy_of(path).read_bytes() == path.read_bytes()
    finally:
        for copier in copiers:
            copier.close()
