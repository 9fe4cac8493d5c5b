"""What waits in the queue for what: the parent of a new submission, and the children of one that did not end well."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import slurm_commands
from launch.folder import BESIDE, JobFolder, job_folders
from launch.slurm_commands import QueuedJob, SlurmSilentError
from mimscale.console import say
from mimscale.errors import LaunchError
from mimscale.train.run_dir import Outcome, RunDir


class NoOutcomeError(LaunchError):
    """A job that is gone and shows no outcome, or not yet."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """The submissions that a new one may find alive, and those whose success it waits for."""

    beside: tuple[JobFolder, ...] = ()
    parent: JobFolder | None = None  # the one that --after names, while it is not over


NO_OTHERS = Waiting()


def find_parent(run_dir: Path, verb: str | None = None) -> JobFolder | None:
    """The submission that `--after run_dir` waits for; None when it has finished already.

    Args:
        run_dir: a run directory, or the store that an ingest writes.
        verb: of that submission, where others of the same run are not meant; None: the newest of any verb.

    Raises:
        LaunchError: there is none, it has failed, or it is no job of Slurm.
        NoOutcomeError: it is gone, and nothing says how it ended.
    """
    places = [RunDir(run_dir.absolute()), RunDir(run_dir.absolute().with_name(run_dir.name + BESIDE))]
    folders = [folder for place in places for folder in job_folders(place.logs)]
    folders = [folder for folder in folders if verb in (None, folder.read().verb)]
    if not folders:
        raise LaunchError(f"--after {run_dir}: nothing was submitted there; give the run_dir (or out) of a submission")
    newest, active = folders[-1], []
    outcome, record = newest.read_outcome(), newest.read()
    if outcome is None and record.executor == "slurm":
        active = [job for job in newest.queued(slurm_commands.queue([record.user])) if job.is_active]
        outcome = None if active else newest.read_outcome()  # it may have ended meanwhile
    if outcome is not None and outcome.exit_code == 0:
        return None
    if outcome is not None:
        raise LaunchError(
            f"--after {run_dir}: its job {record.job_id} {outcome.outcome} ({outcome.message}); let it finish first, "
            f"with `mimscale resume {run_dir}`"
        )
    if record.executor != "slurm":
        raise LaunchError(f"--after {run_dir}: job {record.job_id} is no job of Slurm; wait for it")
    if not active:
        raise NoOutcomeError(
            f"--after {run_dir}: job {record.job_id} is not in the queue and left no outcome; see `mimscale status "
            f"{run_dir}`, then `mimscale resume {run_dir}`"
        )
    return newest


def stuck_children(run: RunDir, verb: str) -> list[JobFolder]:
    """The submissions that wait in the queue for one of this run that has failed, or is gone without an outcome.

    Such a job never starts by itself: what it waits for is over. A new job of the same verb takes the old one's place.

    Args:
        run: of the jobs that are waited for.
        verb: of these jobs.

    Raises:
        SlurmSilentError: the controller does not answer.
    """
    parents = [folder for folder in job_folders(run.logs) if folder.read().verb == verb and not _ended_well(folder)]
    pairs = [(parent, child) for parent in parents for child in parent.waiting() if _waits_for(child, parent)]
    if not pairs:
        return []
    jobs = slurm_commands.queue(folder.read().user for pair in pairs for folder in pair)
    return [child for parent, child in pairs if _is_over(parent, jobs) and _is_pending(child, jobs)]


def _ended_well(folder: JobFolder) -> bool:
    outcome = folder.read_outcome()
    return outcome is not None and outcome.exit_code == 0


def _waits_for(child: JobFolder, parent: JobFolder) -> bool:
    """Whether a child of a submission still waits for it, and not for another that has taken its place."""
    after = child.read().after
    return after is not None and Path(after).resolve() == parent.path.resolve()


def _is_over(parent: JobFolder, jobs: dict[str, QueuedJob]) -> bool:
    if parent.read_outcome() is not None:  # now that Slurm has answered: it may have ended meanwhile
        return not _ended_well(parent)
    # A job that is cancelled while it waits, killed while it saves, or started on a bad node leaves no outcome.
    return not any(job.is_active for job in parent.queued(jobs))


def _is_pending(child: JobFolder, jobs: dict[str, QueuedJob]) -> bool:
    states = {job.state for job in child.queued(jobs) if job.is_active}
    return states == {"PENDING"}


def drop_merges(merges: Sequence[JobFolder]) -> None:
    """Take merges that can never start out of the queue: a new array brings its own."""
    for merge in merges:
        slurm_commands.cancel(str(merge.read().job_id))
        why = "its job array failed and was submitted again, with another merge"
        merge.settle(Outcome(outcome="failed", exit_code=LaunchError.exit_code, step=-1, message=why))


def take_over(children: Sequence[JobFolder], folder: JobFolder, job_id: str) -> None:
    """Let what waits for a job that is over wait for the new one."""
    for child in repoint(children, [job_id]):
        folder.add_dependent(child)
        child.write(replace(child.read(), after=str(folder.path)))


def repoint(children: Sequence[JobFolder], job_ids: Sequence[str]) -> list[JobFolder]:
    """Let submissions wait for `job_ids`; returns those that do."""
    done = []
    for child in children:
        try:
            slurm_commands.set_dependency(str(child.read().job_id), slurm_commands.after_success(job_ids))
            done.append(child)
        except SlurmSilentError as error:
            say(f"job {child.read().job_id} waits for a job that is over and will never start ({error}); cancel it")
    return done
