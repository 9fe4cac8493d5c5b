"""`mimscale status`: what runs are doing, from Slurm's queue, its accounts, and what the runs say themselves.

The queue is asked once for all runs. Where Slurm keeps no accounts, or does not answer, a run's own files have to do:
`outcome.json` says how it ended, the heartbeat when it last made a step.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import slurm_commands
from launch.folder import BESIDE, JobFolder, JobRecord, job_folders
from launch.requeue import committed_step
from launch.slurm_commands import QueuedJob, SlurmSilentError
from mimscale import console
from mimscale.errors import ConfigError
from mimscale.train.health_log import HealthLog
from mimscale.train.run_dir import Outcome, RunDir

WATCH_EVERY_S = 10.0
STALE_HEARTBEAT_S = 300.0
NEVER_STARTS = "never starts"  # so begins the reason of a job whose parent did not finish
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One submission of a run as a person wants to see it."""

    run_dir: str
    verb: str
    job_id: str | None
    state: str  # queued, running, finished, interrupted, failed, cancelled, lost, unknown, none
    reason: str
    step: int | None
    steps: int | None
    samples_per_s: float | None
    heartbeat_age_s: float | None
    last_checkpoint: int | None  # step
    restarts: int
    nodes: str
    log: str | None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What Slurm said, once for all runs."""

    jobs: dict[str, QueuedJob]
    ended: dict[str, str]  # job id -> state, of sacct
    silent: str | None = None  # why it said nothing


def expand(paths: Sequence[Path]) -> list[RunDir]:
    """The run directories that paths name: themselves, or those in a folder that holds some.

    Raises:
        ConfigError: a path that is neither.
    """
    runs: list[RunDir] = []
    for path in (Path(os.path.abspath(path)) for path in paths):  # `..` and `.` gone, links as they are
        found = [run for place in (path, path.with_name(path.name + BESIDE)) if (run := _as_run(place))]
        if not found and path.is_dir():
            children = sorted(child for child in path.iterdir() if child.is_dir())
            found = [run for child in children if (run := _as_run(child))]
        if not found:
            raise ConfigError(f"{path}: no run directory, and none in it; give the run_dir of a run that was submitted")
        runs += found
    return list({run.path: run for run in runs}.values())


def _as_run(path: Path) -> RunDir | None:
    run = RunDir(path)
    return run if run.logs.is_dir() or run.config.is_file() else None


def submissions_to_show(run: RunDir) -> list[JobFolder]:
    """The newest submission of a run, and any before it that is not over."""
    folders = job_folders(run.logs)
    return [folder for folder in folders[:-1] if folder.read_outcome() is None] + folders[-1:]


def ask_cluster(folders: Iterable[JobFolder]) -> Cluster:
    """One question to the queue, and one to the accounts about what the queue has forgotten."""
    records = [folder.read() for folder in folders if folder.read_outcome() is None]
    batch = [record for record in records if record.executor == "slurm"]
    if not batch:
        return Cluster(jobs={}, ended={})
    try:
        jobs = slurm_commands.queue(record.user for record in batch)
    except SlurmSilentError as error:
        return Cluster(jobs={}, ended={}, silent=str(error))
    known = {job_id.partition("_")[0] for job_id in jobs}
    forgotten = [record for record in batch if record.job_id is not None and record.job_id not in known]
    if not forgotten:
        return Cluster(jobs=jobs, ended={})
    since = min(record.submitted_utc for record in forgotten)[:10]
    return Cluster(jobs=jobs, ended=slurm_commands.accounting((str(r.job_id) for r in forgotten), since))


def status_of(run: RunDir, folder: JobFolder | None, cluster: Cluster, now_unix_s: float) -> RunStatus:
    """What one submission of a run is doing."""
    beat = _read_json(run.heartbeat)
    record = folder.read() if folder else None
    if folder is None or record is None:
        outcome = run.read_outcome()
        state, reason = (outcome.outcome, outcome.message) if outcome else ("none", "was not submitted")
    elif (outcome := folder.read_outcome()) is not None:
        state, reason = _ended(folder, outcome)
    elif record.executor == "slurm":
        state, reason = _of_batch_job(folder, record, cluster)
    else:
        state, reason = _of_local_job(folder, record)
    age_s = now_unix_s - beat["time_s"] if "time_s" in beat else None
    if state == "running" and age_s is not None and age_s > STALE_HEARTBEAT_S:
        reason = "; ".join(filter(None, (reason, f"no step for {age_s:.0f} s")))
    if state == "running" and (events := HealthLog(run.health).read()):
        last = events[-1]
        reason = "; ".join(filter(None, (reason, f"health: {last['event']} at step {last['step']}")))
    queued = folder.queued(cluster.jobs) if folder else []
    return RunStatus(
        run_dir=str(run.path),
        verb=record.verb if record else "",
        job_id=record.job_id if record else None,
        state=state,
        reason=reason,
        step=beat.get("step"),
        steps=beat.get("steps"),
        samples_per_s=beat.get("samples_per_s") if state == "running" else None,
        heartbeat_age_s=None if age_s is None else round(age_s, 1),
        last_checkpoint=committed_step(run) or None,
        restarts=_restarts(folder),
        nodes=",".join(sorted({job.nodes for job in queued if job.nodes and job.state == "RUNNING"})),
        log=str(folder.rank_log(record.job_id, 0)) if folder and record and record.job_id else None,
    )


def _ended(folder: JobFolder, outcome: Outcome) -> tuple[str, str]:
    if folder.cancelled.exists() and outcome.exit_code:
        return "cancelled", outcome.message
    return outcome.outcome, outcome.message


def _of_batch_job(folder: JobFolder, record: JobRecord, cluster: Cluster) -> tuple[str, str]:
    if cluster.silent:
        return "unknown", f"Slurm does not answer ({cluster.silent}); step and heartbeat are the run's own"
    jobs = folder.queued(cluster.jobs)
    active = [job for job in jobs if job.is_active]
    if active:
        return _of_active(active, record)
    if jobs:  # ended a moment ago
        states = {job.state for job in jobs}
    else:
        ended = {job_id: state for job_id, state in cluster.ended.items() if record.job_id == job_id.partition("_")[0]}
        states = set(ended.values())
    name = f"job {record.job_id}" if record.job_id else "the submission"
    if any(state.startswith("CANCELLED") for state in states):
        return "cancelled", f"Slurm cancelled {name} before it could say anything"
    if states:
        return "lost", f"{name} is {', '.join(sorted(states))} for Slurm and left no outcome; `mimscale resume` goes on"
    return "lost", f"{name} is not in the queue and left no outcome; `mimscale resume` goes on"


def _of_active(jobs: list[QueuedJob], record: JobRecord) -> tuple[str, str]:
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job.state.lower()] = counts.get(job.state.lower(), 0) + 1
    text = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) if record.array else ""
    reasons = sorted({job.reason for job in jobs if job.state in WAITING and job.reason})
    if "DependencyNeverSatisfied" in reasons:
        return "queued", f"{NEVER_STARTS}: {record.after} did not finish; resume that, or `mimscale cancel` this"
    waiting = f"waits for {', '.join(reasons)}" if reasons else ""
    running = [job for job in jobs if job.state not in WAITING]
    left = f"{running[0].time_left} left" if running and not record.array else ""
    return ("running" if running else "queued"), "; ".join(filter(None, (text, waiting, left)))


def _of_local_job(folder: JobFolder, record: JobRecord) -> tuple[str, str]:
    if folder.living():
        return "running", f"on {record.submitter.host}"
    if record.submitter.host != record.submitter.this().host:
        return "unknown", f"runs on {record.submitter.host}; ask there"
    return "lost", f"its processes are gone; {folder.path} ends where they did"


def _restarts(folder: JobFolder | None) -> int:
    if folder is None:
        return 0
    files = folder.path.glob("attempts*.jsonl")
    return sum(max(0, file.read_text().count("\n") - 1) for file in files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def collect(paths: Sequence[Path]) -> list[RunStatus]:
    """The status of every run that the paths name.

    Raises:
        ConfigError: a path without one.
    """
    shown: list[tuple[RunDir, JobFolder | None]] = []
    for run in expand(paths):
        folders = submissions_to_show(run)
        shown += [(run, folder) for folder in folders] or [(run, None)]
    cluster = ask_cluster(folder for _, folder in shown if folder is not None)
    now_s = time.time()
    return [status_of(run, folder, cluster, now_s) for run, folder in shown]


def _row(status: RunStatus) -> list[str]:
    step = "" if status.step is None else f"{status.step}/{status.steps}"
    speed = "" if status.samples_per_s is None else f"{status.samples_per_s:.1f}"
    beat = "" if status.heartbeat_age_s is None else f"{status.heartbeat_age_s:.0f} s"
    saved = "" if status.last_checkpoint is None else str(status.last_checkpoint)
    restarts = str(status.restarts) if status.restarts else ""
    place = Path(status.run_dir)
    shown = str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else status.run_dir
    head = [shown, status.verb, status.job_id or "", status.state]
    return [*head, step, speed, beat, saved, restarts, status.nodes, status.reason]


COLUMNS = ["run", "verb", "job", "state", "step", "samples/s", "last step", "saved", "restarts", "nodes", "reason"]


def main(argv: list[str]) -> int:
    """`mimscale status [RUN_DIR ...] [--json] [--watch]`."""
    parser = argparse.ArgumentParser(prog="mimscale status", description="What runs are doing.")
    parser.add_argument(
        "run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="runs, or folders of runs (default: .)"
    )
    parser.add_argument("--json", action="store_true", help="one list of objects on stdout")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_EVERY_S:.0f} s until Ctrl-C")
    arguments = parser.parse_args(argv)
    paths = arguments.run_dirs or [Path.cwd()]
    while True:
        statuses = collect(paths)
        if arguments.json:
            console.print_json([asdict(status) for status in statuses])
        else:
            if arguments.watch and sys.stderr.isatty():
                console.human().clear()
            rows = [_row(status) for status in statuses]
            used = [index for index, name in enumerate(COLUMNS) if name == "state" or any(row[index] for row in rows)]
            title, names = time.strftime("%H:%M:%S"), [COLUMNS[index] for index in used]
            console.print_table(title, names, [[row[index] for index in used] for row in rows])
        if not arguments.watch:
            return 0
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return 0
