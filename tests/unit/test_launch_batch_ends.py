"""What a batch script's two questions do to the files of a job, with a Slurm that pretends."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from launch import requeue, slurm_commands
from launch.attempts import read_attempts
from launch.folder import JobFolder, JobRecord, claim_folder
from mimscale import durable
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.world import Process

RUNNING = "JobId=100 JobState=RUNNING Restarts=0 PreemptTime=None\n"
PREEMPTED = "JobId=100 JobState=RUNNING Restarts=0 PreemptTime=2026-11-24T22:31:08\n"
INTERRUPTED = Outcome(outcome="interrupted", exit_code=75, step=7, stopped_by="SIGTERM")
LOST = Outcome(outcome="failed", exit_code=6, step=7, message="rank 1 on node1: Killed")


class Job:
    """A submitted training in a folder, on a node that believes to be in job 100."""

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.slurm, self.run = slurm, RunDir(folder / "run")
        self.folder = self.claim()

    def claim(self, **changes: object) -> JobFolder:
        record = JobRecord(
            **{  # type: ignore[arg-type]
                "verb": "pretrain",
                "executor": "slurm",
                "processes": 2,
                "master_port": None,
                "config_hash": "",
                "timeout_min": 30.0,
                "signal_lead_s": 60.0,
                "lost_rank_grace_s": 10.0,
                "trains": True,
                "submitted_utc": "2026-01-01T00:00:00Z",
                "submitter": Process(pid=1, host="login", start_ticks=-1),
                "job_name": "mimscale-x",
                "user": "ana",
                "job_id": "100",
                **changes,
            }
        )
        folder = claim_folder(self.run.logs, record, "")
        folder.script.write_text("#!/bin/bash\n")
        for task in (None, 0, 1):
            folder.task_file(task).write_bytes(b"task")
        return folder

    def commit(self, step: int) -> None:
        (self.run.checkpoints / f"step_{step:08d}").mkdir(parents=True)

    def start(self) -> int:
        return requeue.start(self.folder)

    def end(self, code: int = 0, outcome: Outcome | None = None) -> int:
        if outcome is not None:
            self.run.write_outcome(outcome)
        return requeue.end(self.folder, code)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    for name, value in {"SLURM_JOB_ID": "100", "SLURM_JOB_PARTITION": "main", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(requeue, "CONTROLLER_S", 0.3)
    monkeypatch.setattr(requeue, "RETRY_S", 0.1)
    monkeypatch.setattr(slurm_commands, "LOST_ID_S", 0.1)
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    slurm.answer("shown", RUNNING)
    before = signal.getsignal(signal.SIGTERM)
    yield Job(tmp_path, slurm)
    signal.signal(signal.SIGTERM, before)  # the last question ignores it, and what other tests start would inherit that


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


def test_a_controller_that_is_away_for_a_while_is_waited_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.start()
    answers: list[Callable[[], dict[str, str]]] = [_away, lambda: {"JobState": "RUNNING"}]
    monkeypatch.setattr(slurm_commands, "show_job", lambda job_id: answers.pop(0)())
    assert job.end(137, LOST) == 75
    assert job.slurm.calls("scontrol")[-1] == "requeue 100"


def _away() -> dict[str, str]:
    raise slurm_commands.SlurmSilentError("scontrol gave no answer in 8 s; is the controller up?")


def test_a_job_that_cannot_be_requeued_says_so(job: Job) -> None:
    job.start()
    (job.slurm.folder / "bin" / "scontrol").write_text("#!/bin/sh\ntest $1 != requeue\n")
    job.slurm.answer("refuse", "sbatch: error: Access denied\n")
    assert job.end(137, LOST) == 6
    outcome = job.folder.read_outcome()
    assert outcome is not None
    assert "could not be requeued: sbatch refused the job: sbatch: error: Access denied" in outcome.message


LOST_ANSWER = "slurm_requeue error: Socket timed out on send/recv operation"
PENDING = "slurm_requeue error: Job is pending execution"


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
    monkeypatch.setattr(slurm_commands, "show_job", lambda job_id: _away())
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
