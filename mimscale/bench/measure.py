"""Timing, memory and result files that all benchmarks share."""

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mimscale import durable

RESULTS = Path("benchmarks/results")
SCHEMA_VERSION = 1
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Run:
    """One timed run."""

    wall_s: float
    cpu_s: float  # of this process, all its threads: what it would take with a core to itself, storage aside


def interleaved(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Run]]:
    """Time each contender `repeats` times, after one warm-up each.

    All contenders run once, then all again: what else the machine does then hits every one of them.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            contender()
            run = Run(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)
            if repeat:
                runs[name].append(run)
    return runs


def rate(runs: Sequence[Run], megabytes: float) -> dict[str, float]:
    """Throughput of a core, from the median of CPU seconds, with its spread; and by the clock on the wall."""
    cpu, wall = sorted(run.cpu_s for run in runs), sorted(run.wall_s for run in runs)
    median, wall_median = statistics.median(cpu), statistics.median(wall)
    return {
        "mb_per_cpu_s": round(megabytes / median, 1),
        "mb_per_wall_s": round(megabytes / wall_median, 1),
        "cpu_s_median": round(median, 5),
        "cpu_s_min": round(cpu[0], 5),
        "cpu_s_max": round(cpu[-1], 5),
        "spread_percent": round(100 * (cpu[-1] - cpu[0]) / median, 1),
        "wall_spread_percent": round(100 * (wall[-1] - wall[0]) / wall_median, 1),
    }


def in_new_process(module: str, function: str, *arguments: str) -> dict[str, Any]:
    """Call `module.function(*arguments)` in a fresh process and return the dict that it returns."""
    call = f"import json, sys; from {module} import {function} as f; print(json.dumps(f(*sys.argv[1:])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    tree: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return tree


def in_new_process_tree(module: str, function: str, tree: dict[str, Any]) -> dict[str, Any]:
    """`in_new_process` of a function that takes one dict."""
    return in_new_process("mimscale.bench.measure", "call_with_tree", module, function, json.dumps(tree))


def call_with_tree(module: str, function: str, tree: str) -> Any:
    """Call `module.function(tree)`, in the process that `in_new_process_tree` started."""
    return getattr(importlib.import_module(module), function)(json.loads(tree))


def surroundings() -> dict[str, Any]:
    """Hardware, driver, versions and commit: what a number is worth nothing without."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"^model name\s*:\s*(.+)$", cpu_info, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    libraries = ("numpy", "numcodecs", "crc32c", "imagecodecs", "zarr", "pyarrow", "nibabel", "isal")
    packages = (*libraries, "torch", "deepspeed", "monai", "mimscale")
    return {
        "cpu": cpu[1] if cpu else "unknown",
        "cores_used": sorted(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "simd": sorted(set(re.findall(r"\bavx\w*", cpu_info)))[:8],
        "gpu_driver": (driver := gpu_driver_version()),
        "nccl": None if driver is None else nccl_version(),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _git("rev-parse", "--short", "HEAD").strip(),
        "changed_files": len(_git("status", "--short", "-uno").splitlines()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def gpu_driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Version of NVIDIA's kernel module, or None where none is loaded."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", file.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown"


def nccl_version() -> str | None:
    """Version of the NCCL that torch uses, or None where torch has none."""
    import torch  # takes seconds, and only a machine with a GPU asks

    if not torch.distributed.is_nccl_available():
        return None
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout


def results_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--hardware", default="unnamed", help="short name of the machine, for the result's file name")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contender, after one warm-up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser


def write_result(folder: Path, benchmark: str, hardware: str, tree: dict[str, Any], text: str) -> Path:
    """Write `<benchmark>_<hardware>_<yyyymm>.json` and the same for a person as .md."""
    stem = folder / f"{benchmark}_{hardware}_{datetime.now(UTC):%Y%m}"
    durable.write_json(stem.with_suffix(".json"), {"schema_version": SCHEMA_VERSION, "benchmark": benchmark, **tree})
    durable.write_text(stem.with_suffix(".md"), text)
    return stem.with_suffix(".md")


def range_text(values: Sequence[float]) -> str:
    """Of a table: [low, median, high] as the median, and in brackets the others."""
    low, median, high = values
    return f"{median:.3f} ({low:.2f} to {high:.2f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [list(map(str, columns)), ["---"] * len(columns), *(list(map(str, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def megabytes(array: NDArray[Any]) -> float:
    """Size of an array in MB (10^6 bytes)."""
    return array.nbytes / 1e6
