"""Jobs on this machine, with ranks that do no work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_fake_verb import Place, wait_until
from processes import is_alive

from launch.folder import job_folders
from mimscale.train.committed import MANIFEST, MANIFEST_VERSION, tag_name
from mimscale.train.run_dir import Outcome


def test_a_waited_for_job_shows_rank_0_and_returns_the_exit_code_of_its_outcome(tmp_path: Path) -> None:
    place = Place(tmp_path)
    done = place.submit("--wait", "--json")
    assert done.returncode == 0, done.stderr
    assert "rank 0 at work" in done.stderr
    assert "rank 1 at work" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer.keys() == {"job_id", "run_dir", "log"}
    assert "rank 0 at work" in Path(answer["log"]).read_text()
    assert place.run.read_outcome() == Outcome(outcome="finished", exit_code=0, step=20)


def test_each_rank_gets_its_place_and_the_threads_and_accelerator_of_the_profile(tmp_path: Path) -> None:
    place = Place(tmp_path)
    shell = {"RANK": "7", "SLURM_PROCID": "3", "OMP_NUM_THREADS": "64", "CUDA_VISIBLE_DEVICES": "5"}
    assert place.submit("--wait", **shell).returncode == 0
    ranks = [json.loads((place.run.path / f"environment{rank}.json").read_text()) for rank in range(2)]
    for rank, environment in enumerate(ranks):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["OMP_NUM_THREADS"] == "3"
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert environment["CUDA_VISIBLE_DEVICES"] == "5"
        assert "SLURM_PROCID" not in environment
        assert environment["MIMSCALE_JOB_ID"]
        assert environment["PYTHONSAFEPATH"] == "1"
        assert Path(environment["PYTHONPATH"].split(os.pathsep)[0]).parent == place.run.code
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]


def test_a_job_runs_the_config_that_was_checked_even_if_the_recipe_is_edited_later(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.submit("--wait", "seed=5").returncode == 0
    (folder,) = job_folders(place.run.logs)
    assert (place.run.path / "config0.txt").read_text() == str(folder.config)
    assert "seed: 5" in folder.config.read_text()


def test_each_submission_has_its_own_folder_line_and_port(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for _ in range(2):
        assert place.submit("--wait").returncode == 0
    folders = job_folders(place.run.logs)
    assert [folder.path.name for folder in folders] == ["001", "002"]
    assert len({folder.read().master_port for folder in folders}) == 2
    lines = [json.loads(line) for line in place.run.jobs.read_text().splitlines()]
    assert [line["folder"] for line in lines] == ["logs/001", "logs/002"]
    assert [line["job_id"] for line in lines] == [folder.read().job_id for folder in folders]


def test_submit_returns_at_once_and_its_job_survives_the_shell_and_stops_when_told(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped")
    start = time.monotonic()
    # A shell of its own session that is gone when the job is stopped; `| cat` would wait for a job that held its pipe.
    shell = subprocess.run(
        ["bash", "-c", 'exec 2>&1; "$@" --json | cat', "bash", *place.command()],
        cwd=tmp_path,
        env=place.environment(),
        capture_output=True,
        text=True,
        timeout=30,
        start_new_session=True,
        check=False,
    )
    assert time.monotonic() - start < 15
    ranks = place.wait_for_ranks()
    assert all(os.getsid(pid) == pid for pid in ranks.values())
    assert "save and stop    kill -USR2" in shell.stdout
    (folder,) = job_folders(place.run.logs)
    supervisor = folder.read().supervisor
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGUSR2)
    outcome = wait_until(folder.read_outcome)
    assert outcome == Outcome(outcome="interrupted", exit_code=75, step=7, stopped_by="SIGUSR2")
    assert not any(is_alive(pid) for pid in ranks.values())
    assert "stopped by SIGUSR2" in (folder.path / f"{supervisor.pid}_1_log.out").read_text()


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(signal.SIGINT, "SIGUSR2"), (signal.SIGTERM, "SIGTERM")],
    ids=["ctrl-c", "term"],
)
def test_a_signal_to_a_waiting_submit_reaches_every_rank_and_gives_75(
    tmp_path: Path, sent: signal.Signals, arrives: str
) -> None:
    place = Place(tmp_path, "until-stopped")
    submit = place.start("--wait")
    place.wait_for_ranks()
    submit.send_signal(sent)
    _, shown = submit.communicate(timeout=20)
    assert submit.returncode == 75, shown
    (folder,) = job_folders(place.run.logs)
    for rank in range(2):
        assert f"stopped by {arrives}" in folder.rank_log(str(folder.read().job_id), rank).read_text()


def test_a_second_submission_is_refused_while_the_first_is_alive_and_accepted_afterwards(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped")
    first = place.start("--wait")
    place.wait_for_ranks()
    second = place.submit("--wait")
    (folder,) = job_folders(place.run.logs)
    job_id = folder.read().job_id
    assert second.returncode == 5
    assert f"job {job_id} (pretrain, {folder.path}) is alive" in second.stderr
    assert f"`kill -USR2 {job_id}`" in second.stderr
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=20)
    place.write_profile("finish")
    assert place.submit("--wait").returncode == 0


def test_a_dry_run_prints_config_and_topology_and_writes_and_imports_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    script = (
        "import json, sys; from mimscale.cli import main; code = main(sys.argv[1:]); "
        "loud = [m for m in ('torch', 'monai', 'deepspeed', 'nibabel', 'matplotlib') if m in sys.modules]; "
        "sys.exit(f'imported {loud}' if loud else code)"
    )
    command = [sys.executable, "-c", script, *place.command("--dry-run", "steps=99")[3:]]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env=place.environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    # Two seconds on an idle machine; CI runners are busy ones.
    assert time.monotonic() - start < 6
    assert "# 2 processes x micro_batch 2 x accumulation 2 = global batch 8" in done.stdout
    assert "steps: 99" in done.stdout
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_run_continues_with_another_number_of_processes(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.submit("--wait").returncode == 0
    assert place.submit("--wait", "--processes", "1").returncode == 0
    assert json.loads((place.run.path / "environment0.json").read_text())["WORLD_SIZE"] == "1"


def saved(place: Place, *, step: int, version: int = MANIFEST_VERSION) -> None:
    """What submission looks at of a checkpoint."""
    tag = place.run.checkpoints / tag_name(step)
    tag.mkdir(parents=True)
    (tag / MANIFEST).write_text(json.dumps({"manifest_version": version, "step": step}))


def test_what_the_run_directory_does_not_allow_is_refused_before_anything_starts(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.submit("--wait").returncode == 0
    saved(place, step=100)
    refused = place.submit("--wait", "seed=9")
    assert refused.returncode == 2
    assert "seed: 0 -> 9" in refused.stderr
    assert len(job_folders(place.run.logs)) == 1
    assert place.submit("--wait", "--fresh", "seed=9").returncode == 0
    assert len(list(tmp_path.glob("run*"))) == 2


def test_a_state_of_an_earlier_version_is_refused_before_anything_starts(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.submit("--wait").returncode == 0
    saved(place, step=100)
    saved(place, step=200, version=1)
    refused = place.submit("--wait")
    assert refused.returncode == 4
    assert "step_00000200: manifest version 1 holds the training state in DeepSpeed's files" in refused.stderr
    assert len(job_folders(place.run.logs)) == 1
    (place.run.checkpoints / tag_name(200) / MANIFEST).write_text("{")  # the job itself goes back to the one before
    assert place.submit("--wait").returncode == 0


def test_a_folder_that_is_no_store_is_refused_before_anything_starts(tmp_path: Path) -> None:
    place = Place(tmp_path)
    refused = place.submit("store=elsewhere")
    assert refused.returncode == 3
    assert "elsewhere" in refused.stderr
    assert not place.run.path.exists()


def test_the_debug_executor_runs_the_verb_inside_the_submitting_process(tmp_path: Path) -> None:
    place = Place(tmp_path, executor="debug", processes_per_node=1)
    done = place.submit()
    assert done.returncode == 0, done.stderr
    assert json.loads((place.run.path / "environment0.json").read_text())["WORLD_SIZE"] == "1"
    assert "rank 0 at work" in done.stderr


def test_submissions_made_at_once_share_no_port_and_no_folder(tmp_path: Path) -> None:
    place = Place(tmp_path, processes_per_node=1)
    jobs = [place.start(f"run_dir=runs/{index}") for index in range(6)]
    for job in jobs:
        _, shown = job.communicate(timeout=120)
        assert job.returncode == 0, shown
    folders = [folder for run in (tmp_path / "runs").iterdir() for folder in job_folders(run / "logs")]
    assert len(folders) == len({folder.read().master_port for folder in folders}) == 6
    assert len({folder.read().job_id for folder in folders}) == 6
    for folder in folders:
        assert wait_until(folder.read_outcome, 60).exit_code == 0


def test_of_submissions_to_one_run_at_once_one_goes_on_and_the_others_are_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped", processes_per_node=1)
    jobs = [place.start() for _ in range(3)]
    codes = []
    for job in jobs:
        job.communicate(timeout=60)
        codes.append(job.returncode)
    assert sorted(codes) == [0, 5, 5]
    (folder,) = job_folders(place.run.logs)
    place.wait_for_ranks(1)
    os.kill(int(folder.read().job_id or 0), signal.SIGTERM)
    assert wait_until(folder.read_outcome).exit_code == 75
