"""The end of a job when Slurm's answers get lost or its disk is full, with a Slurm that pretends."""

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from batch_job import INTERRUPTED, Job, away, batch_job

from launch import requeue, slurm_commands
from launch.attempts import read_attempts
from mimscale import durable
from mimscale.train.run_dir import Outcome

LOST_ANSWER = "slurm_requeue error: Socket timed out on send/recv operation"
PENDING = "slurm_requeue error: Job is pending execution"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    yield from batch_job(tmp_path, monkeypatch)


def _requeue_says(job: Job, complaint: str, *, takes_it: bool) -> None:
    """Let every requeue fail with this text; where it `takes_it`, the controller shows the restart all the same."""
    body = f"""#!/bin/bash
        cd {job.slurm.folder}; echo "$*" >> scontrol.calls
        if [ $1 != requeue ]; then test -e taken && echo Restarts=1 || echo JobState=RUNNING Restarts=0; exit; fi
        {"touch taken" if takes_it else ":"}; echo {complaint!r} >&2; exit 1\n"""
    (job.slurm.folder / "bin" / "scontrol").write_text(body)


@pytest.mark.parametrize("complaint", [LOST_ANSWER, PENDING])
def test_a_requeue_whose_answer_got_lost_is_not_done_a_second_time_by_another_job(job: Job, complaint: str) -> None:
    job.start()
    _requeue_says(job, complaint, takes_it=True)
    assert job.end(0, replace(INTERRUPTED, stopped_by="time limit")) == 75
    assert job.slurm.calls("sbatch") == []
    assert job.slurm.calls("scontrol").count("requeue 100") == 1
    assert job.folder.read().job_id == "100"
    outcome = job.run.read_outcome()
    assert outcome is not None
    assert "requeued as job 100" in outcome.message


@pytest.mark.parametrize(("complaint", "tries"), [(LOST_ANSWER, 2), ("slurm_requeue error: Job is held", 1)])
def test_a_requeue_that_was_not_taken_is_tried_again_unless_it_is_refused(job: Job, complaint: str, tries: int) -> None:
    job.start()
    _requeue_says(job, complaint, takes_it=False)
    job.slurm.answer("count", "199")
    assert job.end(0, replace(INTERRUPTED, stopped_by="time limit")) == 75
    assert job.slurm.calls("scontrol").count("requeue 100") >= tries
    assert (job.slurm.calls("scontrol").count("requeue 100") == 1) == (tries == 1)
    assert len(job.slurm.calls("sbatch")) == 1
    assert job.folder.read().job_id == "200"


def test_no_other_job_is_submitted_while_nobody_says_whether_this_one_is_queued_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.start()
    _requeue_says(job, LOST_ANSWER, takes_it=False)
    monkeypatch.setattr(slurm_commands, "show_job", lambda job_id: away())
    assert job.end(0, replace(INTERRUPTED, stopped_by="time limit")) == 75
    assert job.slurm.calls("sbatch") == []
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert "could not be requeued: nobody says whether job 100 is queued again" in outcome.message


def _no_space(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_keeps_no_interrupted_run_from_starting_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.start()
    with monkeypatch.context() as full:
        full.setattr(durable, "write_bytes", _no_space)
        assert requeue.main(["end", str(job.folder.path), "0"]) == 75  # ranks that stop together leave with 0
    assert job.slurm.calls("scontrol")[-1] == "requeue 100"
    job.start()
    first, _ = read_attempts(job.folder.attempts_file())
    assert (first.cause, first.last_step) == (None, 0)


@pytest.mark.parametrize(
    ("written", "code"), [(INTERRUPTED, 75), (replace(INTERRUPTED, outcome="finished", exit_code=0), 0)]
)
def test_a_job_whose_end_cannot_be_written_down_ends_with_its_own_code(
    job: Job, monkeypatch: pytest.MonkeyPatch, written: Outcome, code: int
) -> None:
    job.start()
    job.folder.cancelled.write_text("{}")
    job.run.write_outcome(written)
    monkeypatch.setattr(durable, "write_bytes", _no_space)
    assert requeue.main(["end", str(job.folder.path), "0"]) == code
    assert job.folder.read_outcome() is None


def test_a_job_whose_folder_is_gone_does_not_end_well(job: Job) -> None:
    job.start()
    shutil.rmtree(job.folder.path)
    assert requeue.main(["end", str(job.folder.path), "0"]) == 5
