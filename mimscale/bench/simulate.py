"""What grows with ranks or volumes, in one process for 512 nodes of 8 GPUs: processor seconds and memory of each part.

What rank 0 of thousands computes can be computed by anybody: the order of the samples here, what a start does once in
`mimscale.bench.simulate_start`, a checkpoint, whose other ranks are fakes, in `mimscale.bench.simulate_checkpoint`.
"""

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from mimscale.bench import measure, results
from mimscale.bench.charts import Lines, draw_lines
from mimscale.bench.figures import spread_percent
from mimscale.errors import ConfigError
from mimscale.stream.config import StreamConfig
from mimscale.stream.crops import Volumes
from mimscale.stream.plan import SamplePlan
from mimscale.stream.staging import upcoming_packs
from mimscale.train.config import EngineConfig
from mimscale.train.deepspeed_config import deepspeed_config
from mimscale.world import World

GPUS_A_NODE, MICRO_BATCH = 8, 8
VOLUMES_A_PACK = 1000
# Above it a part grows faster than its cause. A linear one whose arrays leave the caches on the way has measured 1.26.
MOST_EXPONENT = 1.4
MOST_EXPONENT_OF_BYTES = 1.1  # the same in each run
_WORTH_A_SLOPE_S = 2e-3  # what takes less is call overhead, whose slope means nothing
_LONG_ENOUGH_S = 1.0  # a part that has run for so long is not run again


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of a run."""

    ranks: int
    volumes: int

    def world(self) -> World:
        """The first rank of the last node, which no special case is made for."""
        local = min(GPUS_A_NODE, self.ranks)
        return World(rank=self.ranks - local, size=self.ranks, local_rank=0, local_size=local, node="simulated")

    def plan(self) -> SamplePlan:
        """The order of samples over volumes of many shapes."""
        shapes = 100 + np.arange(self.volumes * 3, dtype=np.int64).reshape(self.volumes, 3) % 400
        boxes = np.stack([shapes // 4, shapes * 3 // 4], axis=-1)
        return SamplePlan(
            seed=1,
            volumes=Volumes(shapes=shapes, foreground_boxes=boxes, kinds=None),
            crop_voxels=(96, 96, 96),
            config=StreamConfig(crops_per_volume=8, origins="foreground", region_voxels=(128, 128, 128)),
            global_batch=self.ranks * MICRO_BATCH,
        )


def _batches_of_a_rank(scale: Scale, plan: SamplePlan) -> object:
    world = scale.world()
    return [plan.samples(plan.rank_samples(batch, world.rank, world.size)[0]) for batch in range(16)]


def _packs_of_a_node(scale: Scale, plan: SamplePlan) -> object:
    packs = upcoming_packs(plan, scale.world(), 1, lambda volume: [Path(f"pack{volume // VOLUMES_A_PACK}")])
    return [packs(batch) for batch in range(16)]


def _engine_config(scale: Scale, plan: SamplePlan) -> object:
    return deepspeed_config(
        EngineConfig(),
        precision="bf16",
        micro_batch=MICRO_BATCH,
        accumulation=1,
        world_size=scale.ranks,
    )


PARTS: dict[str, Callable[[Scale, SamplePlan], object]] = {
    "plan of all samples": lambda scale, plan: scale.plan(),
    "hash of the plan": lambda scale, plan: scale.plan().plan_hash,
    "16 batches of a rank": _batches_of_a_rank,
    "packs of a node, 16 batches": _packs_of_a_node,
    "DeepSpeed's config": _engine_config,
}


def simulate(scales: Sequence[Scale], repeats: int = 5) -> list[dict[str, Any]]:
    """Processor seconds (best of at most `repeats`, with their spread) and peak bytes of each part at each size."""
    from mimscale.bench import simulate_checkpoint, simulate_start  # torch takes seconds, and --help needs none

    rows = []
    with ExitStack() as stores:
        store_of = {
            volumes: stores.enter_context(simulate_start.store_of(volumes))
            for volumes in sorted({scale.volumes for scale in scales})
        }
        for scale in scales:
            with ExitStack() as stack:
                plan = scale.plan()
                calls: dict[str, Callable[[], object]] = {}
                calls.update((name, partial(part, scale, plan)) for name, part in PARTS.items())
                calls |= simulate_start.parts(scale, store_of[scale.volumes])
                calls |= simulate_checkpoint.parts(scale.ranks, stack)
                for name, call in calls.items():
                    seconds, peak_bytes = _cost(call, repeats)
                    spread = spread_percent(seconds)
                    rows.append(
                        {
                            "part": name,
                            "ranks": scale.ranks,
                            "volumes": scale.volumes,
                            "seconds": float(f"{max(min(seconds), 1e-7):.4g}"),
                            "spread_percent": None if spread is None else round(spread, 1),
                            "peak_bytes": peak_bytes,
                        }
                    )
    return rows


def _cost(call: Callable[[], object], repeats: int) -> tuple[list[float], int]:
    """Processor seconds of each run, and the most that one held."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < _LONG_ENOUGH_S:
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    before_bytes = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    held = call()
    # Arrow allocates past Python; of it counts what the result holds.
    peak_bytes = tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - before_bytes
    tracemalloc.stop()
    del held
    return seconds, peak_bytes


def exponents(rows: Sequence[dict[str, Any]], by: str) -> dict[str, dict[str, float]]:
    """Of each part the exponent with which seconds and bytes grow with `by`, from the smallest to the largest size."""
    growth = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        own = sorted((row for row in rows if row["part"] == part), key=lambda row: int(row[by]))
        first, last = own[0], own[-1]
        factor = math.log(last[by] / first[by])
        slow = last["seconds"] >= _WORTH_A_SLOPE_S
        growth[part] = {
            "seconds": round(math.log(last["seconds"] / first["seconds"]) / factor, 2) if slow else 0.0,
            "bytes": round(math.log(max(last["peak_bytes"], 1) / max(first["peak_bytes"], 1)) / factor, 2),
        }
    return growth


def worse_than_linear(growth: dict[str, dict[str, float]]) -> list[str]:
    """The parts that grow faster than what they grow with."""
    return [
        part
        for part, exponent in growth.items()
        if exponent["seconds"] > MOST_EXPONENT or exponent["bytes"] > MOST_EXPONENT_OF_BYTES
    ]


def main(argv: list[str]) -> int:
    """`mimscale bench simulate [--nodes 512] [--volumes 400000] [--json] [--out FOLDER]`."""
    parser = argparse.ArgumentParser(
        prog="mimscale bench simulate", description="What grows with ranks and volumes, in one process, up to a size."
    )
    parser.add_argument("--nodes", type=int, default=512, help=f"of {GPUS_A_NODE} GPUs; the largest size")
    parser.add_argument("--volumes", type=int, default=400_000, help="the largest number of volumes")
    results.add_outputs(parser)
    arguments = parser.parse_args(argv)
    results.make_folder(arguments.out)
    result = simulated(arguments.nodes, arguments.volumes)
    results.tell(result, as_markdown, draw, as_json=arguments.json, folder=arguments.out)
    return 0


def simulated(nodes: int, volumes: int) -> dict[str, Any]:
    """All that the verb measures, as its JSON tells it.

    Raises:
        ConfigError: too few nodes for a slope, or an epoch that is smaller than a global batch at some size.
    """
    ranks = nodes * GPUS_A_NODE
    if nodes < 8 or volumes < ranks * MICRO_BATCH:
        raise ConfigError(f"--nodes {nodes} --volumes {volumes}: at least 8 nodes, and {MICRO_BATCH} volumes a rank")
    of_ranks = [Scale(ranks=ranks // part, volumes=volumes) for part in (64, 16, 4, 1) if ranks // part]
    of_volumes = [Scale(ranks=ranks // 8, volumes=volumes // part) for part in (8, 4, 2, 1)]
    by_ranks, by_volumes = simulate(of_ranks), simulate(of_volumes)
    growth = {"ranks": exponents(by_ranks, "ranks"), "volumes": exponents(by_volumes, "volumes")}
    return {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "simulate",
        "surroundings": measure.surroundings(),
        "by_ranks": by_ranks,
        "by_volumes": by_volumes,
        "exponents": growth,
        "worse_than_linear": {by: worse_than_linear(parts) for by, parts in growth.items()},
    }


def as_markdown(result: dict[str, Any]) -> str:
    """A row a part, with the largest size and the exponents."""
    cells = []
    for part in dict.fromkeys(row["part"] for row in result["by_ranks"]):
        last = [row for row in result["by_ranks"] if row["part"] == part][-1]
        exponent = {by: result["exponents"][by][part] for by in ("ranks", "volumes")}
        cells.append(
            [
                part,
                f"{1e3 * last['seconds']:.2f}",
                f"{last['peak_bytes'] / 1e6:.2f}",
                *(f"{exponent[by][what]:.2f}" for by in ("ranks", "volumes") for what in ("seconds", "bytes")),
            ]
        )
    largest = result["by_ranks"][-1]
    columns = ["part", "ms", "MB", "ms by ranks^", "MB by ranks^", "ms by volumes^", "MB by volumes^"]
    worse = sorted({part for parts in result["worse_than_linear"].values() for part in parts})
    verdict = f"worse than linear: {', '.join(worse)}" if worse else "nothing grows worse than linearly"
    return f"{largest['ranks']} ranks, {largest['volumes']} volumes\n\n{measure.table(columns, cells)}\n{verdict}\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds and bytes of each part by ranks and by volumes, both axes logarithmic."""

    def panel(by: str, key: str, unit: str, factor: float) -> Lines:
        lines = {}
        for part in dict.fromkeys(row["part"] for row in result["by_ranks"]):
            own = [row for row in result[f"by_{by}"] if row["part"] == part]
            lines[part] = [(row[by], max(row[key] * factor, 1e-6)) for row in own]
        return Lines(title=f"{unit} by {by}", x=by, y=unit, lines=lines, logarithmic=True)

    kinds = (("seconds", "processor seconds", 1.0), ("peak_bytes", "peak MB", 1e-6))
    draw_lines([[panel(by, *kind) for by in ("ranks", "volumes")] for kind in kinds], path)
