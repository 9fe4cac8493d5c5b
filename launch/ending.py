"""How the ranks of a Slurm job ended, and what follows from it: decided from facts alone, nobody is asked here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from launch.attempts import Cause
from launch.srun_log import FirstEnd
from mimscale.errors import (
    INTERRUPTED_EXIT_CODE,
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    LostRankError,
)
from mimscale.train.run_dir import Outcome

# The same again would fail the same way.
LASTING_FAILURES = tuple(error.exit_code for error in (ConfigError, DataError, CheckpointError, LaunchError))


@dataclass(frozen=True, kw_only=True)
class SlurmView:
    """What Slurm says about a job whose ranks have ended."""

    state: str  # of squeue, by its long name
    preempted: bool
    restarts: int  # so far; more than we know of when Slurm has requeued it meanwhile
    reason: str = ""

    @classmethod
    def of(cls, shown: Mapping[str, str]) -> "SlurmView":
        """Read what `scontrol show job` prints."""
        state = shown.get("JobState", "")
        preempt_time = shown.get("PreemptTime", "None")
        return cls(
            state=state,
            preempted=state == "PREEMPTED" or preempt_time not in ("None", "Unknown", "N/A", ""),
            restarts=int(shown.get("Restarts", "0")),
            reason=shown.get("Reason", ""),
        )

    def is_requeued(self, restart: int) -> bool:
        """Whether Slurm has queued the job again since its restart number `restart` began."""
        return self.restarts > restart or self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows the end of the ranks."""

    action: Literal["settle", "again", "leave"]  # leave: Slurm has requeued the job itself
    cause: Cause
    outcome: Outcome


def decide(outcome: Outcome, slurm: SlurmView, *, restart: int, cancelled: bool) -> Decision:
    """What follows the end of the ranks.

    Args:
        outcome: how they ended, by `rank_outcome`.
        slurm: what the controller says.
        restart: how often Slurm had restarted the job when the ranks began.
        cancelled: somebody asked for the end of the job with `mimscale cancel`.
    """
    if outcome.exit_code == 0:
        return Decision(action="settle", cause="ended", outcome=outcome)
    if cancelled:
        return Decision(
            action="settle", cause="stopped", outcome=saying(outcome, "cancelled; `mimscale resume` goes on")
        )
    if slurm.is_requeued(restart):
        return Decision(action="leave", cause="requeued from outside", outcome=saying(outcome, "requeued by Slurm"))
    if slurm.preempted:
        return Decision(action="again", cause="preempted", outcome=saying(outcome, "preempted"))
    if slurm.state in ("TIMEOUT", "DEADLINE") or slurm.reason == "TimeLimit":
        return Decision(action="again", cause="time limit", outcome=saying(outcome, "cut off by the time limit"))
    # While its script still runs a job is completing only when somebody ends it, and this is the only way that is left.
    if slurm.state in ("CANCELLED", "COMPLETING"):
        return Decision(action="settle", cause="stopped", outcome=saying(outcome, "cancelled with scancel"))
    if outcome.exit_code == INTERRUPTED_EXIT_CODE:
        if outcome.stopped_by == "SIGTERM":
            why = "stopped by a TERM that was no preemption; `mimscale resume` goes on"
            return Decision(action="settle", cause="stopped", outcome=saying(outcome, why))
        return Decision(action="again", cause="time limit", outcome=outcome)
    if outcome.exit_code in LASTING_FAILURES:
        return Decision(action="settle", cause="ended", outcome=outcome)
    return Decision(action="again", cause="lost rank", outcome=outcome)


def rank_outcome(
    written: Outcome | None, srun_code: int, first: FirstEnd | None, *, trains: bool, step: int, message: str = ""
) -> Outcome:
    """How the ranks ended: what training wrote; where it wrote nothing, what srun says.

    Args:
        written: outcome.json of this attempt, or None. It stands whatever came later: all that matters is on disk.
        srun_code: 128 + signal when a signal ended a rank. Ranks that train and were interrupted together leave with
            0, because srun would kill the others when one leaves with another code.
        first: the first rank that failed.
        message: what that rank printed.
        trains: only training writes an outcome.
        step: newest committed step.
    """
    if written is not None:
        return written
    if srun_code == 0 and trains:
        return Outcome(
            outcome="interrupted", exit_code=INTERRUPTED_EXIT_CODE, step=step, message="stopped before training began"
        )
    if srun_code == 0:
        return Outcome(outcome="finished", exit_code=0, step=-1)
    if INTERRUPTED_EXIT_CODE in (srun_code, first.code if first else None):  # srun kills the others with the first
        return Outcome(outcome="interrupted", exit_code=INTERRUPTED_EXIT_CODE, step=step, message="stopped by request")
    who = f"rank {first.rank} on {first.node}" if first else "a rank"
    code = first.code if first else srun_code
    if code is None or code > 128:
        how = first.how if first else f"killed by signal {srun_code - 128}"
        text = f"{who}: {how}; its log ends where it happened"
        return Outcome(outcome="failed", exit_code=LostRankError.exit_code, step=step, message=text)
    text = f"{who} failed with exit code {code}: {message or 'see its log'}"
    return Outcome(outcome="failed", exit_code=code, step=step, message=text)


def setup_outcome(code: int, *, step: int, message: str) -> Outcome:
    """How a batch script ended that could not start its ranks: no module, no file of the site, nothing unpacked.

    Args:
        code: of the command that failed; 128 + signal when a signal ended it, and then another try may go well.
        step: newest committed step.
        message: what that command printed.
    """
    killed = code > 128
    why = f"killed by signal {code - 128}" if killed else message or f"exit code {code}; see the log"
    exit_code = LostRankError.exit_code if killed else code
    return Outcome(outcome="failed", exit_code=exit_code, step=step, message=f"before its ranks started: {why}")


def saying(outcome: Outcome, message: str) -> Outcome:
    """The outcome with a further message."""
    told = f"{outcome.message}; {message}" if outcome.message else message
    return replace(outcome, message=told)
