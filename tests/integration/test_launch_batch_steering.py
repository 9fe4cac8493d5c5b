"""Jobs of Slurm as a person sees and steers them, with commands that only pretend to be Slurm."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import only_folder
from launch_site import FAILED, FINISHED, Site, site_in

from launch import status
from launch.folder import JobFolder, job_folders
from mimscale import durable
from mimscale.train.health_log import HealthLog
from mimscale.train.run_dir import Outcome, RunDir


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    return site_in(tmp_path, monkeypatch, capsys)


def _set(folder: JobFolder, **heartbeat: float) -> None:
    durable.write_json(folder.run.heartbeat, {"step": 7, "steps": 20, "samples_per_s": 3.5, **heartbeat})
    (folder.run.checkpoints / "step_00000005").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("queue", "state", "reason"),
    [
        (("PENDING", "Resources"), "queued", "waits for Resources"),
        (("PENDING", "DependencyNeverSatisfied"), "queued", "never starts"),
        (("RUNNING", "None"), "running", "9:00 left"),
        (("COMPLETING", "None"), "running", ""),
        (("FAILED", "NonZeroExitCode"), "lost", "job 100 is FAILED for Slurm and left no outcome"),
        (("CANCELLED", "None"), "cancelled", "Slurm cancelled job 100"),
        (None, "lost", "not in the queue and left no outcome; `mimscale resume` goes on"),
    ],
)
def test_status_says_what_the_queue_says(site: Site, queue: tuple[str, str] | None, state: str, reason: str) -> None:
    assert site.submit()[0] == 0
    folder = only_folder(site.run)
    _set(folder, time_s=time.time() - 4)
    if queue:
        site.slurm.hold(folder, *queue)
    status = site.status()
    assert (status["state"], status["job_id"]) == (state, "100")
    assert reason in status["reason"]
    assert (status["step"], status["steps"], status["last_checkpoint"]) == (7, 20, 5)
    assert status["samples_per_s"] == (3.5 if state == "running" else None)
    assert 4 <= status["heartbeat_age_s"] < 30


def test_status_asks_the_accounts_about_what_the_queue_has_forgotten(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.answer("accounts", "100|NODE_FAIL\n")
    assert "job 100 is NODE_FAIL for Slurm" in site.status()["reason"]
    assert "--jobs=100" in site.slurm.calls("sacct")[0]


def test_status_works_while_slurm_does_not(site: Site) -> None:
    assert site.submit()[0] == 0
    _set(only_folder(site.run), time_s=time.time())
    site.slurm.answer("silent")
    status = site.status()
    assert (status["state"], status["step"]) == ("unknown", 7)
    assert "Slurm does not answer" in status["reason"]


def test_how_a_job_ended_needs_no_slurm(site: Site) -> None:
    assert site.submit()[0] == 0
    only_folder(site.run).settle(FAILED)
    site.slurm.answer("silent")
    asked = len(site.slurm.calls("squeue"))
    assert (site.status()["state"], site.status()["reason"]) == ("failed", "rank 1 on node1: Killed")
    assert len(site.slurm.calls("squeue")) == asked


def test_two_hundred_runs_are_shown_in_two_seconds_with_one_question(site: Site) -> None:
    assert site.submit()[0] == 0
    template = site.run.path
    site.slurm.hold(only_folder(site.run), "RUNNING")
    for number in range(199):
        shutil.copytree(template, site.folder / "many" / f"run{number:03d}", ignore=shutil.ignore_patterns("code"))
    asked, start_s = len(site.slurm.calls("squeue")), time.monotonic()
    code, answer, _ = site.verb("status", "many", "run", "--json")
    assert time.monotonic() - start_s < 2
    assert code == 0
    assert len(answer) == 200
    assert len(site.slurm.calls("squeue")) == asked + 1


def test_the_newest_health_event_of_a_running_job_is_shown(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "RUNNING")
    log = HealthLog(site.run.health)
    log.append(3, "skipped", "a loss is nan")
    log.append(50, "slow_rank", "rank 3 on node7 needs 2 s")
    assert "health: slow_rank at step 50" in str(site.status()["reason"])


def test_status_shows_every_job_of_a_run_that_is_not_over(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "RUNNING")
    words = ["submit", "evaluate", "run_dir=run", "store=store", "--after", "run", "--profile", "profile.yaml"]
    code, _, said = site.verb(*words)
    assert code == 0, said
    _, answer, _ = site.verb("status", "run", "--json")
    assert [line["verb"] for line in answer] == ["pretrain", "evaluate"]


def test_a_table_for_people_names_run_job_and_state(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "PENDING", "Priority")
    code, _, said = site.verb("status")
    assert code == 0
    for text in ("run", "pretrain", "100", "queued", "waits for Priority"):
        assert text in said
    code, _, said = site.verb("status", "store")
    assert code == 2
    assert "store: no run directory, and none in it" in said


def test_a_watch_shows_the_state_until_ctrl_c(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "PENDING", "Priority")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=pause, time=time.time, strftime=time.strftime))
    code, _, said = site.verb("status", "run", "--watch")
    assert code == 0
    assert said.count("waits for Priority") == 2
    assert pauses == [status.WATCH_EVERY_S] * 2


def test_cancel_leaves_word_before_the_job_hears_of_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site.submit()[0] == 0
    folder = only_folder(site.run)
    monkeypatch.setenv("WATCHED", str(folder.path))
    site.slurm.hold(folder, "RUNNING")
    code, _, said = site.verb("cancel", "run")
    assert code == 0
    assert "asked to save and stop" in said
    assert site.slurm.calls("scancel") == ["--signal=USR2 --state=RUNNING 100"]
    assert "cancelled.json" in (site.slurm.folder / "scancel.saw").read_text()
    assert site.verb("cancel", "run", "--now")[0] == 0
    assert site.slurm.calls("scancel")[-1] == "100"
    folder.settle(Outcome(outcome="interrupted", exit_code=75, step=7, message="cancelled"))
    assert site.status()["state"] == "cancelled"
    assert "no job to cancel" in site.verb("cancel", "run")[2]


def test_a_cancel_that_nobody_hears_says_so_and_still_keeps_the_job_from_starting_again(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.answer("silent")
    code, _, said = site.verb("cancel", "run")
    assert code == 5
    assert "job 100 has not heard of it (squeue failed: 1): it runs on, but will not start again once it ends" in said
    assert only_folder(site.run).cancelled.exists()


def test_a_waiting_job_is_cancelled_at_once(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "PENDING")
    assert site.verb("cancel", "run")[0] == 0
    assert site.slurm.calls("scancel") == ["--state=PENDING 100"]


@pytest.mark.parametrize(
    ("complaint", "code"),
    [("Kill job error on job id 100_3: Job/step already completing or completed", 0), ("Access/permission denied", 5)],
)
def test_an_array_is_cancelled_with_two_calls_and_a_task_that_has_ended_keeps_the_others_from_nothing(
    site: Site, complaint: str, code: int
) -> None:
    (site.folder / "a.nii").write_bytes(b"")
    words = ["ingest", "demo/ingest", "sources=*.nii", "out=store2", "--array", "5", "--profile", "profile.yaml"]
    assert site.verb("submit", *words)[0] == 0
    array, merge = job_folders(RunDir(site.folder / "store2.job").logs)
    for task, state in enumerate(("COMPLETING", "RUNNING", "PENDING", "RUNNING", "PENDING")):
        site.slurm.hold(array, state, job_id=f"100_{task}")
    scancel = site.slurm.folder / "bin" / "scancel"
    scancel.write_text(f"{scancel.read_text()}echo 'scancel: error: {complaint}' >&2; exit 1\n")
    got, _, said = site.verb("cancel", "store2")
    assert got == code, said
    assert site.slurm.calls("scancel") == ["--state=PENDING 100", "--signal=USR2 --state=RUNNING 100"]
    assert ("job 100: asked to save and stop" in said) == (code == 0)
    assert (complaint in said) == (code != 0)
    assert array.cancelled.exists()
    assert merge.cancelled.exists()


def test_a_job_that_is_ending_is_left_to_end(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "COMPLETING")
    code, _, said = site.verb("cancel", "run")
    assert code == 0
    assert "job 100: is ending already" in said
    assert site.slurm.calls("scancel") == []
    assert only_folder(site.run).cancelled.exists()


def test_resume_submits_the_same_again_on_another_number_of_nodes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site.submit("seed=5", "--nodes", "2")[0] == 0
    only_folder(site.run).settle(FAILED)
    (site.folder / "profile.yaml").unlink()  # the job's own copy is used
    (site.folder / "recipe.yaml").unlink()
    monkeypatch.chdir(site.folder.parent)
    code, answer, said = site.verb("resume", str(site.run.path), "steps=30", "--nodes", "1", "--json")
    assert code == 0, said
    assert answer["job_id"] == "101"
    newest = job_folders(site.run.logs)[-1]
    assert (newest.read().nodes, newest.read().folder) == (1, str(site.folder))
    assert "seed: 5" in newest.config.read_text()
    assert "steps: 30" in newest.config.read_text()
    assert "#SBATCH --partition=main" in site.slurm.script("101")


def test_logs_shows_a_rank_of_the_newest_job_that_has_started(site: Site) -> None:
    assert site.submit("--nodes", "2")[0] == 0
    folder = only_folder(site.run)
    code, _, said = site.verb("logs", "run")
    assert code == 5
    assert "job 100 has not started" in said
    folder.rank_log("100", 3).write_text("rank 3 at work\n")
    folder.rank_log("100", 0).write_text("rank 0 at work\n")
    assert site.verb("logs", "run")[1] == "rank 0 at work\n"
    assert site.verb("logs", "run", "--rank", "3")[1] == "rank 3 at work\n"
    assert "has ranks 0 to 3" in site.verb("logs", "run", "--rank", "4")[2]
    folder.settle(FINISHED)
    assert site.verb("logs", "run", "-f")[1] == "rank 0 at work\n"


def test_the_logs_of_a_local_job_and_its_state_are_shown_too(site: Site) -> None:
    site.place.write_profile("finish")
    done = site.place.submit("--wait", PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    assert site.status()["state"] == "finished"
    assert "rank 0 at work" in site.verb("logs", "run")[1]
    assert site.slurm.calls("squeue") == []
