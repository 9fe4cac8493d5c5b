"""Ranks that die, hang or fail, and supervisors that are killed: the job ends in bounded time and says how."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_fake_verb import Place, wait_until
from processes import is_alive

from launch.folder import JobFolder, job_folders


def _only_folder(place: Place) -> JobFolder:
    (folder,) = job_folders(place.run.logs)
    return folder


def test_when_a_rank_is_killed_its_stuck_peers_and_its_children_end_and_the_job_gives_6(tmp_path: Path) -> None:
    place = Place(tmp_path, "killed:1")
    start = time.monotonic()
    done = place.submit("--wait")
    assert time.monotonic() - start < 20
    assert done.returncode == 6, done.stderr
    outcome = place.run.read_outcome()
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_code) == ("failed", 6)
    assert "rank 1 (process" in outcome.message
    assert "SIGKILL" in outcome.message
    folder = _only_folder(place)
    assert not any(process.is_alive() for process in folder.read_ranks())
    assert not is_alive(int(place.child_file.read_text()))
    # The rank that hung shows where.
    assert "in _hang" in folder.rank_log(str(folder.read().job_id), 0).read_text()


def test_a_rank_killed_from_outside_is_named_with_its_signal(tmp_path: Path) -> None:
    place = Place(tmp_path, "hang:none")
    submit = place.start("--wait")
    ranks = place.wait_for_ranks()
    os.kill(ranks[0], signal.SIGKILL)
    _, shown = submit.communicate(timeout=20)
    assert submit.returncode == 6
    assert f"rank 0 (process {ranks[0]}) by SIGKILL" in shown


@pytest.mark.parametrize(("fake", "code", "text"), [("data-error:1", 3, "ct_7: broken"), ("bug:1", 1, "a bug of ours")])
def test_the_exit_code_and_log_of_a_failing_rank_other_than_0_reach_the_user(
    tmp_path: Path, fake: str, code: int, text: str
) -> None:
    place = Place(tmp_path, fake)
    done = place.submit("--wait")
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    outcome = place.run.read_outcome()
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_code) == ("failed", code)
    assert "rank 1" in outcome.message


def test_when_all_ranks_give_up_together_what_they_say_is_the_reason(tmp_path: Path) -> None:
    place = Place(tmp_path, "gives-up")
    done = place.submit("--wait")
    assert done.returncode == 6, done.stderr
    outcome = _only_folder(place).read_outcome()
    assert outcome is not None
    assert (outcome.exit_code, outcome.message) == (6, "step 3 was not done within 5 s; rank 1 stood at x")


def test_a_stop_before_training_has_its_own_handler_is_an_interruption(tmp_path: Path) -> None:
    place = Place(tmp_path, "slow-start")
    submit = place.start("--wait")
    wait_until(lambda: (place.run.path / "environment1.json").exists())
    wait_until(lambda: (place.run.path / "environment0.json").exists())
    submit.send_signal(signal.SIGUSR2)
    _, shown = submit.communicate(timeout=20)
    assert submit.returncode == 75, shown


def test_a_stop_at_any_moment_of_the_start_is_an_interruption(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped")
    submit = place.start("--wait")
    wait_until(lambda: list(place.run.logs.glob("*/supervisor.log")))  # a process now, but without handlers yet
    submit.send_signal(signal.SIGINT)
    _, shown = submit.communicate(timeout=20)
    assert submit.returncode == 75, shown


def test_a_second_ctrl_c_ends_a_job_that_does_not_stop(tmp_path: Path) -> None:
    place = Place(tmp_path, "hang:none")
    submit = place.start("--wait")
    ranks = place.wait_for_ranks()
    submit.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert submit.poll() is None
    submit.send_signal(signal.SIGINT)
    _, shown = submit.communicate(timeout=20)
    assert submit.returncode == 6, shown
    assert "ended at once by SIGINT" in shown
    assert not any(is_alive(pid) for pid in ranks.values())


def test_before_the_time_limit_the_job_is_asked_to_save_and_leave(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped", timeout_min=0.1, signal_lead_s=3)
    assert place.submit("--wait").returncode == 75


def test_a_job_that_does_not_stop_for_the_time_limit_is_ended_at_the_limit(tmp_path: Path) -> None:
    place = Place(tmp_path, "hang:none", timeout_min=0.06, signal_lead_s=1)
    done = place.submit("--wait")
    assert done.returncode == 6
    assert "time limit of 0.06 min; raise signal_lead_s" in done.stderr


def test_when_the_supervisor_is_killed_a_waiting_submit_ends_the_ranks_and_says_so(tmp_path: Path) -> None:
    place = Place(tmp_path, "hang:none", signal_lead_s=1)
    submit = place.start("--wait")
    ranks = place.wait_for_ranks()
    os.kill(int(_only_folder(place).read().job_id or 0), signal.SIGKILL)
    _, shown = submit.communicate(timeout=20)
    assert submit.returncode == 6
    outcome = place.run.read_outcome()
    assert outcome is not None
    assert outcome.exit_code == 6
    assert "supervisor" in shown
    assert not any(is_alive(pid) for pid in ranks.values())


def test_when_the_supervisor_of_a_detached_job_is_killed_the_ranks_save_and_leave(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped")
    assert place.submit().returncode == 0
    ranks = place.wait_for_ranks()
    os.kill(int(_only_folder(place).read().job_id or 0), signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in ranks.values()))
    outcome = place.run.read_outcome()
    assert outcome is not None
    assert outcome.exit_code == 75
    place.write_profile("finish")
    assert place.submit("--wait").returncode == 0


def test_a_full_or_unwritable_run_directory_is_refused_in_words(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "run").write_text("a file where the folder should be")
    done = place.submit("--wait")
    assert done.returncode == 5
    assert "choose another run_dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_rank_is_left_behind_when_submit_itself_is_killed(tmp_path: Path) -> None:
    place = Place(tmp_path, "until-stopped")
    submit = place.start("--wait")
    ranks = place.wait_for_ranks()
    submit.kill()
    submit.communicate(timeout=20)
    assert place.run.living_ranks() == ranks  # the job goes on ...
    subprocess.run(["kill", "-TERM", str(_only_folder(place).read().job_id)], check=True)
    wait_until(lambda: not place.run.living_ranks())  # ... until it is told to stop
    assert wait_until(_only_folder(place).read_outcome).exit_code == 75
