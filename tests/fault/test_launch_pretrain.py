"""The real `pretrain`, submitted: a rank is killed, the same command goes on, a rank is asked to stop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_fake_verb import wait_until
from stream_stores import write_store

from mimscale.train.run_dir import RunDir

PROFILE = {
    "executor": "local",
    "processes_per_node": 2,
    "threads_per_process": 1,
    "accelerator": "cpu",
    "environment": {"GLOO_SOCKET_IFNAME": "lo"},
}
RECIPE = {
    "store": "store",
    "run_dir": "run",
    "global_batch": 4,
    "micro_batch": 1,
    "crop_voxels": [32, 32, 32],
    "patch_voxels": [16, 16, 16],
    "model": {"dim": 24, "depth": 1, "heads": 2},
    "mae": {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2},
    "engine": {"zero_stage": 2},
    "stream": {"workers": 1},
    "checkpoint": {"every_steps": 4},
    "validation": {"every_steps": 0},
}


def _submit(folder: Path, steps: int) -> "subprocess.Popen[str]":
    words = ["submit", "pretrain", "recipe.yaml", f"steps={steps}", "--profile", "profile.yaml", "--wait"]
    return subprocess.Popen(
        [sys.executable, "-m", "mimscale.cli", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _steps(run: RunDir) -> list[int]:
    return [line["step"] for line in run.read_metrics()]


@pytest.mark.two_process
def test_a_killed_rank_ends_the_job_the_same_command_continues_it_and_one_signalled_rank_saves_it(
    tmp_path: Path,
) -> None:
    write_store(tmp_path / "store", [(40, 40, 40)] * 4)
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = RunDir(tmp_path / "run")

    job = _submit(tmp_path, steps=100_000)
    wait_until(lambda: max(_steps(run), default=0) >= 5, timeout_s=100)
    killed = run.living_ranks()[1]
    os.kill(killed, signal.SIGKILL)
    _, shown = job.communicate(timeout=30)
    assert job.returncode == 6, shown
    assert f"rank 1 (process {killed}) by SIGKILL" in json.loads(run.outcome.read_text())["message"]
    reached = max(_steps(run))

    job = _submit(tmp_path, steps=100_000)
    wait_until(lambda: max(_steps(run)) > reached + 5, timeout_s=100)
    os.kill(run.living_ranks()[1], signal.SIGUSR2)  # one rank is enough
    _, shown = job.communicate(timeout=30)
    assert job.returncode == 75, shown
    outcome = run.read_outcome()
    assert outcome is not None
    assert outcome.step > reached
    assert _steps(run)[-1] == outcome.step
