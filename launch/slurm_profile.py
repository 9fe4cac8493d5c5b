"""The `slurm:` part of a profile. It holds values, never shell: each is checked here and quoted where it is used."""

import re
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Literal

from mimscale.config import require_positive

# sbatch reads `#SBATCH` lines with rules of its own, so nothing that any of them could mean is let through.
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.,:@%+=/&|*()\[\]^-]+( [A-Za-z0-9_.,:@%+=/&|*()\[\]^-]+)*")
_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*")

# Options that the launcher derives from other settings; a second source would contradict the first.
OWN_OPTIONS = {
    "nodes": "use --nodes",
    "ntasks": "use processes_per_node and --nodes",
    "ntasks-per-node": "use processes_per_node",
    "time": "use timeout_min",
    "signal": "use signal_lead_s",
    "output": "logs lie in the run directory",
    "error": "logs lie in the run directory",
    "open-mode": "logs are always appended to",
    "job-name": "it tells a lost submission from others",
    "array": "use --array",
    "dependency": "use --after",
    "requeue": "every job can be requeued",
    "no-requeue": "use max_requeues: 0",
    "export": "the environment is that of the submitting shell without Slurm's variables",
    "kill-on-bad-exit": "always 1",
    "wait": "use slurm.wait_s",
    "cpu-bind": "use slurm.cpu_bind",
}


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """An image that the ranks run in. The batch script itself runs outside of it."""

    image: str  # what `--container-image` takes, or the path of an Apptainer image
    runtime: Literal["pyxis", "apptainer"] = "pyxis"  # pyxis: srun's --container-image; apptainer: `apptainer exec`
    python: str = "python3"  # interpreter inside the image; it has mimscale's dependencies
    mounts: tuple[str, ...] = ()  # SOURCE[:TARGET] beside the run directory and the store, which are always mounted


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What Slurm is asked for. null leaves an option to the site's default."""

    partition: str | None = None  # --partition
    account: str | None = None  # --account
    qos: str | None = None  # --qos
    constraint: str | None = None  # --constraint
    reservation: str | None = None  # --reservation
    nodelist: str | None = None  # --nodelist
    exclude: str | None = None  # --exclude
    gpus_per_node: int | None = None  # --gpus-per-node; where a site counts GPUs otherwise, use gres
    gres: str | None = None  # --gres, for example gpu:a100:4
    cpus_per_task: int | None = None  # --cpus-per-task, for sbatch and srun: threads and loader workers of a process
    memory_gb_per_node: float | None = None  # --mem; 0: all of a node
    memory_gb_per_cpu: float | None = None  # --mem-per-cpu
    exclusive: bool = False  # --exclusive: no other job on the nodes
    cpu_bind: str | None = None  # --cpu-bind of srun, for example cores or none
    srun_options: tuple[str, ...] = ()  # further words of srun, for example --mpi=none
    sbatch_options: dict[str, str] = field(default_factory=dict)  # further options, for example mail-type: END
    modules: tuple[str, ...] = ()  # `module load` of each, before anything else
    source_files: tuple[str, ...] = ()  # shell files of the site that the batch script sources after the modules
    network_interface: str | None = None  # NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, for example ib0
    container: ContainerConfig | None = None  # null: the interpreter that submits, at the same path on the nodes
    env_archive: str | None = None  # tar of a Python environment, unpacked once a node; its bin/python runs the ranks
    node_dir: str = "/tmp"  # noqa: S108  # folder on each node's own disk, for env_archive
    stage_dir: str | None = None  # folder there for copies of packs: stream.stage_dir of runs that name none themselves
    wait_s: int = 300  # how long srun lets the other ranks end once one has left without an error
    max_requeues: int | None = None  # restarts that are no preemption; null: as many as make progress
    write_mb_per_s: float = 500.0  # what a node writes to the file system of run_dir: for the estimate of a save

    def __post_init__(self) -> None:
        for name in ("cpus_per_task", "gpus_per_node", "memory_gb_per_cpu"):
            if getattr(self, name) is not None:
                require_positive("profile.slurm", **{name: getattr(self, name)})
        require_positive("profile.slurm", wait_s=self.wait_s, write_mb_per_s=self.write_mb_per_s)
        if self.memory_gb_per_node is not None and self.memory_gb_per_node < 0:
            raise ValueError(f"profile.slurm.memory_gb_per_node={self.memory_gb_per_node}: 0 (all of a node) or above")
        if self.max_requeues is not None and self.max_requeues < 0:
            raise ValueError(f"profile.slurm.max_requeues={self.max_requeues}: 0 (never) or above, or null")
        for one, other in (("gpus_per_node", "gres"), ("memory_gb_per_node", "memory_gb_per_cpu")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                if one == "gpus_per_node" and not self._gres_gpus():
                    continue  # gres asks for something else
                raise ValueError(f"profile.slurm.{one} and profile.slurm.{other} ask for the same thing; keep one")
        if self.container and self.env_archive:
            raise ValueError("profile.slurm.container and profile.slurm.env_archive both bring Python; keep one")
        for name in ("env_archive", "node_dir", "stage_dir"):
            value = getattr(self, name)
            if value is not None and not PurePosixPath(value).is_absolute():
                raise ValueError(f"profile.slurm.{name}={value!r}: must be an absolute path, the same on every node")
        self._check_values()

    def _check_values(self) -> None:
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        # The words of srun and the names of files and modules stand on shell lines, where quoting makes anything safe.
        quoted = {"srun_options", "modules", "source_files", "container", "sbatch_options"}
        quoted |= {"env_archive", "node_dir", "stage_dir"}
        for name, value in plain.items():
            if name not in quoted and isinstance(value, str):
                check_option_value(f"profile.slurm.{name}", value)
        for option, value in self.sbatch_options.items():
            if not _OPTION_NAME.fullmatch(option):
                raise ValueError(f"profile.slurm.sbatch_options.{option!r}: an option is written like mail-type")
            check_option_value(f"profile.slurm.sbatch_options.{option}", value)
            _refuse_own_option(f"profile.slurm.sbatch_options.{option}", option)
        for word in self.srun_options:
            if not word.startswith("-"):
                raise ValueError(f"profile.slurm.srun_options: {word!r} does not start with '-'; write --option=value")
            _refuse_own_option(f"profile.slurm.srun_options: {word}", word.lstrip("-").partition("=")[0])
        for name in ("srun_options", "modules", "source_files"):
            for value in getattr(self, name):
                check_one_line(f"profile.slurm.{name}", value)
        for name in ("env_archive", "node_dir", "stage_dir"):
            check_one_line(f"profile.slurm.{name}", getattr(self, name) or "")
        if self.container:
            for value in (self.container.image, self.container.python, *self.container.mounts):
                check_one_line("profile.slurm.container", value)

    @property
    def gpus(self) -> int:
        """GPUs of each node that the job asks for."""
        return self.gpus_per_node or self._gres_gpus()

    def _gres_gpus(self) -> int:
        gpus = 0
        for part in (self.gres or "").split(","):
            kind, *more = part.split(":")  # gpu, gpu:4, gpu:a100 or gpu:a100:4
            if kind == "gpu":
                gpus += int(more[-1]) if more and more[-1].isdigit() else 1
        return gpus


def check_option_value(name: str, value: str) -> None:
    """Raise ValueError unless `value` can stand on an `#SBATCH` line and mean itself."""
    if not _OPTION_VALUE.fullmatch(value):
        raise ValueError(
            f"{name}={value!r}: quotes, backslashes, '#', '$', '`', ';', line ends and spaces at an end mean something "
            "to sbatch or a shell; write the plain value"
        )


def check_one_line(name: str, value: str) -> None:
    """Raise ValueError when `value` has a control character: a line end would begin a new line of the batch script."""
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError(f"{name}={value!r}: has a line end or another control character; write it on one line")


def _refuse_own_option(name: str, option: str) -> None:
    if option in OWN_OPTIONS:
        raise ValueError(f"{name}: set by the launcher; {OWN_OPTIONS[option]}")
