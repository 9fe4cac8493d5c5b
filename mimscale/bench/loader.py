"""The whole loader: worker processes, shared memory, batches in order, as a trainer sees it."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from mimscale.train.config import PretrainConfig
from mimscale.train.training_data import TrainingData
from mimscale.world import World


def loader_rate(config: PretrainConfig, workers: int, cores: list[int], seconds: float) -> dict[str, float]:
    """Crops a second that `workers` workers deliver when they and the trainer have `cores`; run it in a fresh process.

    Returns:
        `crops_per_s`; `cpu_ms_per_crop` of all processes together; and `consumer_cpu`, the part of a core that the
        trainer's side takes.
    """
    os.sched_setaffinity(0, cores)
    stream = dataclasses.replace(config.stream, workers=workers)
    data = TrainingData(dataclasses.replace(config, stream=stream), None)
    with data.loader(World(), 0) as loader:
        # What workers fetch ahead while they start must not count.
        for _ in range(max(1, workers) * (stream.prefetch_batches + 1)):
            next(loader)
        crops, start, cpu, workers_cpu = 0, time.perf_counter(), time.process_time(), _cpu_of_children_s()
        while time.perf_counter() - start < seconds:
            crops += len(next(loader).volume_ids)
        elapsed, consumer = time.perf_counter() - start, time.process_time() - cpu
        workers_cpu = _cpu_of_children_s() - workers_cpu
    return {
        "crops_per_s": round(crops / elapsed, 1),
        "cpu_ms_per_crop": round(1e3 * (consumer + workers_cpu) / crops, 3),
        "consumer_cpu": round(consumer / elapsed, 3),
    }


def loader_rate_of_tree(tree: dict[str, Any]) -> dict[str, float]:
    """`loader_rate` of plain values, for another process."""
    from mimscale.config import build_config

    config = build_config(PretrainConfig, tree["config"], "benchmark")
    return loader_rate(config, tree["workers"], tree["cores"], tree["seconds"])


def _cpu_of_children_s() -> float:
    """Processor seconds of the living children of this process."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])  # of user and of kernel, counted from the state on
    return ticks / os.sysconf("SC_CLK_TCK")
