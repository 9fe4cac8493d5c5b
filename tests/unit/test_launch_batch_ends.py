"""What a batch script's two questions do to the files of a job, with a Slurm that pretends."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from batch_job import INTERRUPTED, LOST, PREEMPTED, RUNNING, Job, away, batch_job

from launch import requeue, slurm_commands
from launch.attempts import read_attempts
from mimscale.train.run_dir import Outcome, RunDir


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    yield from batch_job(tmp_path, monkeypatch)


def test_a_job_whose_id_got_lost_runs_all_the_same_and_writes_it_down(job: Job) -> None:
    job.folder = job.claim(job_id=None)
    assert job.start() == 0
    assert job.folder.read().job_id == "100"
    assert (job.folder.path / "100_submitted.pkl").read_bytes() == b"task"


def test_a_finished_job_is_settled_without_asking_anybody(job: Job) -> None:
    assert job.start() == 0
    assert job.end(0, Outcome(outcome="finished", exit_code=0, step=20)) == 0
    assert job.folder.read_outcome() == job.run.read_outcome() == Outcome(outcome="finished", exit_code=0, step=20)
    assert job.slurm.calls("scontrol") == []


def test_a_lost_rank_is_requeued_and_the_job_is_not_over(job: Job) -> None:
    job.start()
    job.commit(5)
    assert job.end(137, LOST) == 75
    assert job.slurm.calls("scontrol")[-1] == "requeue 100"
    assert job.folder.read_outcome() is None
    outcome = job.run.read_outcome()
    assert outcome is not None
    assert (outcome.outcome, outcome.exit_code) == ("interrupted", 75)
    assert outcome.message == "rank 1 on node1: Killed; requeued as job 100 (lost rank)"
    (attempt,) = read_attempts(job.folder.attempts_file())
    assert (attempt.first_step, attempt.last_step, attempt.cause) == (0, 5, "lost rank")


def test_what_fails_before_the_ranks_is_named_by_its_own_words_and_not_by_those_of_an_earlier_start(job: Job) -> None:
    log = job.folder.rank_log("100", 0)
    log.write_text("mimscale: 22:34:30 start 1 of job 100 on node[1-2], from step 0\nmimscale: old trouble\n")
    job.start()
    with log.open("a") as file:
        file.write("mimscale: 22:35:12 start 2 of job 100 on node[1-2], from step 0\n")
        file.write("mimscale: /env.tar: not unpacked as /tmp/x on node2: the disk is full\n")
        file.write("mimscale: 22:35:13 /tmp/x unpacked on node1 in 0.1 s\n")
        file.write("srun: error: node2: task 1: Exited with exit code 5\n")
        file.write("srun: error: node1: task 0: Killed\n")
    assert requeue.main(["end", str(job.folder.path), "137", "before-ranks"]) == 5
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert outcome.message == ("before its ranks started: /env.tar: not unpacked as /tmp/x on node2: the disk is full")
    assert not any(call.startswith("requeue") for call in job.slurm.calls("scontrol"))


def test_a_start_that_was_killed_before_it_could_write_is_another_try_and_not_the_end_of_the_one_before(
    job: Job,
) -> None:
    job.start()
    job.commit(5)
    job.end(0, replace(INTERRUPTED, stopped_by="time limit"))
    job.run.outcome.unlink()  # by the start that follows
    assert requeue.main(["end", str(job.folder.path), "137", "before-ranks"]) == 75
    assert job.slurm.calls("scontrol")[-1] == "requeue 100"
    first, second = read_attempts(job.folder.attempts_file())
    assert (first.cause, second.cause) == ("time limit", "lost rank")
    assert second.message == "before its ranks started: killed by signal 9"


def test_what_a_preemption_cancels_is_submitted_again_and_what_waits_for_it_waits_for_the_new_job(job: Job) -> None:
    child = job.claim(job_id="300")
    job.slurm.answer("count", "199")
    job.folder.dependents.write_text(f"{child.path}\n")
    job.start()
    job.slurm.answer("shown", PREEMPTED.strip() + " PreemptMode=CANCEL\n")
    assert job.end(0, INTERRUPTED) == 75
    (call,) = job.slurm.calls("sbatch")
    assert "--dependency=afterany:100" in call
    assert "--job-name=mimscale-x.100" in call
    assert call.endswith("/submission.sh")
    assert "SLURM_JOB_ID" not in (job.slurm.folder / "environment.200").read_text()
    record = job.folder.read()
    assert (record.job_id, record.job_name) == ("200", "mimscale-x.100")
    assert "requeue 100" not in job.slurm.calls("scontrol")
    assert job.slurm.calls("scontrol")[-1] == "update JobId=300 Dependency=afterok:200"
    assert '"continues": "100"' in job.run.jobs.read_text()


def test_a_cancelled_job_is_settled_and_does_not_even_start_again(job: Job) -> None:
    job.start()
    job.folder.cancelled.write_text("{}")
    assert job.end(0, INTERRUPTED) == 75
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert "cancelled" in outcome.message
    assert job.slurm.calls("sbatch") == []
    assert not any(call.startswith("requeue") for call in job.slurm.calls("scontrol"))
    assert job.start() == 6


def test_a_crash_loop_ends_with_its_reason_after_three_restarts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        job.slurm.answer("shown", RUNNING.replace("Restarts=0", f"Restarts={restart}"))
        assert job.folder.read_outcome() is None
        assert job.start() == 0
        code = job.end(137, LOST)
    assert code == 6
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert outcome == job.run.read_outcome()
    assert "crash loop: 3 restarts in a row without a new committed step" in outcome.message


def test_a_job_that_has_used_up_its_requeues_stays_interrupted_when_it_made_progress(job: Job) -> None:
    job.folder = job.claim(max_requeues=0)
    job.start()
    job.commit(7)
    assert job.end(0, replace(INTERRUPTED, stopped_by="time limit")) == 75
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert (outcome.outcome, outcome.message) == (
        "interrupted",
        "slurm.max_requeues=0 is used up; `mimscale resume` goes on",
    )


def test_a_job_that_its_node_takes_down_again_and_again_stops_at_its_next_start(job: Job) -> None:
    codes = [job.start() for _ in range(5)]  # no end: the batch script died with the node
    assert codes == [0, 0, 0, 0, 6]
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert "crash loop" in outcome.message


@pytest.mark.parametrize("gets_on", [True, False])
def test_an_ingest_of_many_time_limits_goes_on_while_it_finishes_parts(
    job: Job, monkeypatch: pytest.MonkeyPatch, gets_on: bool
) -> None:
    job.run = RunDir(job.run.path.with_name("store.job"))
    job.folder, receipts = job.claim(trains=False), job.run.path.with_name("store") / "receipts"
    receipts.mkdir(parents=True)
    for restart in range(6):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        limit = "JobState=COMPLETING Reason=TimeLimit"
        job.slurm.answer("shown", RUNNING.replace("JobState=RUNNING", limit).replace("=0", f"={restart}"))
        assert job.start() == (0 if gets_on or restart < 4 else 6)
        if gets_on:
            (receipts / f"part-{restart:05d}.jsonl").write_text("")
        code = job.end(137)
    assert code == (75 if gets_on else 6)
    assert (job.folder.read_outcome() is None) == gets_on


def test_a_controller_that_isaway_for_a_while_is_waited_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.start()
    answers: list[Callable[[], dict[str, str]]] = [away, lambda: {"JobState": "RUNNING"}]
    monkeypatch.setattr(slurm_commands, "show_job", lambda job_id: answers.pop(0)())
    assert job.end(137, LOST) == 75
    assert job.slurm.calls("scontrol")[-1] == "requeue 100"


def test_a_job_that_cannot_be_requeued_says_so(job: Job) -> None:
    job.start()
    (job.slurm.folder / "bin" / "scontrol").write_text("#!/bin/sh\ntest $1 != requeue\n")
    job.slurm.answer("refuse", "sbatch: error: Access denied\n")
    assert job.end(137, LOST) == 6
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert "could not be requeued: sbatch refused the job: sbatch: error: Access denied" in outcome.message


def test_each_task_of_an_array_ends_by_itself_and_the_array_when_all_have(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.folder = job.claim(trains=False, array=2)
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
        assert job.folder.read_outcome() is None
        assert job.start() == 0
        assert job.end(0) == 0
    assert job.folder.read_outcome() == Outcome(outcome="finished", exit_code=0, step=-1)
    assert job.end(3) == 3
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert outcome.message.startswith("1 of 2 tasks did not finish; task 1: a rank failed with exit code 3")


def test_the_last_task_of_an_array_asks_and_acts_for_itself_although_it_has_the_number_of_the_array(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.folder = job.claim(trains=False, array=2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    job.start()
    sibling = RUNNING.replace("RUNNING", "PENDING").replace("Restarts=0", "Restarts=1")
    scontrol = job.slurm.folder / "bin" / "scontrol"
    scontrol.write_text(f'{scontrol.read_text()}test "${{*: -1}}" != 100 || echo "{sibling.strip()}"\n')
    assert job.end(137) == 75
    assert job.slurm.calls("scontrol") == ["--oneliner show job 100_1", "requeue 100_1"]
    (attempt,) = read_attempts(job.folder.attempts_file(1))
    assert attempt.cause == "lost rank"


def test_a_task_of_an_array_that_a_preemption_cancels_goes_on_alone_and_the_merge_waits_for_all(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.folder, merge = job.claim(trains=False, array=3), job.claim(trains=False, job_id="300")
    job.folder.add_dependent(merge)
    job.folder.settle(Outcome(outcome="finished", exit_code=0, step=-1), 2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    job.start()
    job.slurm.answer("count", "199")
    job.slurm.answer("shown", PREEMPTED.strip() + " PreemptMode=CANCEL\n")
    assert job.end(75) == 75
    (call,) = job.slurm.calls("sbatch")
    assert "--dependency=afterany:100_1 " in call
    assert "--array=1 " in call
    assert job.slurm.calls("scontrol")[-1] == "update JobId=300 Dependency=afterok:100_0:200_1"
    assert job.folder.read().job_id == "100"
    assert job.folder.task_job_id(1) == "200_1"
    job.slurm.hold(job.folder, "PENDING", job_id="200_1")
    assert [queued.job_id for queued in job.folder.queued(slurm_commands.queue(["ana"]))] == ["200_1"]


def test_the_last_words_survive_the_term_that_a_requeue_brings(job: Job) -> None:
    job.start()
    body = "#!/bin/sh\ncase $1 in requeue) kill -TERM $PPID;; *) echo JobState=RUNNING;; esac\n"
    (job.slurm.folder / "bin" / "scontrol").write_text(body)
    job.run.write_outcome(LOST)
    words = [sys.executable, "-m", "launch.requeue", "end", str(job.folder.path), "137"]
    ended = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 75, ended.stderr
    assert "requeued as job 100" in ended.stdout
