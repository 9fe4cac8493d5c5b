"""A batch job of Slurm: its script, and how it is handed over.

Submitit writes the script and pickles the task. What its defaults lack for ranks that train together is added here:
srun ends all ranks with the first that fails, every start of a job gets a port of its own, and the script asks
`launch.requeue` before and after the ranks.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission

from launch import slurm_commands
from launch.folder import JobFolder
from launch.jobs import EPHEMERAL_PORTS, FIRST_PORT, RunVerb
from launch.profile import Profile, slurm_config
from launch.slurm_profile import SlurmConfig
from launch.unpack import environment_folder
from mimscale import durable
from mimscale.errors import ConfigError, LaunchError

RESTART_STRIDE = 7919  # a prime: the restarts of a job meet neither its own ports nor those of the jobs after it
LAST_WORD_S = 20  # for the batch script to requeue the job, before Slurm kills it
_UNFIT_FOR_SLURM = re.compile(r"[%'\"\\#\x00-\x1f\x7f]")  # in a path: % is a pattern, the others end a quoted word


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """What a batch script is made from."""

    folder: Path  # of the submission
    profile: Profile
    job_name: str
    nodes: int
    processes: int  # on each node
    environment: Mapping[str, str]  # variables that must be there before Python starts
    mounts: tuple[Path, ...] = ()  # folders that a container must see
    dependency: str | None = None
    array: int | None = None  # tasks

    @property
    def slurm(self) -> SlurmConfig:
        """What Slurm is asked for."""
        return slurm_config(self.profile)

    @property
    def timeout_min(self) -> float:
        """The time limit.

        Raises:
            ConfigError: the profile has none.
        """
        if self.profile.timeout_min is None:
            raise ConfigError("profile.timeout_min: a Slurm job needs a time limit; write it in minutes")
        return self.profile.timeout_min

    @property
    def last_word_s(self) -> int:
        """How long before the time limit ranks that have not stopped are killed."""
        return min(LAST_WORD_S, round(self.profile.signal_lead_s / 4))

    @property
    def python(self) -> str:
        """The words of the shell that start Python in a rank."""
        container = self.slurm.container
        if self.slurm.env_archive:
            return shlex.quote(str(self._environment_folder() / "bin" / "python"))
        if container is None:
            return shlex.quote(sys.executable)
        if container.runtime == "pyxis":
            return shlex.quote(container.python)
        binds = [word for mount in self._mounts() for word in ("--bind", mount)]
        gpu = ["--nv"] if self.slurm.gpus else []
        return shlex.join(["apptainer", "exec", *gpu, *binds, container.image, container.python])

    def _environment_folder(self) -> Path:
        return environment_folder(Path(self.slurm.env_archive or ""), self.slurm.node_dir)

    def _mounts(self) -> list[str]:
        assert self.slurm.container is not None
        for path in self.mounts:
            if set(":,") & set(str(path)):
                raise LaunchError(
                    f"{path}: a path with a colon or a comma cannot be mounted in a container; choose another"
                )
        own = [f"{path}:{path}" for path in self.mounts]
        return list(dict.fromkeys([*own, *self.slurm.container.mounts]))

    def parameters(self) -> dict[str, Any]:
        """Submitit's parameters: `#SBATCH` options, srun's words, and the lines around them.

        Raises:
            ConfigError: no time limit.
            LaunchError: a path that Slurm would read as something else.
        """
        if _UNFIT_FOR_SLURM.search(str(self.folder)):
            raise LaunchError(
                f"{self.folder}: a path with %, a quote, a backslash, # or a control character cannot hold Slurm's "
                "logs; choose another run_dir"
            )
        slurm = self.slurm
        seconds = round(self.timeout_min * 60)
        options: dict[str, Any] = {
            "time": f"{seconds // 60}:{seconds % 60:02d}",
            "signal": f"USR2@{round(self.profile.signal_lead_s)}",
            "requeue": True,
            "export": "ALL",
            "reservation": slurm.reservation,
            "mem": _megabytes(slurm.memory_gb_per_node),
            "mem-per-cpu": _megabytes(slurm.memory_gb_per_cpu),
            **slurm.sbatch_options,
        }
        return {
            "job_name": self.job_name,
            "nodes": self.nodes,
            "ntasks_per_node": self.processes,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "nodelist": slurm.nodelist,
            "exclude": slurm.exclude,
            "gres": slurm.gres,
            "gpus_per_node": slurm.gpus_per_node,
            "cpus_per_task": slurm.cpus_per_task,
            "exclusive": slurm.exclusive or None,
            "dependency": self.dependency,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": {name: value for name, value in options.items() if value is not None},
            "srun_args": self.srun_arguments(),
            "setup": self._setup(),
            "teardown": self._teardown(),
        }

    def srun_arguments(self) -> list[str]:
        """What srun is told beside where the logs go."""
        slurm = self.slurm
        words = ["--kill-on-bad-exit=1", f"--wait={slurm.wait_s}", "--open-mode=append"]
        if slurm.cpus_per_task:
            words.append(f"--cpus-per-task={slurm.cpus_per_task}")  # since Slurm 22.05 srun no longer takes sbatch's
        if slurm.cpu_bind:
            words.append(f"--cpu-bind={slurm.cpu_bind}")
        if slurm.container and slurm.container.runtime == "pyxis":
            words += [f"--container-image={slurm.container.image}", f"--container-mounts={','.join(self._mounts())}"]
        return [*words, *slurm.srun_options]

    def _setup(self) -> list[str]:
        slurm, python, folder = self.slurm, shlex.quote(sys.executable), shlex.quote(str(self.folder))
        lead_s, limit_s = round(self.profile.signal_lead_s), round(self.timeout_min * 60)
        exports = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        own = " ".join(word for word in exports if word.startswith("PYTHON"))  # whatever the site's modules change
        lines = [
            "# A TERM to the script itself (scancel, a time limit) must not keep it from saying how the job ended.",
            "trap : TERM",
            f"end=${{SLURM_JOB_END_TIME:-$(($(date +%s) + {limit_s}))}}  # older Slurm does not say it",
            f'ask() {{ {own} {python} -m launch.requeue "$1" {folder} "${{@:2}}"; }}',
            f'fail() {{ echo "mimscale: $1 on $(hostname)"; ask end {LaunchError.exit_code} before-ranks; exit $?; }}',
            "export MIMSCALE_BATCH_UNIX_S=$(date +%s.%N)",
            "# By a signal: nobody has said yet that this start has ended, and another one may go well.",
            "ask start || { code=$?; ((code <= 128)) || { ask end $code before-ranks; code=$?; }; exit $code; }",
            *(
                f"module load {word} || fail {shlex.quote(f'module load {word} fails')}"
                for word in map(shlex.quote, slurm.modules)
            ),
        ]
        for file in map(shlex.quote, slurm.source_files):
            lines += [
                f"test -r {file} || fail {shlex.quote(f'slurm.source_files: {file} is not readable')}",
                f"source {file}",
            ]
        lines += [
            *(f"export {word}" for word in exports),
            f"read -r first_ephemeral _ < {EPHEMERAL_PORTS}",
            f"((first_ephemeral > {FIRST_PORT + 1_000})) || first_ephemeral=32768",
            f"restart=$((SLURM_JOB_ID + {RESTART_STRIDE} * ${{SLURM_RESTART_COUNT:-0}}))",
            f"export MIMSCALE_MASTER_PORT=$(({FIRST_PORT} + restart % (first_ephemeral - {FIRST_PORT})))",
            f"export MIMSCALE_STOP_AT_UNIX_S=$((end - {lead_s}))",
        ]
        if slurm.env_archive:
            unpack = [sys.executable, "-m", "launch.unpack", slurm.env_archive, str(self._environment_folder())]
            one_a_node = 'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
            lines.append(
                f"{one_a_node} --kill-on-bad-exit=1 {shlex.join(unpack)} || {{ ask end $? before-ranks; exit $?; }}"
            )
        # srun's first step is number 0, and unpacking is a step.
        # The last task of an array has the array's own number, by which scancel would end the steps of all tasks.
        name = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
        step = f'"{name}.{int(slurm.env_archive is not None)}"'
        return [
            *lines,
            "# Ranks that hang although they were told to stop are ended while the job can still be requeued. The",
            "# watchdog waits for its time or the end of a pipe: it ends with this script, in whatever way that ends.",
            "exec {watchdog}> >(",
            f"  read -rt $((end - {self.last_word_s} - $(date +%s)))",
            f"  (($? > 128)) && scancel --signal=KILL {step}",
            ")",
            "export MIMSCALE_SRUN_UNIX_S=$(date +%s.%N)",
        ]

    def _teardown(self) -> list[str]:
        return ["code=$?", "exec {watchdog}>&-", 'ask end "$code"', "exit $?"]


def _megabytes(gigabytes: float | None) -> str | None:
    return None if gigabytes is None else f"{round(gigabytes * 1024)}M"


class BatchExecutor(submitit.SlurmExecutor):
    """Submitit's Slurm executor for one batch job or one job array."""

    def __init__(self, job: BatchJob, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(job.folder, python=job.python)
        self._batch_job = job
        self._environment = dict(os.environ if environment is None else environment)
        self.update_parameters(**job.parameters())
        if job.array is not None:
            self.parameters["map_count"] = job.array

    @classmethod
    def affinity(cls) -> int:
        """The script can be written where there is no Slurm, for a dry run."""
        return 2

    def script(self) -> str:
        """The text of the batch script."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def submit_task(self, task: RunVerb) -> str:
        """Submit the job, each rank of which runs `task`; returns its id.

        All that the job needs is on disk before Slurm hears of it, so that it runs even when its id gets lost.

        Raises:
            LaunchError: Slurm does not take it.
        """
        folder, count = JobFolder(self._batch_job.folder), self._batch_job.array
        if count is None:
            self._write_task(task, folder.task_file())
        for index in range(count or 0):
            part = replace(task, arguments=(*task.arguments, f"task={index}/{count}"))
            self._write_task(part, folder.task_file(index))
        durable.write_text(folder.script, self.script())
        return slurm_commands.submit(folder.script, self._environment, self._batch_job.job_name)

    def _write_task(self, task: RunVerb, file: Path) -> None:
        submission = DelayedSubmission(task)
        submission.set_timeout(round(self._batch_job.timeout_min), 0)
        submission.dump(file)


def check_partition(profile: Profile) -> None:
    """Refuse a partition that does not exist or that ends jobs earlier than the profile says.

    Raises:
        LaunchError: naming the partitions that there are.
    """
    slurm_commands.require_sbatch()
    limits = slurm_commands.partitions()
    names = (slurm_config(profile).partition or "").split(",")
    for name in filter(None, names):
        if name not in limits:
            raise LaunchError(
                f"slurm.partition={name}: no such partition; this cluster has {', '.join(sorted(limits))}"
            )
        limit = limits[name]
        if limit is not None and profile.timeout_min is not None and profile.timeout_min > limit:
            raise LaunchError(
                f"profile.timeout_min={profile.timeout_min:g}: partition {name} allows {limit:g} min; a job continues "
                "by itself after a time limit, so ask for less"
            )


def new_job_name(verb: str, run: Path, token: str) -> str:
    """A name that no other job has, and that says what it is."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]", "_", word)[:40] for word in ("mimscale", verb, run.name, token))
