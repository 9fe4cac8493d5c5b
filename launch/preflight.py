"""What can be known on the login node before a job waits in a queue. The nodes check the rest when it starts."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from launch import slurm_commands
from launch.plan import Plan
from launch.profile import slurm_config
from launch.slurm import check_partition
from mimscale.console import say
from mimscale.errors import ConfigError, LaunchError


def refuse_inside_allocation(environment: Mapping[str, str]) -> None:
    """Raise LaunchError in a shell that is itself a job: what is submitted there is often meant to run there."""
    if "SLURM_JOB_ID" in environment:
        raise LaunchError(
            f"this shell is inside job {environment['SLURM_JOB_ID']} of Slurm; submit from a login node, run the verb "
            "itself under srun, or say --inside-allocation to submit another job from here"
        )


def check_on_login_node(plan: Plan) -> None:
    """Refuse a Slurm job that cannot work.

    Raises:
        ConfigError: a time limit without room for the lead and a save.
        LaunchError: no such partition, no sbatch, or not enough disk.
    """
    check_times(plan)
    check_disk(plan)
    check_files(plan)
    check_partition(plan.profile)
    warning = why_a_preemption_may_cost_steps(plan)
    if warning is not None:
        say(warning)


def why_a_preemption_may_cost_steps(plan: Plan) -> str | None:
    """A warning when a partition leaves its preempted jobs less time than a save takes; None when all is well."""
    estimate, partition = plan.estimate(), slurm_config(plan.profile).partition
    if estimate is None:
        return None
    # Of several partitions Slurm chooses one; the first speaks for them.
    facts = slurm_commands.partition_facts(partition.partition(",")[0] if partition else None)
    grace_s = facts.get("GraceTime", "")
    if facts.get("PreemptMode", "OFF") == "OFF" or not grace_s.isdigit() or int(grace_s) >= estimate.save_s:
        return None
    return (
        f"partition {facts['PartitionName']} leaves a preempted job GraceTime={grace_s} s, and a save takes about "
        f"{estimate.save_s:.1f} s: a preemption may cost the steps since the last checkpoint; lower "
        "checkpoint.every_steps, use more nodes, or ask the site for a longer GraceTime"
    )


def check_files(plan: Plan) -> None:
    """Raise LaunchError when a file that the profile names is not there."""
    slurm = slurm_config(plan.profile)
    names = {"source_files": slurm.source_files, "env_archive": (slurm.env_archive,) if slurm.env_archive else ()}
    for key, files in names.items():
        for file in files:
            if not os.access(file, os.R_OK):
                raise LaunchError(f"slurm.{key}: {file} is not readable here; correct the profile")


def check_times(plan: Plan) -> None:
    """Raise ConfigError when a stop cannot be saved before Slurm kills the job."""
    estimate, timeout_min, lead_s = plan.estimate(), plan.profile.timeout_min, plan.profile.signal_lead_s
    if timeout_min is None:
        raise ConfigError("profile.timeout_min: a Slurm job needs a time limit; write it in minutes")
    if estimate is None:
        return
    size = f"a checkpoint of about {estimate.checkpoint_gb:.2f} GB takes about {estimate.save_s:.0f} s to save"
    if lead_s < estimate.save_s:
        raise ConfigError(
            f"profile.signal_lead_s={lead_s:g}: {size}; raise it, use more nodes, or correct slurm.write_mb_per_s"
        )
    if timeout_min * 60 < lead_s + estimate.save_s:
        raise ConfigError(
            f"profile.timeout_min={timeout_min:g}: shorter than signal_lead_s={lead_s:g} and a save together ({size}); "
            f"ask for at least {(lead_s + estimate.save_s) / 60:.1f} min"
        )


def check_disk(plan: Plan) -> None:
    """Raise LaunchError when the checkpoints that are kept do not fit on the disk of run_dir."""
    estimate = plan.estimate()
    if plan.trains is None or estimate is None:
        return
    place = next(folder for folder in (plan.run.path, *plan.run.path.parents) if folder.exists())
    if not os.access(place, os.W_OK):
        raise LaunchError(f"run_dir={plan.run.path}: {place} is not writable; choose another run_dir")
    kept = _checkpoints_there(plan.run.checkpoints)
    more = max(plan.trains.checkpoint.keep + 1 - kept, 1)  # a new one is complete before an old one goes
    needed_gb, free_gb = more * estimate.checkpoint_gb, shutil.disk_usage(place).free / 1e9
    if free_gb < needed_gb:
        raise LaunchError(
            f"run_dir={plan.run.path}: {free_gb:.2f} GB free, {more} more checkpoint(s) take about {needed_gb:.2f} GB; "
            "free space, lower checkpoint.keep, or choose another run_dir"
        )


def _checkpoints_there(folder: Path) -> int:
    return len(list(folder.glob("step_*")))
