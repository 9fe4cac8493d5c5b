"""The process that starts the ranks of a local job, and ends them together.

Submitit's own local controller dies of USR2, leaves the peers of a dead rank waiting for ever and calls a job finished
whose rank was killed. This one is the parent of every rank, so it knows each exit code, does not depend on a rank whose
main thread is stuck in a collective, and writes how the job ended.

Signals to it: USR2 and TERM go on to the ranks (save and leave), INT ends the job at once.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launch.folder import JobFolder, JobRecord
from launch.jobs import JOB_SIGNALS, STACKS_SIGNAL
from mimscale.errors import INTERRUPTED_EXIT_CODE, LaunchError, LostRankError
from mimscale.train.run_dir import Outcome, OutcomeName, RunDir
from mimscale.world import Process

POLL_S = 0.1
STACKS_S = 1.0  # for the stacks of a stuck rank to reach its log
INTERRUPTED_GRACE_S = 300.0  # rank 0 may prune old checkpoints long after the others have left
SUBMITIT_REQUEUE_CODE = 144  # Submitit's handler, when a stop comes before `RunVerb` has put its own in place

# Of several ranks that failed by themselves, the one whose code says most is the cause; the others lost a peer: 6 and 1
# are what a rank ends with that a peer has left.
CAUSES_FIRST = (2, 3, 4, 5)
CONSEQUENCES = (LostRankError.exit_code, 1)


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    pid: int
    code: int  # exit code; minus the signal's number when a signal ended it
    ended_by_us: bool = False  # we killed it, because another rank was gone or time was up


def verdict(ends: Sequence[RankEnd], *, stop_sent: bool, killed_because: str | None) -> tuple[int, str]:
    """The job's exit code, and why, from the ends of all its ranks.

    Args:
        ends: one a rank.
        stop_sent: the ranks were asked to save and leave.
        killed_because: why we ended ranks that no other rank's end explains (time limit, cancelled).
    """
    own = [end for end in ends if not end.ended_by_us]
    early = {-signal.SIGUSR2, -signal.SIGTERM, SUBMITIT_REQUEUE_CODE} if stop_sent else set()
    lost = [end for end in own if end.code < 0 and end.code not in early]
    if lost:
        names = ", ".join(f"rank {end.rank} (process {end.pid}) by {signal.Signals(-end.code).name}" for end in lost)
        oom = "; SIGKILL from outside is often the kernel out of memory" if lost[0].code == -signal.SIGKILL else ""
        return LostRankError.exit_code, f"killed: {names}{oom}; the same command continues from the newest checkpoint"
    codes = {end.code: end for end in reversed(own)}  # of one code the lowest rank
    unusual = sorted(codes.keys() - {0, INTERRUPTED_EXIT_CODE, *CAUSES_FIRST, *CONSEQUENCES} - early)
    for code in (*CAUSES_FIRST, *unusual, *CONSEQUENCES):
        if code in codes:
            end = codes[code]
            return code, f"rank {end.rank} (process {end.pid}) failed with exit code {code}; its log says why"
    if INTERRUPTED_EXIT_CODE in codes or codes.keys() & early:
        return INTERRUPTED_EXIT_CODE, "stopped with everything saved; the same command continues"
    if len(own) < len(ends):
        return LostRankError.exit_code, killed_because or "ranks did not end"
    return 0, ""


class Supervisor:
    """Starts the ranks of one job on this machine and watches them until the last has ended."""

    def __init__(self, folder: JobFolder, record: JobRecord, command: Sequence[str]) -> None:
        self._folder = folder
        self._record = record
        self._command = command
        self._started_s = time.monotonic()
        self._requests: list[signal.Signals] = []
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._ends: dict[int, RankEnd] = {}
        self._stop_sent = False
        self._deadline_s = float("inf")  # when the ranks that are left are killed
        self._killed_because: str | None = None

    def run(self) -> int:
        """Run the job to its end; returns its exit code."""
        for number in JOB_SIGNALS:
            signal.signal(number, self._remember)
        # `submit` started us with these blocked, so that an early one does not kill us. Ranks inherit the mask.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
        for rank in range(self._record.processes):
            self._ranks.append(self._start(rank))
        self._folder.write_ranks(Process.of(process.pid) for process in self._ranks)
        _say(f"started ranks as processes {', '.join(str(process.pid) for process in self._ranks)}")
        while len(self._ends) < len(self._ranks):
            self._reap()
            self._pass_on_requests()
            self._watch_the_clock()
            if time.monotonic() >= self._deadline_s:
                self._kill_the_rest()
            time.sleep(POLL_S)
        code, message = verdict(
            list(self._ends.values()), stop_sent=self._stop_sent, killed_because=self._killed_because
        )
        _say(f"ended with exit code {code}{': ' if message else ''}{message}")
        self._record_outcome(code, message)
        return code

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._requests.append(signal.Signals(number))

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        job_id = str(os.getpid())
        # What submitit.JobEnvironment reads.
        place = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOG_LEVEL": "WARNING",  # rank 0's log is what a person reads
            "SUBMITIT_LOCAL_JOB_ID": job_id,
            "SUBMITIT_LOCAL_NTASKS": str(self._record.processes),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
        }
        with self._folder.rank_log(job_id, rank).open("ab") as log:
            return subprocess.Popen(
                self._command,
                env={**os.environ, **place},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its loader workers can be ended with it, as one group
            )

    def _reap(self) -> None:
        for rank, process in enumerate(self._ranks):
            if rank in self._ends or process.poll() is None:
                continue
            end = RankEnd(rank=rank, pid=process.pid, code=process.returncode)
            self._ends[rank] = end
            _signal_group(process.pid, signal.SIGKILL)  # loader workers that outlived it
            if end.code == 0:
                continue  # rank 0 may have more to do than the others
            grace_s = self._record.lost_rank_grace_s
            if end.code == INTERRUPTED_EXIT_CODE or (self._stop_sent and end.code in (SUBMITIT_REQUEUE_CODE,)):
                grace_s = max(grace_s, INTERRUPTED_GRACE_S)
            _say(f"rank {rank} (process {process.pid}) ended with {end.code}; the others have {grace_s:.0f} s")
            self._deadline_s = min(self._deadline_s, time.monotonic() + grace_s)

    def _pass_on_requests(self) -> None:
        while self._requests:
            number = self._requests.pop(0)
            if number == signal.SIGINT:
                self._killed_because = "ended at once by SIGINT; the newest checkpoint is where the run continues"
                self._deadline_s = time.monotonic()
                continue
            self._send_stop(number)

    def _watch_the_clock(self) -> None:
        if self._record.timeout_min is None:
            return
        left_s = self._record.timeout_min * 60 - (time.monotonic() - self._started_s)
        if left_s <= self._record.signal_lead_s and not self._stop_sent:
            _say(f"{left_s:.0f} s to the time limit")
            self._send_stop(signal.SIGUSR2)
        if left_s <= 0 and self._deadline_s == float("inf"):
            self._killed_because = (
                f"not stopped {self._record.signal_lead_s:.0f} s after the signal before the time limit of "
                f"{self._record.timeout_min:g} min; raise signal_lead_s in the profile"
            )
            self._deadline_s = time.monotonic()

    def _send_stop(self, number: signal.Signals) -> None:
        _say(f"passing {number.name} on to the ranks")
        self._stop_sent = True
        for rank, process in enumerate(self._ranks):
            if rank not in self._ends:
                process.send_signal(number)

    def _kill_the_rest(self) -> None:
        left = [rank for rank in range(len(self._ranks)) if rank not in self._ends]
        _say(f"killing ranks {left}; their logs hold the stack of every thread")
        for rank in left:
            self._ranks[rank].send_signal(STACKS_SIGNAL)
        time.sleep(STACKS_S)
        for rank in left:
            process = self._ranks[rank]
            ended_by_us = process.poll() is None or process.returncode == -STACKS_SIGNAL
            _signal_group(process.pid, signal.SIGKILL)
            self._ends[rank] = RankEnd(rank=rank, pid=process.pid, code=process.wait(), ended_by_us=ended_by_us)

    def _record_outcome(self, code: int, message: str) -> None:
        names: dict[int, OutcomeName] = {0: "finished", INTERRUPTED_EXIT_CODE: "interrupted"}
        outcome = Outcome(outcome=names.get(code, "failed"), exit_code=code, step=-1, message=message)
        if self._record.trains:
            written = self._folder.run.read_outcome()  # submission removed that of the job before
            if written and self._agrees(written, code):
                outcome = written
            else:
                outcome = replace(outcome, step=_last_step(self._folder.run))
        self._folder.settle(outcome)

    def _agrees(self, written: Outcome, code: int) -> bool:
        # What training wrote, with its step and reason, stands unless the ranks tell another story. A rank that is gone
        # is better named by us: the others only know that they lost somebody. When all left with that code nobody is
        # gone: their watchdogs gave up together, and say where they stood.
        ends_well = {end.code for end in self._ends.values()} <= {0, INTERRUPTED_EXIT_CODE}
        gave_up = {end.code for end in self._ends.values() if not end.ended_by_us} == {LostRankError.exit_code}
        return ends_well or (written.exit_code == code and (gave_up or code != LostRankError.exit_code))


def _last_step(run: RunDir) -> int:
    steps = [line["step"] for line in run.read_metrics() if "step" in line]
    return int(steps[-1]) if steps else 0


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def main(argv: list[str]) -> int:
    """`python -m launch.supervise FOLDER COMMAND`: run the job in FOLDER, each rank by COMMAND."""
    folder, command = argv
    job = JobFolder(Path(folder))
    try:  # Submitit's pickle of the task appears while the ranks start
        job.run.refuse_foreign([job.path, job.run.code], LaunchError)
    except LaunchError as error:
        _say(str(error))
        job.settle(Outcome(outcome="failed", exit_code=error.exit_code, step=-1, message=str(error)))
        return error.exit_code
    return Supervisor(job, job.read(), shlex.split(command)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
