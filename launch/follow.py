"""`submit --wait`: show what rank 0 prints, pass signals on, and leave with the job's exit code."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from launch.folder import JobFolder
from launch.jobs import JOB_SIGNALS
from mimscale import console
from mimscale.errors import INTERRUPTED_EXIT_CODE, LostRankError
from mimscale.train.run_dir import Outcome

POLL_S = 0.2
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


class _Log:
    """A growing file, copied to stderr."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shown_bytes = 0

    def show_new(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._shown_bytes)
            text = file.read()
        self._shown_bytes += len(text)
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()


def follow(folder: JobFolder, job_id: str) -> int:
    """Stay with a local job until it has ended; returns its exit code.

    The first Ctrl-C lets the job save and stop, the second ends it at once. USR2 and TERM are passed on.
    """
    supervisor = folder.read().supervisor
    assert supervisor is not None, f"{folder.path}: no supervisor in job.json"
    log = _Log(folder.rank_log(job_id, 0))
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
