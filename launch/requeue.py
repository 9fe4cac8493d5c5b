"""What the batch script of a Slurm job asks before and after its ranks: may they start, and what follows their end?

    python -m launch.requeue start FOLDER
    python -m launch.requeue end FOLDER SRUN_CODE
    python -m launch.requeue end FOLDER CODE before-ranks      what the ranks need could not be brought to the nodes

Slurm requeues a job after a node failure and, where the site says so, after a preemption. It does not requeue a job
that fails, that stops before its time limit, or that is preempted with PreemptMode=CANCEL: that is done here.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launch import slurm_commands
from launch.attempts import (
    Attempt,
    Cause,
    begin_attempt,
    end_attempt,
    read_attempts,
    why_not_again,
    with_end,
    write_attempts,
)
from launch.dependents import repoint
from launch.ending import Decision, SlurmView, decide, rank_outcome, saying, setup_outcome
from launch.folder import BESIDE, JobFolder, JobRecord, append_job, now_utc
from launch.slurm_commands import LostAnswerError, SlurmSilentError, UnreachableError
from launch.srun_log import FirstEnd, first_end, last_message, newest_start
from mimscale import durable
from mimscale.errors import INTERRUPTED_EXIT_CODE, LaunchError, LostRankError
from mimscale.train.run_dir import Outcome, RunDir

CONTROLLER_S = 120.0  # how long an answer of the controller is waited for
RETRY_S = 5.0


def start(folder: JobFolder) -> int:
    """Record that the job starts; returns the exit code with which it must not start, else 0."""
    task = _array_task()
    job_id = os.environ["SLURM_JOB_ID"]
    record = folder.read()
    if record.job_id is None:  # the submission was killed, or its answer got lost
        folder.write(replace(record, job_id=os.environ.get("SLURM_ARRAY_JOB_ID", job_id)))
    step = _committed_step(folder, record)
    reached = _reached(folder, record)
    attempts = begin_attempt(folder.attempts_file(task), job_id, reached)
    why = why_not_again(attempts[:-1], record.max_requeues, trains=record.trains)
    if folder.cancelled.exists():
        why = "cancelled"
    if why is not None:
        _say(why)
        end_attempt(folder.attempts_file(task), job_id, reached, "ended", why)
        folder.settle(Outcome(outcome="failed", exit_code=LostRankError.exit_code, step=step, message=why), task)
        return LostRankError.exit_code
    try:
        folder.run.refuse_foreign([folder.task_file(task), folder.run.code], LaunchError)
    except LaunchError as error:
        _say(str(error))
        end_attempt(folder.attempts_file(task), job_id, reached, "ended", str(error))
        folder.settle(Outcome(outcome="failed", exit_code=error.exit_code, step=step, message=str(error)), task)
        return error.exit_code
    # Submitit looks for the task under the job's id, which nobody knew when it was written.
    shutil.copyfile(folder.task_file(task), folder.path / f"{_own_name()}_submitted.pkl")
    folder.outcome_file(task).unlink(missing_ok=True)  # somebody has requeued a job that was over
    if record.trains:
        folder.run.outcome.unlink(missing_ok=True)  # how the attempt before ended
    where = f"step {step}" if record.trains else f"{reached} finished part(s)"
    _say(f"start {len(attempts)} of job {job_id} on {os.environ.get('SLURM_JOB_NODELIST')}, from {where}")
    return 0


def end(folder: JobFolder, srun_code: int, *, ranks_began: bool = True) -> int:
    """Settle the job or let it start again; returns the exit code of the batch script."""
    task = _array_task()
    job_id = os.environ["SLURM_JOB_ID"]
    record = folder.read()
    step = _committed_step(folder, record)
    written = folder.run.read_outcome() if record.trains else None
    if ranks_began:
        first, message = _first_failure(folder, task)
        outcome = rank_outcome(written, srun_code, first, trains=record.trains, step=step, message=message)
    else:
        log = newest_start(_batch_log(folder, task))
        first = first_end(log)  # one node that fails makes srun end the others by a signal
        code = first.code if first is not None and first.code is not None else srun_code
        outcome = setup_outcome(code, step=step, message=last_message(log))
    if outcome.exit_code == 0:  # needs nobody's opinion, and the controller may be away
        decision = Decision(action="settle", cause="ended", outcome=outcome)
    else:
        view = SlurmView.of(_patiently(lambda: slurm_commands.show_job(_own_name()), {}))
        decision = decide(outcome, view, restart=_restart_count(), cancelled=folder.cancelled.exists())
        _say(f"ranks ended: {outcome.outcome}, exit code {outcome.exit_code}; Slurm says {view}")
    file = folder.attempts_file(task)
    attempts = with_end(read_attempts(file), job_id, _reached(folder, record), decision.cause, decision.outcome.message)
    with _said_when_full(file):  # then the next start completes what stands there
        write_attempts(file, attempts)
    if decision.action == "again":
        decision = _again(folder, record, attempts, decision, task)
    with _said_when_full(folder.path):
        if decision.action == "settle":
            folder.settle(decision.outcome, task)
        elif record.trains:
            folder.run.write_outcome(decision.outcome)
    _say(f"{decision.outcome.outcome}: {decision.outcome.message or 'all done'}")
    return decision.outcome.exit_code


@contextmanager
def _said_when_full(path: Path) -> Iterator[None]:
    """Say what cannot be written, and go on: to start a job again, or to end it with its own code, needs no disk."""
    try:
        yield
    except OSError as error:
        _say(f"{path}: {error}")


def _first_failure(folder: JobFolder, task: int | None) -> tuple[FirstEnd | None, str]:
    log = _batch_log(folder, task)
    first = first_end(log)
    if first is None or first.rank == 0:
        return first, last_message(log)
    own = folder.rank_log(folder.task_job_id(task), first.rank)
    return first, last_message(own.read_text(errors="replace")) if own.exists() else ""


def _batch_log(folder: JobFolder, task: int | None) -> str:
    """What rank 0 and the batch script have printed, at all starts."""
    log = folder.rank_log(folder.task_job_id(task), 0)
    return log.read_text(errors="replace") if log.exists() else ""


def _again(
    folder: JobFolder, record: JobRecord, attempts: list[Attempt], decision: Decision, task: int | None
) -> Decision:
    """Requeue the job or submit it again, unless it has had its chances."""
    outcome = decision.outcome
    why = why_not_again(attempts, record.max_requeues, trains=record.trains)
    if why is not None:
        if outcome.outcome == "interrupted" and not attempts[-1].made_progress:
            outcome = replace(outcome, outcome="failed", exit_code=LostRankError.exit_code)
        return replace(decision, action="settle", outcome=saying(outcome, why))
    try:
        how = _requeue(decision.cause, record) or _resubmit(folder, record, task)
    except (LaunchError, OSError) as error:
        return replace(decision, action="settle", outcome=saying(outcome, f"could not be requeued: {error}"))
    waiting = replace(outcome, outcome="interrupted", exit_code=INTERRUPTED_EXIT_CODE)
    return replace(decision, outcome=saying(waiting, f"{how} ({decision.cause})"))


def _requeue(cause: Cause, record: JobRecord) -> str | None:
    """Let Slurm start the job again under its id; None where that is not to be had."""
    job_id = _own_name()
    partition = os.environ.get("SLURM_JOB_PARTITION", record.partition or "")
    if cause == "preempted" and "CANCEL" in slurm_commands.preempt_mode(partition):
        return None  # what a preemption cancels cannot be requeued
    deadline_s = time.monotonic() + CONTROLLER_S
    while True:
        try:
            slurm_commands.requeue(job_id)
            return f"requeued as job {job_id}"
        except SlurmSilentError as error:
            _say(str(error))
            requeued = _is_requeued(job_id)
            if requeued:  # by this call, whose answer got lost, or by the one before
                return f"requeued as job {job_id}"
            no_answer = isinstance(error, LostAnswerError | UnreachableError)
            if requeued is False and not no_answer:
                return None
            if time.monotonic() > deadline_s:
                if requeued is False or isinstance(error, UnreachableError):
                    return None
                # Another job now could become a second one for the same run, of which nobody keeps track.
                raise SlurmSilentError(f"nobody says whether job {job_id} is queued again: {error}") from None
            time.sleep(RETRY_S)


def _is_requeued(job_id: str) -> bool | None:
    """Whether Slurm has queued this job again; None when nobody says."""
    try:
        view = SlurmView.of(slurm_commands.show_job(job_id))
    except SlurmSilentError as error:
        _say(str(error))
        return None
    return view.is_requeued(_restart_count())


def _resubmit(folder: JobFolder, record: JobRecord, task: int | None) -> str:
    """Submit the same batch script again, to start when this job is gone."""
    own_id = _own_name()
    name = f"{record.job_name}.{own_id}"
    options = [f"--dependency=afterany:{own_id}", f"--job-name={name}", *([] if task is None else [f"--array={task}"])]
    if task is None:  # by its name the job is found when its id cannot be written down
        folder.write(replace(folder.read(), job_name=name))
    new_id = slurm_commands.submit(folder.script, slurm_commands.without_allocation(os.environ), name, *options)
    if task is None:
        folder.write(replace(folder.read(), job_id=new_id))
    else:
        durable.write_text(folder.moved_file(task), new_id)
    append_job(
        folder.run.jobs,
        {
            "job_id": new_id,
            "continues": own_id,
            "verb": record.verb,
            "executor": record.executor,
            "submitted_utc": now_utc(),
            "folder": str(folder.path.relative_to(folder.run.path)),
        },
    )
    repoint(folder.waiting(), folder.unfinished_job_ids())
    return f"submitted again as job {new_id}"


def _patiently(ask: Callable[[], dict[str, str]], otherwise: dict[str, str]) -> dict[str, str]:
    deadline_s = time.monotonic() + CONTROLLER_S
    while True:
        try:
            return ask()
        except SlurmSilentError as error:
            _say(str(error))
            if time.monotonic() > deadline_s:
                return otherwise
            time.sleep(RETRY_S)


def _committed_step(folder: JobFolder, record: JobRecord) -> int:
    """The newest step that the run can continue from; 0 for what does not train."""
    return committed_step(folder.run) if record.trains else 0


def _reached(folder: JobFolder, record: JobRecord) -> int:
    """What restarts must add to: the newest committed step; for what does not train the number of finished parts."""
    if record.trains:
        return committed_step(folder.run)
    made = folder.run.path.with_name(folder.run.path.name.removesuffix(BESIDE))
    return sum(1 for _ in made.glob("receipts/part-*"))  # of a store or of features; others have none


def committed_step(run: RunDir) -> int:
    """The step of the newest committed checkpoint; 0 when there is none."""
    names = [path.name.removeprefix("step_") for path in run.checkpoints.glob("step_*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _own_name() -> str:
    """What Slurm calls this job and no other: the last task of an array has the array's own number."""
    task = _array_task()
    return os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"


def _restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _array_task() -> int | None:
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return None if task is None else int(task)


def _say(message: str) -> None:
    print(f"mimscale: {time.strftime('%H:%M:%S')} {message}", flush=True)


def main(argv: list[str]) -> int:
    """The two calls of the batch script."""
    what, folder, *rest = argv
    job = JobFolder(Path(folder))
    if what == "end":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to the script as soon as the job is requeued
    try:
        return start(job) if what == "start" else end(job, int(rest[0]), ranks_began=rest[1:] != ["before-ranks"])
    except OSError as error:  # the run directory's disk is full or gone
        _say(f"{job.path}: {error}")
        # Never 0: ranks that stop together leave with it, and what waits for the job would start.
        return LaunchError.exit_code if what == "start" else int(rest[0]) or LaunchError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
