"""What a job ran with: versions, host, code and the settings that matter, without secrets. No torch here."""

import ctypes
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mimscale.console import say

STALE_BUILD_S = 600.0  # DeepSpeed's op is built in one to two minutes
PACKAGES = ("mimscale", "torch", "deepspeed", "monai", "zarr", "numcodecs", "numpy", "submitit", "pydantic")
# Only what is named here is written: tokens and passwords have any name.
RECORDED = ("CUDA_VISIBLE_DEVICES", "MASTER_PORT", "OMP_", "DS_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "MIMSCALE_")
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")
# Set by the launcher, whose snapshot of the code is no git checkout.
COMMIT_VARIABLE = "MIMSCALE_COMMIT"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def job_record(environment: Mapping[str, str]) -> dict[str, Any]:
    """What env.json says about the job of this process."""
    code = Path(__file__).parents[2]
    return {
        "started_unix_s": time.time(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": installed_versions(),
        "code": str(code),
        "commit": environment.get(COMMIT_VARIABLE) or git_commit(code),
        "environment": recorded_variables(environment),
    }


def installed_versions() -> dict[str, str | None]:
    """Package -> version of what a run's results depend on."""
    return {name: _version(name) for name in PACKAGES}


def recorded_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how a job computes or communicates."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(RECORDED) and not any(word in name for word in SECRET_WORDS)
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is the top of, with `-dirty` when files differ; None when it is none."""
    if not (folder / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or somebody else's checkout


def this_commit() -> str:
    """The commit of the code that runs now, for a job that will run a copy of it; empty when unknown."""
    return os.environ.get(COMMIT_VARIABLE) or git_commit(Path(__file__).parents[2]) or ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_peak_bytes() -> int:
    """The most memory that this process has held. Not ru_maxrss: that begins with the memory of its parent."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found, "Linux tells it"
    return int(found[1]) * 1024


def keep_freed_memory() -> bool:
    """Let glibc keep what a training step frees, for the next step; False where the C library is another one.

    On a CPU it else gives large tensors back to the kernel, which clears the same pages anew in each step: 60 000
    page faults of a ViT-B, and 270 000 under ZeRO. Not for CUDA, where tensors lie elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never


def remove_stale_build_locks(extensions: Path) -> None:
    """Remove the locks of builds that were killed: torch waits for such a lock for ever, and without a word.

    Args:
        extensions: what TORCH_EXTENSIONS_DIR names; a folder for each C++ extension, with `lock` while it is built.
    """
    for lock in extensions.glob("*/lock"):
        try:
            age_s = time.time() - lock.stat().st_mtime
            if age_s > STALE_BUILD_S:
                lock.unlink()
                say(f"{lock}: removed, a build that began {age_s / 60:.0f} minutes ago was killed")
        except FileNotFoundError:
            pass  # its build has just ended, or another rank was here first
