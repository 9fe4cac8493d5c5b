"""Each start and end of a job that Slurm runs: the facts that decide whether it may start again.

A start whose end is missing was ended from outside: the node failed, or Slurm killed the job before its batch script
could say anything.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mimscale import durable

Cause = Literal["preempted", "time limit", "stopped", "lost rank", "requeued from outside", "ended"]
MAX_IDLE_RESTARTS = 3  # in a row without a new committed step


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a job, and its end once that is known."""

    job_id: str
    number: int  # restarts before it
    started_unix_s: float
    first_step: int  # newest committed step when it started; where nothing is trained, the number of finished parts
    last_step: int | None = None  # and when it ended
    cause: Cause | None = None  # of its end
    message: str = ""

    @property
    def made_progress(self) -> bool:
        """True when it has ended at a later step, or with more parts, than it began."""
        return self.last_step is not None and self.last_step > self.first_step


def read_attempts(file: Path) -> list[Attempt]:
    """All attempts, oldest first. A line cut short by a kill is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [Attempt(**json.loads(line)) for line in lines if line.endswith("\n")]


def begin_attempt(file: Path, job_id: str, reached: int) -> list[Attempt]:
    """Add an attempt that starts now; returns all."""
    attempts = _begun(read_attempts(file), job_id, reached)
    write_attempts(file, attempts)
    return attempts


def end_attempt(file: Path, job_id: str, reached: int, cause: Cause, message: str) -> list[Attempt]:
    """Complete the newest attempt; returns all."""
    attempts = with_end(read_attempts(file), job_id, reached, cause, message)
    write_attempts(file, attempts)
    return attempts


def with_end(attempts: list[Attempt], job_id: str, reached: int, cause: Cause, message: str) -> list[Attempt]:
    """The attempts with the newest completed. A start that was killed before it was written down counts as one."""
    if not attempts or attempts[-1].cause is not None:
        attempts = _begun(attempts, job_id, reached)
    *before, last = attempts
    return [*before, replace(last, last_step=reached, cause=cause, message=message)]


def _begun(attempts: list[Attempt], job_id: str, reached: int) -> list[Attempt]:
    if attempts and attempts[-1].last_step is None:  # ended from outside: what it committed is what is there now
        attempts = [*attempts[:-1], replace(attempts[-1], last_step=reached)]
    start = Attempt(job_id=job_id, number=len(attempts), started_unix_s=time.time(), first_step=reached)
    return [*attempts, start]


def why_not_again(attempts: Sequence[Attempt], max_requeues: int | None, *, trains: bool = True) -> str | None:
    """None when the job may start again after these attempts, else the reason in words.

    Preemptions and what an administrator does count for nothing: they end, and say nothing about the job.

    Args:
        attempts: all that have ended, oldest first.
        max_requeues: restarts that are allowed in all; None for no limit.
        trains: progress is a committed step; else a finished part of what is made.
    """
    own = [attempt for attempt in attempts if attempt.cause not in ("preempted", "requeued from outside")]
    if max_requeues is not None and len(own) > max_requeues:
        return f"slurm.max_requeues={max_requeues} is used up; `mimscale resume` goes on"
    idle = 0
    for attempt in reversed(own):
        if attempt.number == 0 or attempt.made_progress:
            break
        idle += 1
    if idle < MAX_IDLE_RESTARTS:
        return None
    causes = [f"{attempt.cause or 'killed from outside'}: {attempt.message}".rstrip(": ") for attempt in own[-idle:]]
    reached = own[-1].first_step
    progress = f"committed step after step {reached}" if trains else f"finished part ({reached} are)"
    return (
        f"crash loop: {idle} restarts in a row without a new {progress} "
        f"({'; '.join(dict.fromkeys(causes))}); put the cause right (a time limit or grace period shorter than a save, "
        "a bad node, memory), then `mimscale resume`"
    )


def write_attempts(file: Path, attempts: Sequence[Attempt]) -> None:
    """Replace the file."""
    durable.write_text(file, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))
