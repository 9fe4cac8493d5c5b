"""Every verb says that the disk is full and leaves nothing half-written; training has its own in test_train_faults."""

import json
import re
import shutil
import subprocess

import pytest
from disks import fill, small_disk
from small_segmentation import make_finetune_run, make_store
from store_samples import write_pairs

from mimscale.cli import main


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return make_finetune_run(tmp_path_factory.mktemp("runs") / "run", store)


@pytest.fixture
def disk(tmp_path, run):
    with small_disk(tmp_path / "disk", size_kb=8000) as folder:
        shutil.copytree(run, folder / "run")
        fill(folder, left_kb=4)
        yield folder


@pytest.mark.parametrize(
    ("words", "code", "result"),
    [
        ("inspect {store} aaaa --png {disk}/picture.png", 3, "picture.png"),
        ("export {store} aaaa {disk}/out.nii.gz", 3, "out.nii.gz"),
        ("export {store} part-00000 {disk}/out", 3, "out"),
        ("export {run} {disk}/out", 4, "out/weights.safetensors"),
        ("report {run} out={disk}/out", 3, "out/index.html"),
        ("evaluate run_dir={disk}/run threads=1 batch=4", 3, "run/evaluate/scores.json"),
        ("evaluate run_dir={disk}/run threads=1 batch=4 save_predictions=false", 3, "run/evaluate/scores.json"),
        ("cohort out={disk}/out subjects=1 spacing_mm=4", 3, "out/dataset.json"),
    ],
)
def test_a_full_disk_is_named_and_nothing_is_half_written(words, code, result, store, run, disk, capsys):
    assert main(words.format(store=store, run=run, disk=disk).split()) == code
    assert "the disk is full (" in capsys.readouterr().err
    assert not (disk / result).exists()
    assert not list(disk.rglob(".tmp-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_written_pack(tmp_path, capsys, workers):
    sources = write_pairs(tmp_path / "s", 4, (64, 64, 64))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"sources": sources, "class_names": ["a", "b", "c"], "workers": workers}))
    with small_disk(tmp_path / "disk", size_kb=400) as disk:
        assert main(["ingest", str(recipe), f"out={disk}/store", "parts=2"]) == 3
        printed = capsys.readouterr().err
        assert re.search(
            r"store/(packs|overlays/label)/part-0000\d\.zarr\.zip: the disk is full \(\d+ bytes free\)", printed
        )
        assert "free some space and run the same command again" in printed
        left = [path for path in (disk / "store").rglob("*") if path.is_file()]
        for path in left:
            assert path.name == "store.json" or path.suffix == ".jsonl" or path.name.endswith(".zarr.zip"), path
            if path.name.endswith(".zarr.zip"):
                assert subprocess.run(["python3", "-m", "zipfile", "-t", path], capture_output=True).returncode == 0
        assert not (disk / "store" / "manifest.parquet").exists()
