"""From a checked plan to a job: the run directory and the job's folder in it, its executor, and what it waits for.

The job runs the resolved config that stands in its folder, so a recipe that is edited later changes nothing. How it
ended stands in `outcome.json`: `launch.supervise` (this machine) or `launch.requeue` (Slurm) has the last word on it.
"""

import contextlib
import getpass
import os
import shlex
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import submitit
import yaml

from launch import slurm_commands
from launch.dependents import NO_OTHERS, Waiting, drop_merges, find_parent, stuck_children, take_over
from launch.folder import JobFolder, JobRecord, append_job, claim_folder, job_folders, now_utc, refuse_while_alive
from launch.jobs import RunVerb, free_port, job_environment
from launch.plan import JOB_VERBS, Plan
from launch.preflight import check_on_login_node, check_times
from launch.profile import slurm_config
from launch.slurm import BatchExecutor, BatchJob, new_job_name
from launch.slurm_commands import LostSubmissionError
from launch.snapshot import snapshot_code
from mimscale import durable
from mimscale.config import tree_hash
from mimscale.errors import CheckpointError, LaunchError
from mimscale.store.layout import info_path, read_info
from mimscale.train.committed import read_manifest, refuse_former_version, tags
from mimscale.train.config import FREE_KEYS
from mimscale.train.environment import COMMIT_VARIABLE, this_commit
from mimscale.train.run_dir import RunDir
from mimscale.world import Process


def prepare(plan: Plan, *, fresh: bool, waiting: Waiting = NO_OTHERS) -> JobFolder:
    """Make the run directory and the job's folder in it.

    Raises:
        LaunchError: a job is alive there, or somebody else may write to it.
        ConfigError: the run in it has another config, or there is no run to evaluate.
        DataError: no store where the config says.
    """
    root, batch = plan.run.path, plan.profile.executor == "slurm"
    plan.run.refuse_foreign([plan.run.logs, plan.run.code], LaunchError)
    refuse_while_alive(root, [folder for folder in job_folders(plan.run.logs) if folder not in waiting.beside])
    writers = plan.run.living_ranks()
    if writers and not waiting.beside:
        raise LaunchError(
            f"{root}: a run that was not submitted is alive here ({_ranks_text(writers)}); wait for it, or let it save "
            f"and stop with `kill -USR2 {' '.join(str(pid) for pid in writers.values())}`"
        )
    ports = [folder.read().master_port for folder in job_folders(plan.run.logs)[-1:]]
    if plan.trains:
        if waiting.parent is None or info_path(plan.trains.store).exists():
            read_info(plan.trains.store)  # refuses what is no store, before anything waits in a queue
        if fresh:  # here and once: a job that is started again must not move its own progress aside
            plan.run.move_aside()
        with durable.explained(LaunchError, plan.run.path, "choose another run_dir or free space"):
            _refuse_former_checkpoints(plan.run)
            plan.run.open(plan.tree, plan.text, free_keys=FREE_KEYS)
    elif plan.shares is None and JOB_VERBS[plan.verb].folder_key == "run_dir":
        RunDir(Path(plan.tree["run_dir"])).read_config_tree()  # refuses a folder that is no run directory
    record = JobRecord(
        verb=plan.verb,
        kind=plan.kind,
        executor=plan.profile.executor,
        processes=plan.world_size,
        master_port=None if batch else free_port(avoid=ports[0] if ports else None),
        config_hash=tree_hash(plan.tree),
        timeout_min=plan.profile.timeout_min,
        signal_lead_s=plan.profile.signal_lead_s,
        lost_rank_grace_s=plan.profile.lost_rank_grace_s,
        trains=plan.trains is not None,
        submitted_utc=now_utc(),
        submitter=Process.of(os.getpid()),
        nodes=plan.nodes,
        folder=str(Path.cwd()),
        user=getpass.getuser(),
        job_name=new_job_name(plan.verb, root, uuid.uuid4().hex[:8]) if batch else "",
        array=plan.array,
        after=None if waiting.parent is None else str(waiting.parent.path),
        partition=slurm_config(plan.profile).partition,
        max_requeues=slurm_config(plan.profile).max_requeues,
    )
    profile_text = yaml.safe_dump(_plain(asdict(plan.profile)), sort_keys=False)
    with durable.explained(LaunchError, plan.run.logs, "choose another run_dir or free space"):
        folder = claim_folder(plan.run.logs, record, plan.text, beside=waiting.beside, profile_text=profile_text)
    if plan.trains and not batch:
        plan.run.outcome.unlink(missing_ok=True)  # how the job before ended
    return folder


def _plain(tree: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _refuse_former_checkpoints(run: RunDir) -> None:
    """Say before the queue what loading the newest checkpoint would say after it. Broken ones are the job's affair."""
    for tag in tags(run):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(tag)
            break
    else:
        return
    refuse_former_version(tag, manifest)


def _ranks_text(ranks: dict[int, int]) -> str:
    return ", ".join(f"rank {rank} is process {pid}" for rank, pid in ranks.items())


def start(plan: Plan, folder: JobFolder, argv: Sequence[str], *, depends_on: Sequence[str] = ()) -> str:
    """Hand the job to its executor and record it; returns its id.

    Raises:
        LaunchError: the scheduler does not take it; the folder is gone then.
    """
    record = folder.read()
    chosen = _chosen_variables(plan)
    environment = job_environment(os.environ, chosen=chosen, threads=plan.threads, accelerator=plan.accelerator)
    code = snapshot_code(plan.run.code)
    exported = chosen | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(code.resolve()), environment.get("PYTHONPATH")))),
        # `python -m` would look into the current folder first, and find the checkout that a user submits from.
        "PYTHONSAFEPATH": "1",
        COMMIT_VARIABLE: this_commit(),
    }
    task = _task(plan, folder, record.master_port)
    if plan.profile.executor == "slurm":
        job = _batch_job(plan, folder.path, record.job_name, exported, depends_on)
        try:
            job_id = BatchExecutor(job, environment).submit_task(task)
        except LostSubmissionError:
            raise  # it may be queued: the folder stays
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
    else:
        from launch.local import SupervisedExecutor

        executor = SupervisedExecutor(folder, processes=plan.processes, environment=environment | exported)
        job_id = executor.submit(task).job_id
        record = replace(record, supervisor=Process.of(int(job_id)))
    folder.write(replace(record, job_id=job_id))
    _log_job(plan, folder, job_id, str(code.relative_to(plan.run.path)), argv)
    return job_id


def start_here(plan: Plan, folder: JobFolder, argv: Sequence[str]) -> submitit.Job[int]:
    """Record a job of the debug executor, which runs in this process when its result is asked for."""
    from submitit.local.debug import DebugExecutor

    job = DebugExecutor(folder.path).submit(_task(plan, folder, folder.read().master_port))
    folder.write(replace(folder.read(), job_id=job.job_id))
    _log_job(plan, folder, job.job_id, None, argv)
    return job


def _chosen_variables(plan: Plan) -> dict[str, str]:
    interface = slurm_config(plan.profile).network_interface
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
    return {**dict.fromkeys(names, interface or ""), **plan.profile.environment}


def _task(plan: Plan, folder: JobFolder, master_port: int | None) -> RunVerb:
    return RunVerb(
        arguments=(*plan.command, str(folder.config), *plan.words),
        folder=Path.cwd(),
        environment=_chosen_variables(plan)
        | {"OMP_NUM_THREADS": str(plan.threads), "DS_ACCELERATOR": plan.accelerator},
        # Slurm has said that no other job of this run is alive, but not that its node has let go of the lock.
        lock_owner=str(plan.run.path) if plan.profile.executor == "slurm" else None,
        trains=plan.trains is not None,
        master_port=master_port,
    )


def _batch_job(
    plan: Plan, folder: Path, job_name: str, exported: dict[str, str], depends_on: Sequence[str]
) -> BatchJob:
    # What the job makes itself is not there to be mounted yet.
    mounts = [
        plan.run.path,
        Path.cwd(),
        *(_nearest_existing(Path(name).absolute()) for name in named_places(plan.tree)),
    ]
    return BatchJob(
        folder=folder,
        profile=plan.profile,
        job_name=job_name,
        nodes=plan.nodes,
        processes=plan.processes,
        environment=exported,
        mounts=tuple(mounts),
        dependency=slurm_commands.after_success(depends_on) if depends_on else None,
        array=plan.array,
    )


def named_places(tree: dict[str, Any]) -> list[str]:
    """Folders and files that a config names and a job must see, also from inside a container."""
    named = [tree.get(key) for key in ("store", "out", "init_from", "run_dir")]
    named += [(tree.get("targets") or {}).get(key) for key in ("table", "journal")]
    return [name for name in named if name not in (None, "none")]


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _log_job(plan: Plan, folder: JobFolder, job_id: str, code: str | None, argv: Sequence[str]) -> None:
    record = folder.read()
    append_job(
        plan.run.jobs,
        {
            "job_id": job_id,
            "verb": plan.verb,
            "executor": record.executor,
            "host": record.submitter.host,
            "submitted_utc": record.submitted_utc,
            "processes": record.processes,
            "config_hash": record.config_hash,
            "folder": str(folder.path.relative_to(plan.run.path)),
            "code": code,
            "command": shlex.join(["mimscale", "submit", *argv]),
        },
    )


def script_of(plan: Plan, *, waits: bool) -> str:
    """The batch script that submitting a plan would write, with stand-ins for what is known only then.

    Args:
        plan: of a profile for Slurm.
        waits: the job would wait for another one.

    Raises:
        ConfigError: a time limit without room for the lead and a save.
    """
    check_times(plan)
    folder = plan.run.logs / f"{1 + max((int(f.path.name) for f in job_folders(plan.run.logs)), default=0):03d}"
    exported = _chosen_variables(plan) | {"PYTHONPATH": str(plan.run.code / "HASH"), "PYTHONSAFEPATH": "1"}
    name = new_job_name(plan.verb, plan.run.path, "0" * 8)
    return BatchExecutor(_batch_job(plan, folder, name, exported, ["JOB_OF_PARENT"] if waits else [])).script()


def submit_batch(
    plan: Plan, argv: Sequence[str], *, fresh: bool, after: Path | None, after_verb: str | None = None
) -> tuple[JobFolder, str]:
    """Submit to Slurm: one job, or a job array and the job that merges its parts; returns the last one.

    Args:
        plan: what is submitted.
        argv: the command line, for the record.
        fresh: start the run again from step 0.
        after: the run whose job it waits for.
        after_verb: of that job; None: the newest of that run.

    Raises:
        LaunchError: refused by us or by Slurm, before anything is queued.
    """
    check_on_login_node(plan)
    parent = None if after is None else find_parent(after, after_verb)
    # What waits for a job of this run that is over cannot start before the new one has finished.
    stuck = stuck_children(plan.run, plan.verb)
    if plan.array is not None:
        merges = [child for child in stuck if child.run == plan.run]
        drop_merges(merges)
        stuck = [child for child in stuck if child not in merges]
    waiting = Waiting(beside=(*stuck, *([] if parent is None else [parent])), parent=parent)
    depends_on = [] if parent is None else parent.unfinished_job_ids()
    folder = prepare(plan, fresh=fresh, waiting=waiting)
    job_id = start(plan, folder, argv, depends_on=depends_on)
    if parent is not None:
        parent.add_dependent(folder)
    if plan.array is None:
        take_over(stuck, folder, job_id)
        return folder, job_id
    merging = replace(plan, array=None, words=("merge=true",))
    try:
        merge_folder = prepare(merging, fresh=False, waiting=Waiting(beside=(*waiting.beside, folder), parent=folder))
        merge_id = start(merging, merge_folder, argv, depends_on=[job_id])
    except BaseException:
        slurm_commands.cancel(job_id)  # parts that nobody would merge
        raise
    folder.add_dependent(merge_folder)
    take_over(stuck, merge_folder, merge_id)
    return merge_folder, merge_id
