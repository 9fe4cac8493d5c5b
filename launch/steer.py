"""`mimscale logs`, `cancel` and `resume`: what a person does with a run that was submitted."""

import argparse
import getpass
import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch import slurm_commands
from launch.folder import JobFolder, JobRecord, job_folders, now_utc
from launch.follow import Log, show_until_ended
from launch.slurm_commands import ENDED_MEANWHILE, LostAnswerError, QueuedJob, SlurmSilentError, UnreachableError
from launch.status import expand, submissions_to_show
from mimscale import console, durable
from mimscale.errors import ConfigError, LaunchError

SIGNALLED = ("RUNNING", "SUSPENDED")  # states of jobs that may have something to save


def logs_main(argv: list[str]) -> int:
    """`mimscale logs RUN_DIR [-f] [--rank N] [--task N]`."""
    parser = argparse.ArgumentParser(prog="mimscale logs", description="Show what the newest job of a run prints.")
    parser.add_argument("run_dir", type=Path, help="the run")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument("--rank", type=int, default=0, help="whose log (default: 0)")
    parser.add_argument("--task", type=int, help="of a job array")
    arguments = parser.parse_args(argv)
    folder = _newest_with_log(arguments.run_dir, arguments.task)
    record = folder.read()
    task = _task(record, arguments.task)
    if not 0 <= arguments.rank < record.processes:
        raise ConfigError(f"--rank {arguments.rank}: job {record.job_id} has ranks 0 to {record.processes - 1}")
    if arguments.follow and task is None:
        with suppress(KeyboardInterrupt):
            show_until_ended(folder, arguments.rank, sys.stdout)
        return 0
    path = _log(folder, task, arguments.rank)
    if not path.exists():
        raise LaunchError(f"{path}: not there yet; job {record.job_id} has not started (see `mimscale status`)")
    Log(path, sys.stdout).show_new()
    return 0


def _task(record: JobRecord, asked: int | None) -> int | None:
    """Which task of a job array is meant, the first unless another is asked for; None where there is no array."""
    if record.array is None:
        return None
    task = asked or 0
    if not 0 <= task < record.array:
        raise ConfigError(f"--task {task}: job {record.job_id} has tasks 0 to {record.array - 1}")
    return task


def _log(folder: JobFolder, task: int | None, rank: int) -> Path:
    return folder.rank_log(folder.task_job_id(task), rank)


def _newest_with_log(run_dir: Path, asked: int | None) -> JobFolder:
    folders = _folders(run_dir)
    if asked is not None:
        folders = [folder for folder in folders if folder.read().array is not None]
        if not folders:
            raise ConfigError(f"--task {asked}: {run_dir} has no job array")
    written = [folder for folder in folders if _log(folder, _task(folder.read(), asked), 0).exists()]
    return (written or folders)[-1]


def _folders(run_dir: Path) -> list[JobFolder]:
    folders = [folder for run in expand([run_dir]) for folder in job_folders(run.logs)]
    if not folders:
        raise ConfigError(f"{run_dir}: nothing was submitted there")
    return folders


def cancel_main(argv: list[str]) -> int:
    """`mimscale cancel RUN_DIR [--now]`."""
    parser = argparse.ArgumentParser(
        prog="mimscale cancel", description="Let the jobs of a run save and stop, for good. `resume` goes on later."
    )
    parser.add_argument("run_dir", type=Path, help="the run")
    parser.add_argument("--now", action="store_true", help="end them at once; steps since the last save are lost")
    arguments = parser.parse_args(argv)
    (run, *others) = expand([arguments.run_dir])
    if others:
        raise ConfigError(f"{arguments.run_dir}: holds {1 + len(others)} runs; name one")
    alive = [folder for folder in submissions_to_show(run) if folder.read_outcome() is None]
    if not alive:
        console.say(f"{run.path}: no job to cancel")
        return 0
    for folder in alive:  # before anything else, so that whatever ends a job now finds it and does not start it again
        durable.write_json(folder.cancelled, {"by": f"{getpass.getuser()}@{socket.gethostname()}", "utc": now_utc()})
    for folder in reversed(alive):  # those that wait for another first
        cancel = _cancel_batch_job if folder.read().executor == "slurm" else _cancel_local_job
        console.say(cancel(folder, now=arguments.now))
    return 0


def _cancel_batch_job(folder: JobFolder, *, now: bool) -> str:
    record = folder.read()
    try:
        jobs = [job for job in folder.queued(slurm_commands.queue([record.user])) if job.is_active]
        refused = _scancel(jobs, now=now)
        if refused:
            raise SlurmSilentError("; ".join(refused))
    except SlurmSilentError as error:
        raise LaunchError(
            f"job {record.job_id} has not heard of it ({error}): it runs on, but will not start again once it ends; "
            "give the same command again when Slurm answers"
        ) from None
    if not jobs:
        return f"job {record.job_id} is not in the queue any more"
    name, states = f"job {record.job_id}", {job.state for job in jobs}
    if now:
        return f"{name}: cancelled"
    if states & set(SIGNALLED):
        return f"{name}: asked to save and stop; --now ends it at once"
    return f"{name}: is ending already" if states == {"COMPLETING"} else f"{name}: cancelled"


def _scancel(jobs: Sequence[QueuedJob], *, now: bool) -> list[str]:
    """Cancel the jobs of a submission; returns what was refused of it. Few calls, however many tasks an array has.

    Raises:
        SlurmSilentError: the controller does not answer.
    """
    refused = []
    orders = {_order(job, now=now) for job in jobs if now or job.state != "COMPLETING"}
    # What waits comes first: it would take the place of what ends.
    for order in sorted(orders, key=lambda order: ("--signal=USR2" in order, order)):
        *options, job_id = order
        try:
            slurm_commands.cancel(job_id, *options)
        except (LostAnswerError, UnreachableError):
            raise
        except SlurmSilentError as error:
            if not any(text in str(error) for text in ENDED_MEANWHILE):  # of one task: the others were cancelled
                refused.append(str(error))
    return refused


def _order(job: QueuedJob, *, now: bool) -> tuple[str, ...]:
    """The words of scancel for a job; the same for all tasks of an array in the same state."""
    array_id = job.job_id.partition("_")[0]
    if now:
        return (array_id,)
    if job.state in SIGNALLED:
        return ("--signal=USR2", f"--state={job.state}", array_id)
    if job.state == "PENDING":
        return ("--state=PENDING", array_id)
    return (job.job_id,)  # its node is being prepared, or it is held back


def _cancel_local_job(folder: JobFolder, *, now: bool) -> str:
    record = folder.read()
    if record.submitter.host != socket.gethostname():
        raise LaunchError(f"{folder.path}: job {record.job_id} runs on {record.submitter.host}; cancel it there")
    supervisor = record.supervisor
    if supervisor is None or not supervisor.is_alive():
        return f"job {record.job_id}: its supervisor is gone"
    os.kill(supervisor.pid, signal.SIGINT if now else signal.SIGUSR2)
    return f"job {record.job_id}: {'ended' if now else 'asked to save and stop; --now ends it at once'}"


def resume_main(argv: list[str]) -> int:
    """`mimscale resume RUN_DIR [key=value ...] [--nodes M] [--profile P]`."""
    parser = argparse.ArgumentParser(
        prog="mimscale resume",
        description="Submit the newest job of a run again: it continues from the last checkpoint.",
    )
    parser.add_argument("run_dir", type=Path, help="the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what may change when a run continues")
    parser.add_argument("--nodes", type=int, help="on another number of nodes")
    parser.add_argument("--profile", help="with another profile than the one of the newest job")
    parser.add_argument("--wait", action="store_true", help="show rank 0's log and leave with the job's exit code")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, start nothing")
    parser.add_argument("--inside-allocation", action="store_true", help="submit although this shell is itself a job")
    parser.add_argument("--json", action="store_true", help="print {job_id, run_dir, log} on stdout")
    arguments = parser.parse_intermixed_args(argv)
    from launch.submit import main as submit

    folder = _to_resume(arguments.run_dir)
    record = folder.read()
    profile = arguments.profile
    if profile is None:
        profile = str(folder.profile) if folder.profile.exists() and folder.profile.read_text() else "local"
    elif Path(profile).exists():
        profile = str(Path(profile).absolute())
    kind = [] if record.kind is None else [record.kind]
    words = [record.verb, *kind, str(folder.config), *arguments.overrides, "--profile", profile]
    words += ["--nodes", str(arguments.nodes or record.nodes)]
    if record.array:
        words += ["--array", str(record.array)]
    flags = ("wait", "dry-run", "inside-allocation", "json")
    words += [f"--{name}" for name in flags if getattr(arguments, name.replace("-", "_"))]
    if record.folder:
        os.chdir(record.folder)  # relative paths of the config start there
    console.say(f"mimscale submit {shlex.join(words)}")
    return submit(words)


def _to_resume(run_dir: Path) -> JobFolder:
    """The newest submission that trains; of an ingest the newest array; else the newest."""
    folders = _folders(run_dir)
    chosen = [folder for folder in folders if folder.read().trains or folder.read().array]
    return (chosen or folders)[-1]
