"""Weights & Biases hears the numbers of a run, under one id for all its jobs, and no place or host."""

import importlib.util
import socket
import time

import pytest
import yaml

from mimscale.errors import LaunchError
from mimscale.train.config import MeterConfig, WandbConfig
from mimscale.train.meter import Meter
from mimscale.train.run_dir import RunDir
from mimscale.train.trackers import without_places
from mimscale.world import World

PLANTED = "hospital_of_miller"


@pytest.fixture
def run(tmp_path, monkeypatch):
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(
        yaml.safe_dump({"store": f"/{PLANTED}/store", "stream": {"stage_dir": f"/{PLANTED}"}, "seed": 3})
    )
    return run


def one_job(run, first_step, steps):
    config = MeterConfig(tensorboard=False, wandb=WandbConfig(project="brains", mode="offline"))
    with Meter(run, config, World(), steps=steps, global_batch=2) as meter:
        meter.start(first_step)
        for step in range(first_step + 1, steps + 1):
            meter.log_step(step, {"loss": 1.0 / step, "lr": 0.1, "grad_norm": 1.0, "step_s": 1.0, "data_wait_s": 0.1})


def test_a_requeued_job_continues_the_run_in_weights_and_biases(run):
    one_job(run, 0, 3)
    run_id = (run.wandb / "id.txt").read_text()
    first = {folder.name for folder in run.wandb.glob("offline-run-*")}
    one_job(run, 3, 5)
    folders = {folder.name for folder in run.wandb.glob("offline-run-*")}
    assert len(first) == 1
    assert len(folders - first) <= 1  # two jobs within one second share the folder's name
    for name in folders:
        assert (run.wandb / name / f"run-{run_id}.wandb").stat().st_size > 0
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5]


def test_weights_and_biases_hears_numbers_and_no_place_or_host(run):
    one_job(run, 0, 2)
    (file,) = run.wandb.glob("offline-run-*/run-*.wandb")
    deadline_s = time.monotonic() + 60
    while b"grad_norm" not in (content := file.read_bytes()):  # W&B's own process writes it
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert b"seed" in content
    everything = b"".join(path.read_bytes() for path in run.wandb.rglob("*") if path.is_file())
    assert PLANTED.encode() not in everything
    assert socket.gethostname().encode() not in content


def test_places_are_left_out_of_a_config_at_any_depth():
    assert without_places({"store": "/a", "stream": {"stage_dir": "/b", "workers": 2}}) == {"stream": {"workers": 2}}
    targets = {"table": "/clinic/ada.csv", "journal": "/j", "table_hash": "sha256-0", "pool": "mean"}
    assert without_places({"targets": targets}) == {"targets": {"pool": "mean"}}


def test_without_the_package_a_run_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"pip install 'mimscale\[wandb\]'"):
        one_job(run, 0, 1)


def test_an_id_that_somebody_edited_is_refused(run):
    run.wandb.mkdir()
    (run.wandb / "id.txt").write_text("../other")
    with pytest.raises(LaunchError, match=r"id\.txt: holds '\.\./other'"):
        one_job(run, 0, 1)
