"""Slurm's commands: called with a time limit, and their output read. Nothing here decides anything."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimscale.errors import LaunchError

# What points to the cluster, and is no trace of an allocation.
CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
SLURM_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
ACTIVE_STATES = frozenset(
    {
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
    }
)
QUERY_S = 8.0  # a busy controller answers in one or two
SUBMIT_S = 90.0  # sbatch itself waits for a controller that does not answer
LOST_ID_S = 30.0  # how long a submission whose answer got lost is looked for
# Commands may say these after the controller has done what they ask for.
LOST_ANSWERS = ("Socket timed out", "Zero Bytes were transmitted", "Transport endpoint", "Unexpected message received")
# scancel's words about what has ended since it was listed.
ENDED_MEANWHILE = ("already completing or completed", "Invalid job id specified")
UNREACHABLE = "unable to contact"
_QUEUE_FORMAT = "%i|%A|%u|%T|%r|%N|%L|%j"  # the name last: it may hold a bar
_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9_/:]*)=(\S*)")


class SlurmSilentError(LaunchError):
    """A command of Slurm that is missing, fails, or does not answer in time."""


class UnreachableError(SlurmSilentError):
    """The controller was not reached: nothing was done, and may be done later."""


class LostAnswerError(SlurmSilentError):
    """The controller did not answer: it may or may not have done what it was told."""


class LostSubmissionError(SlurmSilentError):
    """A job that may or may not be queued."""


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """One line of squeue."""

    job_id: str  # 12, or 12_3 of an array
    raw_id: str  # the number that Slurm itself uses: task 3 of array 12 may be 15
    user: str
    state: str
    reason: str
    nodes: str
    time_left: str
    name: str

    @property
    def is_active(self) -> bool:
        """True while it waits, runs, or is being ended."""
        return self.state in ACTIVE_STATES


def without_allocation(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those of an allocation, which would change what a command or a job of ours asks for."""
    return {
        name: value
        for name, value in environment.items()
        if name in CLUSTER_VARIABLES or not name.startswith(SLURM_PREFIXES)
    }


def call(command: Sequence[str], timeout_s: float = QUERY_S) -> str:
    """Standard output of one of Slurm's commands.

    Raises:
        UnreachableError: nothing was done.
        LostAnswerError: nobody knows whether it was done.
        SlurmSilentError: it is not there, or fails.
    """
    try:
        done = subprocess.run(
            command,
            env=without_allocation(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmSilentError(f"no {command[0]} on PATH; load the site's Slurm module") from None
    except subprocess.TimeoutExpired:
        raise LostAnswerError(f"{command[0]} gave no answer in {timeout_s:.0f} s; is the controller up?") from None
    if done.returncode:
        complaint = " ".join(done.stderr.split())
        kind = SlurmSilentError
        if any(text in complaint for text in LOST_ANSWERS):
            kind = LostAnswerError
        elif UNREACHABLE in complaint.lower():
            kind = UnreachableError
        raise kind(f"{command[0]} failed: {complaint or done.returncode}")
    return done.stdout


def queue(users: Iterable[str]) -> dict[str, QueuedJob]:
    """Every job of these users that the controller still knows, by id: one call, however many there are.

    Raises:
        SlurmSilentError: the controller does not answer.
    """
    words = ["squeue", "--noheader", "--array", "--states=all", f"--format={_QUEUE_FORMAT}"]
    return read_queue(call([*words, f"--user={','.join(sorted(set(users)))}"]))


def read_queue(text: str) -> dict[str, QueuedJob]:
    """The jobs of squeue's output."""
    jobs = {}
    for line in text.splitlines():
        if line.count("|") < 7:
            continue
        job_id, raw_id, user, state, reason, nodes, time_left, name = line.split("|", 7)
        jobs[job_id] = QueuedJob(
            job_id=job_id,
            raw_id=raw_id,
            user=user,
            state=state,
            reason="" if reason == "None" else reason,
            nodes=nodes,
            time_left=time_left,
            name=name,
        )
    return jobs


def accounting(job_ids: Iterable[str], since: str) -> dict[str, str]:
    """Job id -> state of jobs that the controller has forgotten; empty where a cluster keeps no accounts.

    Args:
        job_ids: as squeue writes them.
        since: ISO time before which a job with one of these ids is another, of before the counter was set back.
    """
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--starttime={since}"]
    try:
        return read_accounting(call([*words, f"--jobs={','.join(job_ids)}"]))
    except SlurmSilentError:
        return {}


def read_accounting(text: str) -> dict[str, str]:
    """The states of sacct's output; `CANCELLED by 1000` counts as CANCELLED."""
    lines = (line.split("|", 1) for line in text.splitlines() if "|" in line)
    return {job_id: state.split()[0] for job_id, state in lines if state}


def show_job(job_id: str) -> dict[str, str]:
    """What the controller knows about a job, by scontrol's names (`JobState`, `PreemptTime`, `Restarts`).

    Raises:
        SlurmSilentError: the controller does not answer or has forgotten the job.
    """
    return dict(_PAIR.findall(call(["scontrol", "--oneliner", "show", "job", job_id])))


def partition_facts(partition: str | None) -> dict[str, str]:
    """What the controller knows about a partition, by scontrol's names; empty when nobody answers.

    Args:
        partition: None for the cluster's default.
    """
    try:
        shown = call(["scontrol", "--oneliner", "show", "partition", *([partition] if partition else [])])
    except SlurmSilentError:
        return {}
    known: list[dict[str, str]] = [dict(_PAIR.findall(line)) for line in shown.splitlines()]
    return next((facts for facts in known if partition or facts.get("Default") == "YES"), {})


def preempt_mode(partition: str) -> str:
    """What a preemption does to jobs of a partition: REQUEUE, CANCEL, SUSPEND or OFF; empty when nobody answers."""
    return partition_facts(partition).get("PreemptMode", "")


def partitions() -> dict[str, float | None]:
    """Partition -> longest time limit in minutes, None without one.

    Raises:
        SlurmSilentError: the controller does not answer.
    """
    lines = (line.split("|") for line in call(["sinfo", "--noheader", "--format=%R|%l"]).splitlines() if "|" in line)
    return {name: limit_minutes(limit) for name, limit in lines}


def limit_minutes(text: str) -> float | None:
    """Slurm's `[D-]H:M:S`, `M:S` or `M` in minutes; None for `infinite` and what is no time."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        return None
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) < 3:
        numbers = [0, *numbers, *([0] if len(numbers) == 1 else [])]
    hours, minutes, seconds = numbers
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def requeue(job_id: str) -> None:
    """Let a job start again under its id.

    Args:
        job_id: its number; of a task of an array `12_3`.

    Raises:
        SlurmSilentError: the controller refuses or does not answer.
    """
    call(["scontrol", "requeue", job_id], timeout_s=SUBMIT_S)


def after_success(job_ids: Sequence[str]) -> str:
    """A dependency: start when all of these jobs have ended well."""
    return f"afterok:{':'.join(job_ids)}"


def set_dependency(job_id: str, dependency: str) -> None:
    """Let a waiting job wait for something else.

    Raises:
        SlurmSilentError: the controller refuses or does not answer.
    """
    call(["scontrol", "update", f"JobId={job_id}", f"Dependency={dependency}"])


def cancel(job_id: str, *options: str) -> None:
    """`scancel`.

    Args:
        job_id: a job; of an array all tasks, or one as `12_3`.
        options: which of them, and with which signal.

    Raises:
        SlurmSilentError: the controller refuses or does not answer.
    """
    call(["scancel", *options, job_id])


def require_sbatch() -> None:
    """Raise LaunchError unless this machine can submit."""
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "no sbatch on PATH, so nothing can be submitted to Slurm from here; submit from a login node, load the "
            "site's Slurm module, or use --profile local"
        )


def submit(script: Path, environment: Mapping[str, str], job_name: str, *options: str) -> str:
    """Hand a batch script to Slurm; returns the job's id.

    Args:
        script: the batch script.
        environment: what the job inherits.
        job_name: one that no other job has: a submission whose answer gets lost is found by it.
        options: of sbatch, before those of the script.

    Raises:
        LaunchError: it was refused.
        SlurmSilentError: nobody answers, and it is not queued.
        LostSubmissionError: nobody knows whether it was taken.
    """
    require_sbatch()
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=SUBMIT_S, check=False
        )
        complaint = " ".join(done.stderr.split())
        lost = done.returncode != 0 and any(text in complaint for text in LOST_ANSWERS)
    except subprocess.TimeoutExpired:
        complaint, lost, done = f"no answer in {SUBMIT_S:.0f} s", True, None
    if lost:
        return _find_lost(job_name, complaint)
    assert done is not None
    if done.returncode:
        kind = SlurmSilentError if UNREACHABLE in complaint.lower() else LaunchError
        raise kind(f"{_refusal(complaint)} (the script is {script})")
    return str(done.stdout).strip().partition(";")[0]


def _find_lost(job_name: str, complaint: str) -> str:
    deadline_s = time.monotonic() + LOST_ID_S
    while True:
        try:
            found = call(["squeue", "--noheader", f"--name={job_name}", "--format=%F"]).split()
            if found:
                return found[0]
        except SlurmSilentError:
            found = None
        if time.monotonic() > deadline_s:
            break
        time.sleep(1.0)
    if found is None:
        raise LostSubmissionError(
            f"sbatch: {complaint}; Slurm does not answer, so nobody knows whether the job was queued. When it answers "
            f"again, look with `squeue --name={job_name}` and submit again only if nothing is shown"
        )
    raise SlurmSilentError(f"sbatch: {complaint}; the job is not in the queue, submit again")


def _refusal(complaint: str) -> str:
    text = f"sbatch refused the job: {complaint}"
    lower = complaint.lower()
    if "partition" in lower and "account" not in lower:
        try:
            return f"{text}; set slurm.partition in the profile to one of {', '.join(sorted(partitions()))}"
        except SlurmSilentError:
            return f"{text}; set slurm.partition in the profile to one that `sinfo` lists"
    if "account" in lower or "qos" in lower:
        return (
            f"{text}; set slurm.account, slurm.qos and slurm.partition as `sacctmgr show assoc user=$USER` lists them"
        )
    if UNREACHABLE in lower:
        return f"{text}; nothing was queued: submit again when the controller is back"
    return f"{text}; change the profile, or see `sinfo` for what the nodes have"
