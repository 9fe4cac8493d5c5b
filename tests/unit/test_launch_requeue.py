"""What follows the end of a Slurm job's ranks, and when a job has had its chances."""

from pathlib import Path

import pytest

from launch.attempts import Attempt, Cause, begin_attempt, end_attempt, read_attempts, why_not_again
from launch.ending import SlurmView, decide, rank_outcome, setup_outcome
from launch.srun_log import FirstEnd, first_end, last_message
from mimscale.train.run_dir import Outcome

RUNNING = SlurmView(state="RUNNING", preempted=False, restarts=0)
INTERRUPTED = Outcome(outcome="interrupted", exit_code=75, step=7, message="saved", stopped_by="SIGUSR2")


def _failed(code: int) -> Outcome:
    return Outcome(outcome="failed", exit_code=code, step=7, message="why")


def _view(state: str = "RUNNING", *, preempted: bool = False, restarts: int = 0) -> SlurmView:
    return SlurmView(state=state, preempted=preempted, restarts=restarts)


def _interrupted_by(what: str) -> Outcome:
    return Outcome(outcome="interrupted", exit_code=75, step=7, stopped_by=what)


@pytest.mark.parametrize(
    ("outcome", "slurm", "action", "cause"),
    [
        (Outcome(outcome="finished", exit_code=0, step=9), RUNNING, "settle", "ended"),
        (_interrupted_by("SIGUSR2"), RUNNING, "again", "time limit"),
        (_interrupted_by("time limit"), RUNNING, "again", "time limit"),
        (_interrupted_by("SIGUSR2"), _view(preempted=True), "again", "preempted"),
        (_interrupted_by("SIGTERM"), _view(preempted=True), "again", "preempted"),
        (_interrupted_by("SIGTERM"), _view("PREEMPTED", preempted=True), "again", "preempted"),
        (_interrupted_by("SIGTERM"), RUNNING, "settle", "stopped"),
        (_interrupted_by("SIGTERM"), _view("CANCELLED"), "settle", "stopped"),
        (_failed(6), _view("CANCELLED"), "settle", "stopped"),
        (_interrupted_by("SIGTERM"), _view("PENDING", restarts=1), "leave", "requeued from outside"),
        (_failed(6), _view("COMPLETING", restarts=1), "leave", "requeued from outside"),
        (_failed(6), _view("COMPLETING"), "settle", "stopped"),
        (_interrupted_by(""), _view("COMPLETING"), "settle", "stopped"),
        (
            _failed(6),
            SlurmView(state="COMPLETING", preempted=False, restarts=0, reason="TimeLimit"),
            "again",
            "time limit",
        ),
        (_failed(6), _view("TIMEOUT"), "again", "time limit"),
        (_failed(6), RUNNING, "again", "lost rank"),
        (_failed(1), RUNNING, "again", "lost rank"),
        (_failed(2), RUNNING, "settle", "ended"),
        (_failed(3), RUNNING, "settle", "ended"),
        (_failed(4), RUNNING, "settle", "ended"),
        (_failed(5), RUNNING, "settle", "ended"),
    ],
)
def test_what_follows_the_end_of_the_ranks(outcome: Outcome, slurm: SlurmView, action: str, cause: str) -> None:
    decision = decide(outcome, slurm, restart=0, cancelled=False)
    assert (decision.action, decision.cause) == (action, cause)
    assert decision.outcome.exit_code == outcome.exit_code


@pytest.mark.parametrize("slurm", [RUNNING, _view(preempted=True), _view("PENDING", restarts=1)])
@pytest.mark.parametrize("outcome", [INTERRUPTED, _failed(6)])
def test_a_cancelled_job_never_starts_again_whatever_else_ends_it(outcome: Outcome, slurm: SlurmView) -> None:
    decision = decide(outcome, slurm, restart=0, cancelled=True)
    assert decision.action == "settle"
    assert "cancelled" in decision.outcome.message


@pytest.mark.parametrize(
    ("written", "srun_code", "trains", "kind", "code", "text"),
    [
        (INTERRUPTED, 0, True, "interrupted", 75, "saved"),
        (INTERRUPTED, 137, True, "interrupted", 75, "saved"),
        (_failed(6), 6, True, "failed", 6, "why"),
        (None, 0, True, "interrupted", 75, "before training began"),
        (None, 0, False, "finished", 0, ""),
        (None, 75, False, "interrupted", 75, "stopped by request"),
        (None, 137, True, "failed", 6, "killed by signal 9"),
        (None, 3, True, "failed", 3, "exit code 3"),
    ],
)
def test_how_the_ranks_ended_is_what_training_wrote_or_what_srun_says(
    written: Outcome | None, srun_code: int, trains: bool, kind: str, code: int, text: str
) -> None:
    outcome = rank_outcome(written, srun_code, None, trains=trains, step=7)
    assert (outcome.outcome, outcome.exit_code) == (kind, code)
    assert text in outcome.message


@pytest.mark.parametrize(
    ("code", "message", "exit_code", "text", "action"),
    [
        (5, "/env.tar: not unpacked", 5, "before its ranks started: /env.tar: not unpacked", "settle"),
        (1, "", 1, "before its ranks started: exit code 1; see the log", "again"),
        (137, "an older line", 6, "before its ranks started: killed by signal 9", "again"),
    ],
)
def test_what_fails_before_the_ranks_is_told_from_what_they_do(
    code: int, message: str, exit_code: int, text: str, action: str
) -> None:
    outcome = setup_outcome(code, step=7, message=message)
    assert (outcome.outcome, outcome.exit_code, outcome.step, outcome.message) == ("failed", exit_code, 7, text)
    assert decide(outcome, RUNNING, restart=0, cancelled=False).action == action


LOG = """\
mimscale: 22:34:30 start 1 of job 6 on node[1-2], from step 0
srun: error: node9: task 9: Exited with exit code 9
mimscale: 22:35:12 start 2 of job 6 on node[1-2], from step 0
Traceback (most recent call last):
srun: error: node2: task 3: Exited with exit code 3
srun: launch/slurm: _step_signal: Terminating StepId=6.0
slurmstepd-node1: error: *** STEP 6.0 ON node1 CANCELLED AT 2026-11-24T22:35:13 ***
srun: error: node2: task 2: Killed
srun: error: node1: tasks 0-1: Killed
"""


def test_the_first_rank_that_failed_is_the_cause_and_not_those_that_srun_ended_because_of_it() -> None:
    first = first_end(LOG)
    assert first == FirstEnd(node="node2", rank=3, code=3, how="Exited with exit code 3")
    outcome = rank_outcome(None, 137, first, trains=True, step=7, message="ct_7: broken")
    assert outcome.exit_code == 3
    assert outcome.message == "rank 3 on node2 failed with exit code 3: ct_7: broken"


@pytest.mark.parametrize(
    "how", ["Killed", "Segmentation fault (core dumped)", "Out Of Memory", "Exited with exit code 139"]
)
def test_a_rank_that_a_signal_ended_is_a_lost_rank(how: str) -> None:
    first = first_end(f"mimscale: start 1 of job 6\nsrun: error: node1: tasks 1-2: {how}\n")
    outcome = rank_outcome(None, 137, first, trains=True, step=7)
    assert outcome.exit_code == 6
    assert f"rank 1 on node1: {how}" in outcome.message


def test_no_failure_is_no_failure() -> None:
    assert first_end("mimscale: start 1 of job 6\nstep 3\n") is None


def test_the_error_of_a_rank_is_found_among_what_it_prints() -> None:
    log = "mimscale: 22:35:12 start 2 of job 6\nmimscale pretrain: old\nx\n"
    log += "mimscale: not started:\n  node2: a\n  node3: b\nbye\n"
    assert last_message(log) == "not started:\n  node2: a\n  node3: b"
    assert last_message("nothing") == ""


# What Slurm 22.05 prints, shortened.
SHOWN = {
    "JobState=RUNNING Requeue=1 Restarts=0 PreemptEligibleTime=2026-11-24T PreemptTime=None": RUNNING,
    "JobState=COMPLETING Reason=TimeLimit Restarts=1": SlurmView(
        state="COMPLETING", preempted=False, restarts=1, reason="TimeLimit"
    ),
    "JobState=RUNNING Restarts=2 PreemptTime=2026-11-24T22:31:08": _view(preempted=True, restarts=2),
    "JobState=COMPLETING Reason=None Restarts=0 PreemptTime=2026-11-24T23:09:35": SlurmView(
        state="COMPLETING", preempted=True, restarts=0, reason="None"
    ),
    "JobState=PREEMPTED Restarts=0 PreemptTime=None": _view("PREEMPTED", preempted=True),
    "": _view(""),
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_slurm_says_about_a_job_is_read(text: str) -> None:
    assert SlurmView.of(dict(pair.split("=") for pair in text.split())) == SHOWN[text]


def _attempts(*ends: tuple[int, int, Cause | None]) -> list[Attempt]:
    return [
        Attempt(job_id="5", number=number, started_unix_s=0.0, first_step=first, last_step=last, cause=cause)
        for number, (first, last, cause) in enumerate(ends)
    ]


def test_three_restarts_without_a_new_step_are_a_crash_loop_and_two_are_not() -> None:
    idle = (40, 40, "lost rank")
    assert why_not_again(_attempts((0, 40, "lost rank"), idle, idle), None) is None  # type: ignore[arg-type]
    why = why_not_again(_attempts((0, 40, "lost rank"), idle, idle, idle), None)  # type: ignore[arg-type]
    assert why is not None
    assert "crash loop: 3 restarts in a row without a new committed step after step 40 (lost rank)" in why


def test_a_first_start_that_got_nowhere_is_no_restart() -> None:
    idle = (0, 0, "lost rank")
    assert why_not_again(_attempts(idle, idle, idle), None) is None  # type: ignore[arg-type]
    assert why_not_again(_attempts(idle, idle, idle, idle), None) is not None  # type: ignore[arg-type]


def test_progress_ends_the_count() -> None:
    idle, progress = (40, 40, "lost rank"), (40, 41, "time limit")
    assert why_not_again(_attempts((0, 40, None), idle, idle, progress, idle, idle), None) is None  # type: ignore[arg-type]


def test_a_rank_that_stops_by_request_is_no_failure_although_srun_kills_the_others() -> None:
    first = FirstEnd(node="node2", rank=1, code=75, how="Exited with exit code 75")
    outcome = rank_outcome(None, 137, first, trains=False, step=0)
    assert (outcome.outcome, outcome.exit_code) == ("interrupted", 75)


def test_what_does_not_train_gets_on_by_parts() -> None:
    parts = _attempts(*[(done, done + 1, "time limit") for done in range(6)])
    assert why_not_again(parts, None, trains=False) is None
    why = why_not_again(_attempts(*[(2, 2, "time limit")] * 4), None, trains=False)  # type: ignore[arg-type]
    assert why is not None
    assert "crash loop: 3 restarts in a row without a new finished part (2 are) (time limit)" in why


@pytest.mark.parametrize("cause", ["preempted", "requeued from outside"])
def test_preemptions_count_for_nothing(cause: Cause) -> None:
    assert why_not_again(_attempts(*[(0, 0, cause)] * 20), 1) is None


def test_a_job_that_is_killed_without_a_word_again_and_again_stops_too() -> None:
    why = why_not_again(_attempts(*[(0, 0, None)] * 4), None)
    assert why is not None
    assert "killed from outside" in why


def test_restarts_that_make_progress_go_on_until_max_requeues() -> None:
    attempts = _attempts(*[(step, step + 1, "time limit") for step in range(3)])
    assert why_not_again(attempts, None) is None
    assert why_not_again(attempts, 3) is None
    assert why_not_again(attempts, 2) == "slurm.max_requeues=2 is used up; `mimscale resume` goes on"
    assert why_not_again(attempts[:1], 0) is not None


def test_starts_and_ends_are_kept_and_a_start_without_an_end_is_completed_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "attempts.jsonl"
    assert [attempt.number for attempt in begin_attempt(file, "5", 0)] == [0]
    assert begin_attempt(file, "5", 12)[0].last_step == 12
    end_attempt(file, "5", 20, "preempted", "m")
    file.write_text(file.read_text() + '{"job_id": "5", "numb')
    first, second = read_attempts(file)
    assert (first.cause, first.last_step, second.first_step, second.last_step) == (None, 12, 12, 20)
    assert (second.cause, second.message) == ("preempted", "m")
    third = end_attempt(file, "6", 20, "lost rank", "killed before it was written down")[-1]
    assert (third.number, third.job_id, third.first_step, third.last_step) == (2, "6", 20, 20)
    assert len(read_attempts(file)) == 3
