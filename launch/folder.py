"""The folder of one submission: what was asked for, who works on it, and how it ended.

    logs/003/                         third submission
      job.json                        what was submitted, by whom, and the process that supervises it
      config.yaml                     the resolved config that the job runs
      profile.yaml                    the profile that it was submitted with
      ranks.json                      the job's processes (on this machine)
      attempts.jsonl                  each start and end of the job (Slurm)
      cancelled.json                  who asked for its end; present before the job hears of it
      submission.sh                   the batch script (Slurm)
      moved-00003.txt                 the job that goes on with a task of a job array which a preemption has cancelled
      task.pkl, task-00003.pkl        what its ranks run, of a job array one a task
      JOBID_submitted.pkl             the same under the name by which Submitit looks for it
      JOBID_0_log.out                 output of rank 0, and so on
      supervisor.log                  what ended the job, in words
      outcome.json                    how it ended; absent while it runs

A folder appears under its name together with its job.json, so two submissions never share one.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import slurm_commands
from launch.slurm_commands import QueuedJob, SlurmSilentError
from mimscale import durable
from mimscale.errors import LaunchError
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.world import Process

BESIDE = ".job"  # suffix of a job's folder beside the folder that it writes
LOST_S = 60.0  # how long a job that is gone may take to show its outcome on a file system that other nodes write to


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What stands in job.json."""

    verb: str
    executor: str
    processes: int  # over all nodes
    master_port: int | None  # None: each start of the job derives another one
    config_hash: str  # of the resolved config
    timeout_min: float | None
    signal_lead_s: float
    lost_rank_grace_s: float
    trains: bool  # the outcome belongs to the run as well
    submitted_utc: str
    submitter: Process
    nodes: int = 1
    folder: str = ""  # working directory of the job, and what relative paths of its config start from
    user: str = ""
    job_name: str = ""  # of Slurm; no other job has it
    kind: str | None = None  # of a verb with kinds: which benchmark
    array: int | None = None  # tasks of a job array
    after: str | None = None  # the submission whose success this one waits for
    partition: str | None = None  # None: the cluster's default
    max_requeues: int | None = None  # restarts that are no preemption; None: as many as make progress
    job_id: str | None = None  # None until the executor has given one
    supervisor: Process | None = None


@dataclass(frozen=True)
class JobFolder:
    """Paths and small files of one submission."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def ranks(self) -> Path:
        """The job's processes."""
        return self.path / "ranks.json"

    @property
    def profile(self) -> Path:
        """The profile that the job was submitted with."""
        return self.path / "profile.yaml"

    @property
    def cancelled(self) -> Path:
        """Who asked for the job's end, and when."""
        return self.path / "cancelled.json"

    def waiting(self) -> "list[JobFolder]":
        """The submissions that wait for this one and are not over."""
        lines = self.dependents.read_text().splitlines() if self.dependents.exists() else []
        children = [JobFolder(Path(line)) for line in dict.fromkeys(lines)]
        return [child for child in children if child.path.exists() and child.read_outcome() is None]

    def add_dependent(self, child: "JobFolder") -> None:
        """Remember that `child` waits for this submission."""
        with self.dependents.open("a") as file:
            file.write(f"{child.path}\n")

    def moved_file(self, task: int) -> Path:
        """The id of the job that goes on with a task of a job array."""
        return self.path / f"moved-{task:05d}.txt"

    def task_job_id(self, task: int | None) -> str:
        """The job's id, or that of one task of a job array."""
        job_id = self.read().job_id
        if task is None:
            return str(job_id)
        moved = self.moved_file(task)
        return f"{moved.read_text() if moved.exists() else job_id}_{task}"

    def unfinished_job_ids(self) -> list[str]:
        """The ids that what waits for this submission has to wait for."""
        array = self.read().array
        if array is None:
            return [self.task_job_id(None)]
        files = {task: self.outcome_file(task) for task in range(array)}
        ends = {task: Outcome(**json.loads(file.read_text())) for task, file in files.items() if file.exists()}
        return [self.task_job_id(task) for task in files if task not in ends or ends[task].exit_code]

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.path / "submission.sh"

    def task_file(self, task: int | None = None) -> Path:
        """Submitit's pickle of what the ranks run."""
        return self.path / ("task.pkl" if task is None else f"task-{task:05d}.pkl")

    @property
    def dependents(self) -> Path:
        """Folders of the submissions that wait for this one, one a line."""
        return self.path / "dependents.txt"

    def outcome_file(self, task: int | None = None) -> Path:
        """How the job, or one task of a job array, ended."""
        return self.path / ("outcome.json" if task is None else f"outcome-{task:05d}.json")

    def attempts_file(self, task: int | None = None) -> Path:
        """The starts and ends of the job, or of one task of a job array."""
        return self.path / ("attempts.jsonl" if task is None else f"attempts-{task:05d}.jsonl")

    @property
    def supervisor_log(self) -> Path:
        """What the supervisor did."""
        return self.path / "supervisor.log"

    def rank_log(self, job_id: str, rank: int) -> Path:
        """Output of a rank, where Submitit's own tools look for it."""
        return self.path / f"{job_id}_{rank}_log.out"

    def read(self) -> JobRecord:
        """What was submitted."""
        tree = json.loads((self.path / "job.json").read_text())
        for key in ("submitter", "supervisor"):
            tree[key] = None if tree[key] is None else Process(**tree[key])
        return JobRecord(**tree)

    def write(self, record: JobRecord) -> None:
        """Replace job.json."""
        durable.write_json(self.path / "job.json", asdict(record))

    def read_outcome(self) -> Outcome | None:
        """How the job ended, or None while it has not. A job array has ended when each of its tasks has."""
        if self.outcome_file().exists():
            return Outcome(**json.loads(self.outcome_file().read_text()))
        tasks = self.read().array
        files = [self.outcome_file(task) for task in range(tasks or 0)]
        if not files or not all(file.exists() for file in files):
            return None
        ends = [Outcome(**json.loads(file.read_text())) for file in files]
        bad = [(task, end) for task, end in enumerate(ends) if end.exit_code]
        if not bad:
            return ends[0]
        task, end = bad[0]
        message = f"{len(bad)} of {len(ends)} tasks did not finish; task {task}: {end.message}"
        return Outcome(outcome=end.outcome, exit_code=end.exit_code, step=-1, message=message)

    def write_ranks(self, processes: Iterable[Process]) -> None:
        """Record the job's processes, rank 0 first."""
        durable.write_json(self.ranks, [asdict(process) for process in processes])

    def read_ranks(self) -> list[Process]:
        """The job's processes, rank 0 first; empty before they are started."""
        return [Process(**tree) for tree in json.loads(self.ranks.read_text())] if self.ranks.exists() else []

    @property
    def run(self) -> RunDir:
        """The run directory around `logs/NNN`."""
        return RunDir(self.path.parent.parent)

    def settle(self, outcome: Outcome, task: int | None = None) -> None:
        """Record how the job, or one task of a job array, ended; for the run as well when the job trained."""
        if self.read().trains:
            self.run.write_outcome(outcome)
        durable.write_json(self.outcome_file(task), vars(outcome))

    def living(self) -> list[Process]:
        """The processes of this submission that are alive on this host: submitter, supervisor, ranks."""
        if self.read_outcome() is not None:
            return []
        record = self.read()
        # The submitter counts only until a supervisor, or Slurm, stands in for it.
        submitter = [] if record.executor == "slurm" and record.job_id else [record.submitter]
        candidates = [*([record.supervisor] if record.supervisor else submitter), *self.read_ranks()]
        return [process for process in candidates if process.is_alive()]

    def queued(self, jobs: dict[str, QueuedJob]) -> list[QueuedJob]:
        """Of these jobs of Slurm the ones of this submission: several, when it is a job array."""
        record = self.read()
        ids = {record.job_id, *(file.read_text() for file in self.path.glob("moved-*.txt"))}
        return [
            job
            for job in jobs.values()
            # By name as well: the id is missing when a submission was killed before it could write it down.
            if job.job_id.partition("_")[0] in ids or (record.job_name != "" and job.name == record.job_name)
        ]


def job_folders(root: Path) -> list[JobFolder]:
    """Every submission in `root`, oldest first."""
    return [JobFolder(path) for path in sorted(root.glob("[0-9]*")) if (path / "job.json").exists()]


def refuse_while_alive(root: Path, folders: Iterable[JobFolder]) -> None:
    """Refuse to go on while a job of `folders` is alive.

    Raises:
        LaunchError: naming the job, its log and the way out; or Slurm does not say whether one is.
    """
    folders = [folder for folder in folders if folder.read_outcome() is None]
    _refuse_while_queued(root, [folder for folder in folders if folder.read().executor == "slurm"])
    for folder in folders:
        living = folder.living()
        if living:
            record = folder.read()
            name = f"job {record.job_id}" if record.job_id else "a submission"
            raise LaunchError(
                f"{root}: {name} ({record.verb}, {folder.path}) is alive as process "
                f"{', '.join(str(process.pid) for process in living)}; wait for it, or let it save and stop with "
                f"`kill -USR2 {living[0].pid}`, and submit again"
            )


def _refuse_while_queued(root: Path, folders: list[JobFolder]) -> None:
    if not folders:
        return
    try:
        jobs = slurm_commands.queue(folder.read().user for folder in folders)
    except SlurmSilentError as error:
        newest = folders[-1].read()
        raise SlurmSilentError(
            f"{root}: nobody says whether job {newest.job_id} is alive: {error}; try again"
        ) from None
    for folder in folders:
        active = [job for job in folder.queued(jobs) if job.is_active]
        if active:
            raise LaunchError(
                f"{root}: job {active[0].job_id} ({folder.read().verb}, {folder.path}) is {active[0].state.lower()}; "
                f"wait for it, or end it with `mimscale cancel {root}`, and submit again"
            )


def claim_folder(
    root: Path, record: JobRecord, config_text: str, *, beside: tuple[JobFolder, ...] = (), profile_text: str = ""
) -> JobFolder:
    """Make the folder of a new submission under the next free number.

    Args:
        root: the run's folder of logs.
        record: what is submitted.
        config_text: the resolved config.
        beside: submissions that may be alive: those that this one waits for.
        profile_text: the profile.

    Raises:
        LaunchError: another submission took the same place and is alive.
    """
    root.mkdir(parents=True, exist_ok=True)
    draft = JobFolder(root / f"{durable.TEMPORARY_PREFIX}{os.getpid()}")
    shutil.rmtree(draft.path, ignore_errors=True)  # left by a killed process that had the same id
    draft.path.mkdir()
    draft.write(record)
    durable.write_text(draft.config, config_text)
    durable.write_text(draft.profile, profile_text)
    number = 1 + max((int(folder.path.name) for folder in job_folders(root)), default=0)
    while True:
        folder = JobFolder(root / f"{number:03d}")
        try:
            durable.rename_folder(draft.path, folder.path)
            break
        except OSError:  # a folder with something in it cannot be replaced: taken by another submission meanwhile
            if not folder.path.exists():
                raise
            number += 1
    try:
        # Of two submissions made at once the lower number goes on.
        lower = (other for other in job_folders(root) if int(other.path.name) < number)
        refuse_while_alive(root, (other for other in lower if other not in beside))
    except LaunchError:
        shutil.rmtree(folder.path)
        raise
    return folder


def append_job(jobs_file: Path, entry: dict[str, Any]) -> None:
    """Add one line to jobs.jsonl. One write of one short line: lines of two writers do not mix."""
    with jobs_file.open("ab") as file:
        file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def now_utc() -> str:
    """The time, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
