"""Verbs that only write pictures, scores and copies say that the disk is full, and leave nothing half-written."""

import shutil

import pytest
from disks import fill, small_disk
from small_segmentation import make_finetune_run, make_store

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
