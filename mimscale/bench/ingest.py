"""How fast a recipe's sources become a store on one core; `benchmarks/bench_ingest.py` takes that apart."""

import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.bench import measure, results
from mimscale.bench.charts import Bars, draw_bars
from mimscale.config import config_tree, load_verb_config, verb_parser
from mimscale.errors import ConfigError, DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.run import ingest
from mimscale.store.manifest import load_manifest


def bench_ingest(config: IngestConfig, repeats: int) -> dict[str, Any]:
    """Ingest into a folder that is thrown away, `repeats` times, on the last core that this process may use.

    Raises:
        DataError: no source could be stored.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    walls, processor = [], []
    try:
        for number in range(repeats):
            with tempfile.TemporaryDirectory(prefix="mimscale_bench_") as folder:
                out = Path(folder) / "store"
                start, busy = time.perf_counter(), os.times()
                summary = ingest(replace(config, out=str(out), workers=1))
                walls.append(time.perf_counter() - start)
                after = os.times()
                processor.append(sum(after[:4]) - sum(busy[:4]))
                if number == 0:
                    if not summary["stored"]:
                        raise DataError(f"{config.sources}: not one source could be stored")
                    manifest = load_manifest(out)
                    rows = [manifest.sample_row(row) for row in range(len(manifest))]
                    raw_mb = sum(math.prod(row.shape) * np.dtype(row.dtype).itemsize for row in rows) / 1e6
                    stored_mb = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    finally:
        os.sched_setaffinity(0, cores)
    median = statistics.median(walls)
    return {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "ingest_recipe",
        "surroundings": measure.surroundings(),
        "config": config_tree(config),
        "volumes": len(rows),
        "quarantined": summary["quarantined"],
        "raw_mb": round(raw_mb, 2),
        "stored_mb": round(stored_mb, 2),
        "mb_per_s": round(raw_mb / median, 2),
        "mb_per_cpu_s": round(raw_mb / statistics.median(processor), 2),
        "volumes_per_s": round(len(rows) / median, 3),
        "spread_percent": round(100 * (max(walls) - min(walls)) / median, 1),
    }


def main(argv: list[str]) -> int:
    """`mimscale bench ingest RECIPE sources=... [key=value ...] [--json]`; nothing is kept."""
    parser = verb_parser(
        "bench ingest", "How fast a recipe's sources become a store on one core; the store is thrown away."
    )
    parser.add_argument("--repeats", type=int, default=3, help="whole ingests, of which the median counts")
    results.add_outputs(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats}: at least 1")
    config = load_verb_config(IngestConfig, [*arguments.words, "out=none"], needs_recipe=True)
    if results.is_for_another_rank("ingest"):
        return 0
    results.make_folder(arguments.out)
    result = bench_ingest(config, arguments.repeats)
    results.tell(result, as_markdown, draw, as_json=arguments.json, folder=arguments.out)
    return 0


def as_markdown(result: dict[str, Any]) -> str:
    """One row."""
    columns = ["volumes", "raw MB", "stored MB", "MB/s", "spread, %", "MB/s of processor time", "volumes/s"]
    names = ["volumes", "raw_mb", "stored_mb", "mb_per_s", "spread_percent", "mb_per_cpu_s", "volumes_per_s"]
    return measure.table(columns, [[result[name] for name in names]])


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars by the clock and by processor time."""
    rows = [("mimscale, by the clock", result["mb_per_s"]), ("mimscale, by processor time", result["mb_per_cpu_s"])]
    draw_bars([Bars(title=f"{result['volumes']} volume(s) on one core", unit="MB of voxels a second", rows=rows)], path)
