"""`submit --wait` and `logs -f`: show what a rank prints until the job has ended."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from launch import slurm_commands
from launch.folder import LOST_S, JobFolder
from launch.jobs import JOB_SIGNALS
from launch.slurm_commands import SlurmSilentError
from mimscale import console
from mimscale.errors import INTERRUPTED_EXIT_CODE, LostRankError
from mimscale.train.run_dir import Outcome

POLL_S = 0.2
QUEUE_EVERY_S = 10.0  # more often annoys a controller that thousands of jobs ask
TAIL_LINES = 20  # of another rank's log, when that rank is the cause


class _Requests:
    """Signals that came to this process, for the job."""

    def __init__(self) -> None:
        self.pending: list[signal.Signals] = []
        self._previous = {n: signal.signal(n, self._remember) for n in JOB_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(signal.Signals(number))

    def hand_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Log:
    """A growing file, copied to a stream."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path = path
        self._stream = stream
        self._shown_bytes = 0

    def show_new(self) -> None:
        """Copy what was added since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._shown_bytes)
            text = file.read()
        self._shown_bytes += len(text)
        self._stream.write(text.decode(errors="replace"))
        self._stream.flush()


def follow(folder: JobFolder, job_id: str) -> int:
    """Stay with a local job until it has ended; returns its exit code.

    The first Ctrl-C lets the job save and stop, the second ends it at once. USR2 and TERM are passed on.
    """
    supervisor = folder.read().supervisor
    assert supervisor is not None, f"{folder.path}: no supervisor in job.json"
    log = Log(folder.rank_log(job_id, 0), sys.stderr)
    requests = _Requests()
    asked = False
    try:
        while True:
            alive = supervisor.is_alive()  # before the log, so that nothing written before its end is missed
            while requests.pending:
                number = requests.pending.pop(0)
                if number == signal.SIGINT and not asked:
                    console.say("asked the job to save and stop; Ctrl-C again ends it at once")
                    number = signal.SIGUSR2
                asked = True
                with suppress(ProcessLookupError):
                    os.kill(supervisor.pid, number)
            log.show_new()
            if not alive:
                break
            time.sleep(POLL_S)
    finally:
        requests.hand_back()
    return _settle(folder, job_id)


def follow_batch_job(folder: JobFolder) -> int:
    """Show rank 0's log of a Slurm job until it has ended; returns its exit code. Ctrl-C leaves the job alone."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    try:
        show_until_ended(folder, 0, sys.stderr)
    except KeyboardInterrupt:
        console.say(f"the job goes on; `mimscale cancel {folder.run.path}` ends it")
        return 128 + signal.SIGINT
    outcome = folder.read_outcome()
    if outcome is None:
        raise LostRankError(f"{folder.path}: the job has left the queue without an outcome; see `mimscale status`")
    console.say(f"{outcome.outcome} (exit code {outcome.exit_code}): {outcome.message or 'all done'}")
    return outcome.exit_code


def show_until_ended(folder: JobFolder, rank: int, stream: TextIO) -> None:
    """Show a rank's log as it grows, also over restarts of the job, until the job has ended."""
    logs: dict[str, Log] = {}
    next_question_s = time.monotonic() + QUEUE_EVERY_S
    alive_s = time.monotonic()  # when that was known last
    while True:
        ended = folder.read_outcome() is not None
        record = folder.read()
        if record.job_id is not None:  # a job that Slurm cancels on preemption goes on under another id
            path = folder.rank_log(record.job_id, rank)
            logs.setdefault(record.job_id, Log(path, stream)).show_new()
        if ended:
            return
        if time.monotonic() > next_question_s:
            next_question_s = time.monotonic() + QUEUE_EVERY_S
            if _is_alive(folder):
                alive_s = time.monotonic()
            elif record.executor != "slurm" or time.monotonic() - alive_s > LOST_S:
                return
        time.sleep(POLL_S)


def _is_alive(folder: JobFolder) -> bool:
    record = folder.read()
    if record.executor != "slurm":
        return bool(folder.living())
    try:
        return any(job.is_active for job in folder.queued(slurm_commands.queue([record.user])))
    except SlurmSilentError:
        return True  # it says nothing about the job


def _settle(folder: JobFolder, job_id: str) -> int:
    outcome = folder.read_outcome()
    if outcome is None:
        outcome = _settle_without_supervisor(folder, job_id)
    if outcome.exit_code not in (0, INTERRUPTED_EXIT_CODE):
        _show_other_logs(folder, job_id)
    detail = f": {outcome.message}" if outcome.message else ""
    console.say(f"job {job_id} {outcome.outcome} (exit code {outcome.exit_code}){detail}")
    return outcome.exit_code


def _settle_without_supervisor(folder: JobFolder, job_id: str) -> Outcome:
    # Its ranks were sent TERM when it died (see `launch.jobs`): a save may be under way.
    record = folder.read()
    deadline_s = time.monotonic() + record.signal_lead_s
    while folder.living() and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    for process in folder.living():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    outcome = folder.run.read_outcome() if record.trains else None
    if outcome is None:
        outcome = Outcome(
            outcome="failed",
            exit_code=LostRankError.exit_code,
            step=-1,
            message=f"its supervisor (process {job_id}) was killed; {folder.supervisor_log} ends where it did",
        )
    folder.settle(outcome)
    return outcome


def _show_other_logs(folder: JobFolder, job_id: str) -> None:
    for rank in range(1, folder.read().processes):
        path = folder.rank_log(job_id, rank)
        lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:] if path.exists() else []
        if lines:
            console.say("\n".join([f"--- end of {path}", *lines, "---"]))
