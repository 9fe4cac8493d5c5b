"""The real `pretrain`, submitted: a rank is killed or the job is asked to stop, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from launch_fake_verb import wait_until
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words

from launch.folder import JobFolder, job_folders
from launch.jobs import STACKS_SIGNAL
from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process

CHECKOUT = Path(__file__).parents[2]
STEPS = 100
PROFILE = {
    "executor": "local",
    "processes_per_node": 2,
    "threads_per_process": 1,
    "accelerator": "cpu",
    "timeout_min": 5,  # ends a job that outlives even pytest
    "signal_lead_s": 10,
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
Submit = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """`mimscale submit WORDS --wait`, whose jobs end with the test, however it ends."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, folder: Path) -> "subprocess.Popen[str]":
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "mimscale.cli", "submit", *words, "--profile", str(profile), "--wait"],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for logs in tmp_path.glob("*/logs"):
        for job in job_folders(logs):
            _end(job)


def _end(job: JobFolder) -> None:
    """End a job that is still alive, and show the end of its logs."""
    if not job.living():
        return
    supervisor = job.read().supervisor
    if supervisor is not None and supervisor.is_alive():
        os.kill(supervisor.pid, signal.SIGINT)  # it lets the ranks print their stacks and kills them
    with suppress(TimeoutError):
        wait_until(lambda: not job.living())
    left = job.living()
    for number in (STACKS_SIGNAL, signal.SIGKILL):  # no supervisor, or one that is stuck
        for process in left:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        if left:
            with suppress(TimeoutError):
                wait_until(lambda: not job.living(), timeout_s=2)
    for log in [*sorted(job.path.glob("*.out")), job.supervisor_log]:
        print(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)


def _steps(run: RunDir) -> list[int]:
    return [line["step"] for line in run.read_metrics() if "loss" in line]


def _losses(run: RunDir) -> dict[int, float]:
    lines = [(line["step"], line["loss"]) for line in run.read_metrics() if "loss" in line]
    assert [step for step, _ in lines] == list(range(1, STEPS + 1))
    return dict(lines)


def _sample_ids(run: RunDir) -> list[list[tuple[int, list[int]]]]:
    """Of each rank, the samples of each step."""
    ranks = []
    for path in sorted(run.samples.iterdir()):
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        ranks.append([(line["step"], line["sample_ids"]) for line in lines])
    return ranks


def test_a_killed_rank_ends_the_job_the_same_command_continues_it_and_one_signalled_rank_saves_it(
    tmp_path: Path, submit: Submit
) -> None:
    write_store(tmp_path / "store", [(40, 40, 40)] * 4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = RunDir(tmp_path / "run")
    command = ("pretrain", "recipe.yaml", "steps=100_000")

    job = submit(*command, folder=tmp_path)
    wait_until(lambda: max(_steps(run), default=0) >= 5, timeout_s=100)
    killed = run.living_ranks()[1]
    os.kill(killed, signal.SIGKILL)
    _, shown = job.communicate(timeout=30)
    assert job.returncode == 6, shown
    assert f"rank 1 (process {killed}) by SIGKILL" in json.loads(run.outcome.read_text())["message"]
    reached = max(_steps(run))

    job = submit(*command, folder=tmp_path)
    wait_until(lambda: max(_steps(run), default=0) > reached + 5, timeout_s=100)
    os.kill(run.living_ranks()[1], signal.SIGUSR2)  # one rank is enough
    _, shown = job.communicate(timeout=30)
    assert job.returncode == 75, shown
    outcome = run.read_outcome()
    assert outcome is not None
    assert outcome.step > reached
    assert _steps(run)[-1] == outcome.step


def test_a_job_stopped_by_usr2_to_submit_and_submitted_again_has_the_losses_and_samples_of_a_straight_one(
    tmp_path: Path, submit: Submit
) -> None:
    write_store(tmp_path / "store", SHAPES)
    straight, stopped = RunDir(tmp_path / "straight"), RunDir(tmp_path / "stopped")
    commands = {run: pretrain_words(tmp_path / "store", run.path, f"steps={STEPS}") for run in (straight, stopped)}

    job = submit(*commands[straight], folder=CHECKOUT)
    _, shown = job.communicate(timeout=100)
    assert job.returncode == 0, shown

    job = submit(*commands[stopped], folder=CHECKOUT)
    wait_until(lambda: max(_steps(stopped), default=0) >= 5, timeout_s=100)
    job.send_signal(signal.SIGUSR2)
    _, shown = job.communicate(timeout=30)
    assert job.returncode == 75, shown
    outcome = stopped.read_outcome()
    assert outcome is not None
    assert (outcome.outcome, _steps(stopped)[-1]) == ("interrupted", outcome.step)
    assert 5 <= outcome.step < STEPS

    job = submit(*commands[stopped], folder=CHECKOUT)
    _, shown = job.communicate(timeout=100)
    assert job.returncode == 0, shown
    assert f"continues at step {outcome.step} of {STEPS}" in shown

    assert _losses(stopped) == _losses(straight)
    assert _sample_ids(stopped) == _sample_ids(straight)
    assert [len(rank) for rank in _sample_ids(straight)] == [STEPS, STEPS]
    for run in (straight, stopped):  # submitted from the checkout, and yet
        assert Path(json.loads(run.environment.read_text())["code"]).parent == run.code
