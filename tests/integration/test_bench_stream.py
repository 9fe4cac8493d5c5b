"""`mimscale bench stream` on a small store: every number is there, and those that can be counted are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_samples import make_store

from mimscale.bench.crops import MODES, chunks_of, draw, randomness
from mimscale.cli import main


def bench(store, capfd, *words):
    code = main(["bench", "stream", "demo/pretrain", f"store={store}", *words])
    return code, capfd.readouterr()


def test_the_verb_measures_its_contenders_and_the_loader_on_a_small_store(tmp_path, capfd):
    store = make_store(tmp_path, count=3, val_fraction=0.0)
    settings = ["crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]", "global_batch=2", "micro_batch=2"]
    code, printed = bench(store, capfd, *settings, "modality=null", "--seconds=0.02", "--repeats=2", "--json")
    assert code == 0, printed.err
    result = json.loads(printed.out)
    assert result["schema_version"] == 1
    assert result["benchmark"] == "stream"
    assert {"cpu", "commit", "versions", "load_average"} <= result["surroundings"].keys()
    rows = {(row["name"], row["mode"]): row for row in result["contenders"]}
    assert {("mimscale", mode) for mode in MODES} <= rows.keys()
    assert ("zarr-python", "random") in rows
    assert all(row["crops_per_s"] > 0 for row in rows.values())
    # A crop of one chunk's size on the chunk grid is one chunk; anywhere it is more.
    assert rows["mimscale", "grid"]["amplification"] <= 1
    assert rows["mimscale", "random"]["amplification"] > 1
    assert rows["mimscale", "random"]["times"] is None
    assert rows["zarr-python", "random"]["times"] > 0
    assert rows["mimscale", "random"]["of_ceiling"] > 0
    assert result["modes"]["random"]["overlap"] == 0
    assert result["modes"]["masks_4"]["distinct"] == 0.25
    assert [row["workers"] for row in result["loader"]] == list(range(len(result["loader"])))
    assert all(row["crops_per_s"] > 0 for row in result["loader"])


def test_a_store_without_a_volume_that_has_room_for_a_crop_is_named(tmp_path, capfd):
    store = make_store(tmp_path, count=2, val_fraction=0.0)
    code, printed = bench(store, capfd, "crop_voxels=[64,64,64]", "modality=null")
    assert code == 3
    assert "no training volume has room for crop_voxels=[64, 64, 64]" in printed.err


def test_slow_files_pass_for_a_parallel_file_system(tmp_path):
    """They did not: extensions of CPython call fstatfs64, so the slow condition measured mapped files."""
    library, source = tmp_path / "slow_files.so", Path(__file__).parents[2] / "benchmarks" / "slow_files.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    file = tmp_path / "slow" / "file"
    file.parent.mkdir()
    file.write_bytes(b"x")
    ask = (
        "import sys; from mimscale.store.windows import is_local\n"
        "file = open(sys.argv[1]); print(is_local(file.fileno()))"
    )
    slow = {"SLOW_FOLDER": str(file.parent), "SLOW_LATENCY_US": "1", "SLOW_IOPS": "100000"}
    for variables, expected in (({}, "True"), ({"LD_PRELOAD": str(library), **slow}, "False")):
        told = subprocess.run(
            [sys.executable, "-c", ask, file],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert told.stdout.strip() == expected, variables


@pytest.mark.parametrize("mode", MODES)
def test_every_crop_that_is_drawn_lies_in_its_volume(mode):
    shapes = [(40, 50, 60), (16, 16, 33)]
    for number in range(200):
        volume, origins = draw(MODES[mode], shapes, (16, 16, 16), 16, seed=0, number=number)
        assert (volume, origins) == draw(MODES[mode], shapes, (16, 16, 16), 16, seed=0, number=number)
        for origin in origins:
            assert all(0 <= start <= edge - 16 for start, edge in zip(origin, shapes[volume], strict=True))


def test_crops_of_a_region_touch_no_more_chunks_than_the_region_has():
    for number in range(50):
        _, origins = draw(MODES["region_4"], [(320, 320, 320)], (96, 96, 96), 32, seed=0, number=number)
        assert len(origins) == 4
        assert len(chunks_of(origins, (96, 96, 96), 32)) <= 64


def test_a_crop_of_a_region_lies_anywhere_with_the_same_probability():
    shapes, crop, counts = [(16, 16, 61)], (16, 16, 16), np.zeros(46)
    for number in range(4000):
        for origin in draw(MODES["region_4"], shapes, crop, 16, seed=0, number=number)[1]:
            counts[origin[2]] += 1
    # Four crops a call are not independent of each other: their block of 16 is drawn once.
    assert counts.min() / counts.mean() > 0.6
    assert counts.max() / counts.mean() < 1.5


def test_four_crops_of_a_region_share_most_of_their_voxels():
    cost = randomness(MODES["region_4"], [(320, 320, 320)], (96, 96, 96), 32)
    assert 0.65 < cost["overlap"] < 0.78  # (1 - E|a - b| / 96)^3 with a, b of [0, 32)
    assert 0.3 < cost["distinct"] < 0.5


def test_a_plan_reads_the_store_and_says_how_many_cores_a_gpu_needs(tmp_path, capfd):
    store = make_store(tmp_path, count=3, val_fraction=0.0)
    words = ["plan", "demo/pretrain", f"store={store}", "--gpu", "h100", "--gpus-per-node", "1", "modality=null"]
    words += ["crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]"]
    assert main([*words, "--json"]) == 0
    loader = json.loads(capfd.readouterr().out)["loader"]
    assert loader["source"].startswith("measured now: ")
    assert loader["crops_per_s_per_core"] > 0
    assert loader["gb_per_s_per_core"] == pytest.approx(loader["crops_per_s_per_core"] * 16**3 * 2 / 1e9)
    assert loader["cores_per_gpu"] >= loader["crops_per_s_per_gpu"] / loader["crops_per_s_per_core"]
    assert main(words) == 0
    assert "core(s) a GPU" in capfd.readouterr().out
