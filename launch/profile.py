"""A profile: where jobs run and with what. Packaged ones stand in `profiles/`; a site writes its own file.

Nothing here asks torch: a profile is read on login nodes.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from launch.slurm_profile import SlurmConfig, check_one_line
from mimscale.config import build_config, parse_yaml, require_positive
from mimscale.errors import ConfigError

Accelerator = Literal["cpu", "cuda"]
CPU_PROCESSES = 2  # on a machine without a GPU: the smallest number that tests what many do

# Variables that the launcher derives from other settings; a second source would contradict the first.
OWN_VARIABLES = {
    "RANK": "it follows from the launcher",
    "WORLD_SIZE": "use processes_per_node and --nodes",
    "LOCAL_RANK": "it follows from the launcher",
    "LOCAL_WORLD_SIZE": "use processes_per_node",
    "LOCAL_SIZE": "use processes_per_node",
    "MASTER_ADDR": "it follows from the launcher",
    "MASTER_PORT": "each submission chooses a free one",
    "OMP_NUM_THREADS": "use threads_per_process",
    "DS_ACCELERATOR": "use accelerator",
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where and how jobs run."""

    # local: processes on this machine; debug: inside the submitting process; slurm: a batch job
    executor: Literal["local", "debug", "slurm"]
    processes_per_node: int | None = None  # null: one per GPU; without GPUs two on this machine, one on a Slurm node
    threads_per_process: int | None = None  # OMP_NUM_THREADS; null: the usable cores shared out, slurm.cpus_per_task
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"  # what DeepSpeed computes on (DS_ACCELERATOR)
    timeout_min: float | None = None  # wall-clock limit of a job; null: none, and with Slurm the partition's
    signal_lead_s: float = 120.0  # how long before the limit the job is asked to save and leave
    lost_rank_grace_s: float = 10.0  # how long the other processes may end by themselves once one has failed
    environment: dict[str, str] = field(default_factory=dict)  # further variables of the job's processes
    slurm: SlurmConfig | None = None  # what Slurm is asked for; of executor: slurm alone

    def __post_init__(self) -> None:
        for name in ("processes_per_node", "threads_per_process", "timeout_min"):
            if getattr(self, name) is not None:
                require_positive("profile", **{name: getattr(self, name)})
        require_positive("profile", signal_lead_s=self.signal_lead_s, lost_rank_grace_s=self.lost_rank_grace_s)
        if self.timeout_min is not None and self.timeout_min * 60 <= self.signal_lead_s:
            raise ValueError(
                f"profile.timeout_min={self.timeout_min} is not longer than signal_lead_s={self.signal_lead_s}: the "
                "job would be asked to stop before it starts; raise the one or lower the other"
            )
        if self.executor == "debug" and self.processes_per_node not in (None, 1):
            raise ValueError(
                f"profile.processes_per_node={self.processes_per_node}: the debug executor runs one process; use local"
            )
        if self.slurm is not None and self.executor != "slurm":
            raise ValueError(f"profile.slurm: only with executor: slurm, this profile has executor: {self.executor}")
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"profile.environment: {name!r} is no name of a variable")
            check_one_line(f"profile.environment.{name}", value)
        for name in self.environment.keys() & OWN_VARIABLES.keys():
            raise ValueError(f"profile.environment.{name} is set by the launcher; {OWN_VARIABLES[name]}")


def load_profile(name_or_path: str) -> Profile:
    """Read a profile from a file, or a packaged one by its name.

    Raises:
        ConfigError: neither exists (the packaged names are listed), or a wrong or unknown key (each is named).
    """
    packaged = resources.files("launch") / "profiles"
    path = Path(name_or_path)
    if path.is_file():
        text = path.read_text()
    elif (packaged / f"{name_or_path}.yaml").is_file():
        text = (packaged / f"{name_or_path}.yaml").read_text()
    else:
        names = sorted(entry.name.removesuffix(".yaml") for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
        raise ConfigError(f"{name_or_path}: no such file and no packaged profile; packaged are: {', '.join(names)}")
    return build_config(Profile, parse_yaml(text, name_or_path), name_or_path)


def slurm_config(profile: Profile) -> SlurmConfig:
    """What Slurm is asked for: the profile's `slurm:` part, or nothing special."""
    return profile.slurm or SlurmConfig()


def resolve_accelerator(profile: Profile, environment: Mapping[str, str]) -> Accelerator:
    """What the processes compute on. Said explicitly, because DeepSpeed's own search takes what it finds first.

    Raises:
        ConfigError: DS_ACCELERATOR names something that mimscale does not know.
    """
    if profile.accelerator != "auto":
        return profile.accelerator
    if profile.executor == "slurm":  # what the login node has says nothing about the nodes
        return "cuda" if slurm_config(profile).gpus else "cpu"
    inherited = environment.get("DS_ACCELERATOR")
    if inherited == "cpu":
        return "cpu"
    if inherited == "cuda":
        return "cuda"
    if inherited:
        raise ConfigError(f"DS_ACCELERATOR={inherited}: expected cpu or cuda; unset it or set profile.accelerator")
    return "cuda" if visible_gpus(environment) else "cpu"


def visible_gpus(environment: Mapping[str, str]) -> int:
    """Number of NVIDIA GPUs that a process with this environment would see."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return 0
    if not (Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        return 0
    if visible is not None:
        return len(visible.split(","))
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs or is half installed is no GPU to count on
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def resolve_processes(profile: Profile, accelerator: Accelerator, environment: Mapping[str, str]) -> int:
    """Processes on a node."""
    if profile.processes_per_node is not None:
        return profile.processes_per_node
    if profile.executor == "debug":
        return 1
    if profile.executor == "slurm":
        return max(1, slurm_config(profile).gpus)
    return max(1, visible_gpus(environment)) if accelerator == "cuda" else CPU_PROCESSES


def resolve_threads(profile: Profile, processes: int) -> int:
    """Threads of each process (OMP_NUM_THREADS)."""
    if profile.executor == "slurm":
        return profile.threads_per_process or slurm_config(profile).cpus_per_task or 1
    return profile.threads_per_process or max(1, len(os.sched_getaffinity(0)) // processes)
