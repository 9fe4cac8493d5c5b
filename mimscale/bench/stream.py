"""How fast crops come out of a store: contenders in turn, each in a process of its own on one core.

`mimscale bench stream RECIPE store=STORE [key=value ...] [--json]` runs what needs no other package on a user's own
store; `benchmarks/bench_stream.py` adds the peers.
"""

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimscale import console
from mimscale.bench import measure, results
from mimscale.bench.charts import Bars, draw_bars
from mimscale.bench.contender import Crops, Job, Round, Runner
from mimscale.bench.crops import MODES, randomness
from mimscale.bench.readers import unzip_volumes
from mimscale.bench.verbs import bench_config
from mimscale.config import config_yaml, verb_parser
from mimscale.errors import ConfigError, DataError
from mimscale.store import native
from mimscale.store.manifest import load_manifest
from mimscale.train.config import PretrainConfig

OWN, CEILING = "mimscale", "ceiling: Blosc alone"
# A ViT-B MAE at 96^3 / 16^3 / 75 %, crops a second: at 40 % and 35 % of what the GPUs can compute in bf16.
GPU_CROPS_PER_S = {"A100": 1873, "H100": 5195}
_GPU_CROP_VOXELS = (96, 96, 96)
_MOST_CALLS = 2000
_WORTH_A_COLUMN_BYTES = 200_000  # a crop: less is a library that was loaded late
_NO_DATA_BYTES = 1000  # a crop: what a process reads anyway, of /proc for one


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table: one contender in one mode."""

    name: str
    contender: str  # module:class
    mode: str = "random"
    in_memory: bool = False  # reads no file, so neither cold nor slow storage means anything


OWN_ENTRIES = (
    *(Entry(name=OWN, contender="mimscale.bench.readers:OwnReader", mode=mode) for mode in MODES),
    Entry(name=f"{OWN}, nothing mapped", contender="mimscale.bench.readers:OwnReaderByCalls"),
    *(
        Entry(name=CEILING, contender="mimscale.bench.readers:Ceiling", mode=mode, in_memory=True)
        for mode in MODES
        if mode != "masks_4"
    ),
    Entry(name="zarr-python", contender="mimscale.bench.readers:ZarrPython"),
)


def measure_entries(
    entries: Sequence[Entry],
    job: dict[str, Any],
    *,
    repeats: int,
    round_s: float,
    reopen: bool = False,
    drop: bool = False,
    most_calls: int = _MOST_CALLS,
) -> list[dict[str, Any]]:
    """Time all entries in turn, `repeats` rounds of about `round_s` each after a warm-up.

    Args:
        entries: the contenders.
        job: the fields of `Job` besides contender and mode.
        repeats: rounds that count.
        round_s: how long a round should be, on average.
        reopen: open all files anew before each round.
        drop: and empty the page cache.
        most_calls: of a round.

    Returns:
        for each entry: name, mode, crops_per_s, spread_percent, cpu_ms_per_crop, and per crop: file_bytes,
        storage_bytes and amplification (voxels decoded for each voxel of the crop).
    """
    with ExitStack() as stack:
        runners = [
            stack.enter_context(Runner(Job(contender=entry.contender, mode=entry.mode, **job))) for entry in entries
        ]
        calls = [min(_calls_a_round(runner, round_s, reopen, drop), most_calls) for runner in runners]
        rounds: list[list[Round]] = [[] for _ in entries]
        for _ in range(repeats):
            for runner, count, done in zip(runners, calls, rounds, strict=True):
                done.append(runner.round(count, reopen=reopen, drop=drop))
    crop = math.prod(job["crop_voxels"])
    return [
        {"name": entry.name, "mode": entry.mode, **_summary(done, crop)}
        for entry, done in zip(entries, rounds, strict=True)
    ]


def _calls_a_round(runner: Runner, round_s: float, reopen: bool, drop: bool) -> int:
    runner.round(1, reopen=reopen, drop=drop)
    call_s = runner.round(1, reopen=reopen, drop=drop).seconds
    if call_s < round_s / 3:
        call_s = runner.round(3, reopen=reopen, drop=drop).seconds / 3
    return max(1, round(round_s / call_s))


def _summary(rounds: Sequence[Round], crop_voxels: int) -> dict[str, float]:
    rates = [one.crops / one.seconds for one in rounds]
    crops = sum(one.crops for one in rounds)
    median = statistics.median(rates)
    return {
        "crops_per_s": round(median, 2),
        "spread_percent": round(100 * (max(rates) - min(rates)) / median, 1),
        "cpu_ms_per_crop": round(1e3 * statistics.median(one.cpu_s / one.crops for one in rounds), 3),
        "file_bytes": round(sum(one.file_bytes for one in rounds) / crops),
        "storage_bytes": round(sum(one.storage_bytes for one in rounds) / crops),
        "amplification": round(sum(one.voxels_decoded for one in rounds) / crops / crop_voxels, 3),
    }


def with_ratios(rows: list[dict[str, Any]], crop_voxels: Sequence[int]) -> list[dict[str, Any]]:
    """Add `of_ceiling` (of the same mode), `times` (mimscale in the same mode by this one) and `cores_for` a GPU."""
    rate = {(row["name"], row["mode"]): row["crops_per_s"] for row in rows}
    for row in rows:
        ceiling, own = rate.get((CEILING, row["mode"])), rate.get((OWN, row["mode"]))
        row["of_ceiling"] = round(row["crops_per_s"] / ceiling, 3) if ceiling and row["name"] == OWN else None
        row["times"] = round(own / row["crops_per_s"], 2) if own and row["name"] != OWN else None
        row["cores_for"] = _cores_for(row["crops_per_s"], crop_voxels)
    return rows


def costs_of_modes(job: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each mode of ours costs in randomness, and what it trains on: mode -> numbers.

    `overlap` is between crops of one call. Crops of one volume lie in different global batches, so between the crops
    of a global batch it is 0 (`overlap_in_global_batch`), and would be `overlap` if they shared one.
    """
    crops = Crops(Job(contender="", mode="random", **job))
    shapes = [row.shape[1:] for row in crops.rows]
    voxels = math.prod(crops.size)
    costs = {}
    for row in rows:
        if row["name"] == OWN:
            cost = randomness(MODES[row["mode"]], shapes, crops.size, crops.chunk_voxels)
            distinct_voxels = cost["distinct"] * voxels
            costs[row["mode"]] = {
                **cost,
                "overlap_in_global_batch": 0.0,
                "distinct_voxels_per_s": round(distinct_voxels * row["crops_per_s"]),
                "distinct_voxels_per_byte": round(distinct_voxels / max(row["file_bytes"], 1), 3),
            }
    return costs


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of `measure_entries` with `with_ratios`, fastest first."""
    gpus = list(rows[0]["cores_for"] or ())
    stored = any(row["storage_bytes"] > _WORTH_A_COLUMN_BYTES for row in rows)
    cells = [
        [
            row["name"],
            row["mode"],
            f"{row['crops_per_s']:.0f}" if row["crops_per_s"] >= 10 else f"{row['crops_per_s']:.1f}",
            f"{row['spread_percent']:.0f} %",
            f"{row['cpu_ms_per_crop']:.2f}",
            f"{row['file_bytes'] / 1e6:.2f}" if row["file_bytes"] > _NO_DATA_BYTES else "-",
            *([f"{row['storage_bytes'] / 1e6:.2f}"] if stored else []),
            f"{row['amplification']:.2f}x",
            "" if row["of_ceiling"] is None else f"{100 * row['of_ceiling']:.0f} %",
            "" if row["times"] is None else f"{row['times']:.2f}x",
            *(str(row["cores_for"][gpu]) for gpu in gpus),
        ]
        for row in sorted(rows, key=lambda row: -row["crops_per_s"])
    ]
    columns = ["contender", "mode", "crops/s", "spread", "CPU ms/crop", "MB/crop"]
    columns += [*(["MB/crop from storage"] if stored else []), "decoded", "of ceiling", "mimscale is"]
    return measure.table([*columns, *(f"cores for one {gpu}" for gpu in gpus)], cells)


def costs_as_markdown(costs: dict[str, dict[str, float]]) -> str:
    """A table of `costs_of_modes`."""
    columns = ["mode", "overlap of crops of a call", "overlap in a global batch", "distinct voxels"]
    cells = [
        [
            mode,
            f"{100 * cost['overlap']:.0f} %",
            f"{100 * cost['overlap_in_global_batch']:.0f} %",
            f"{100 * cost['distinct']:.0f} %",
            f"{cost['distinct_voxels_per_s'] / 1e6:.0f}",
            f"{cost['distinct_voxels_per_byte']:.2f}",
        ]
        for mode, cost in costs.items()
    ]
    return measure.table([*columns, "distinct Mvoxels/s", "distinct voxels per byte read"], cells)


def measure_loader(config_tree: dict[str, Any], cores: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """The whole loader in the recipe's mode: no worker, then 1, 2 ... workers on as many cores.

    Returns:
        for each: workers, crops_per_s, cpu_ms_per_crop, consumer_cpu; `of_linear`: of that many times the rate without
        workers; and `cores_for` a GPU, by the processor time of all processes.
    """
    rows = []
    for workers in range(len(cores) + 1):
        tree = {"config": config_tree, "workers": workers, "cores": list(cores[: max(workers, 1)]), "seconds": seconds}
        rate = measure.in_new_process_tree("mimscale.bench.loader", "loader_rate_of_tree", tree)
        rows.append({"workers": workers, **rate})
    alone = rows[0]["crops_per_s"]
    for row in rows:
        row["of_linear"] = round(row["crops_per_s"] / (max(row["workers"], 1) * alone), 3)
        row["cores_for"] = _cores_for(1e3 / row["cpu_ms_per_crop"], config_tree["crop_voxels"])
    return rows


def _cores_for(crops_per_s: float, crop_voxels: Sequence[int]) -> dict[str, int] | None:
    """GPU -> cores that keep it busy; None for crops of another size than the GPUs' rates are known for."""
    if tuple(crop_voxels) != _GPU_CROP_VOXELS:
        return None
    return {gpu: math.ceil(needed / crops_per_s) for gpu, needed in GPU_CROPS_PER_S.items()}


def loader_as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of `measure_loader`."""
    gpus = list(rows[0]["cores_for"] or ())
    cells = [
        [
            row["workers"] or "none: the trainer reads",
            f"{row['crops_per_s']:.0f}",
            f"{100 * row['of_linear']:.0f} %",
            f"{row['cpu_ms_per_crop']:.2f}",
            f"{100 * row['consumer_cpu']:.0f} %",
            *(str(row["cores_for"][gpu]) for gpu in gpus),
        ]
        for row in rows
    ]
    columns = ["workers, each with a core", "crops/s", "of n x no worker", "CPU ms/crop", "trainer's CPU"]
    return measure.table([*columns, *(f"cores for one {gpu}" for gpu in gpus)], cells)


def main(argv: list[str]) -> int:
    """`mimscale bench stream RECIPE store=STORE [key=value ...] [--json]`."""
    parser = verb_parser("bench", "How fast crops come out of a store, against what limits it and stock zarr-python.")
    parser.add_argument("--volumes", type=int, default=4, help="training volumes to read from")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round; six of them for the loader")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the store before each round")
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    results.add_outputs(parser)
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.words or arguments.words[0] != "stream":
        raise ConfigError(f"expected `mimscale bench stream RECIPE store=STORE`, got {arguments.words}")
    config = bench_config(arguments.words[1:])
    if arguments.check:
        print(config_yaml(config), end="")
        return 0
    if results.is_for_another_rank("stream"):
        return 0
    folder = results.folder_of(arguments.out, config.run_dir)
    results.make_folder(folder)
    result = bench_store(config, arguments)
    results.tell(result, _text, draw, as_json=arguments.json, folder=folder)
    return 0


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of all contenders on one core, and of the loader by its workers."""
    readers = [(f"{row['name']}, {row['mode']}", row["crops_per_s"]) for row in result["contenders"]]
    loader = [(f"mimscale, {row['workers']} worker(s)", row["crops_per_s"]) for row in result["loader"]]
    panels = {"One core": readers, "The whole loader": loader}
    draw_bars([Bars(title=title, unit="crops a second", rows=rows) for title, rows in panels.items()], path)


def bench_store(config: PretrainConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that the verb measures, as its JSON tells it."""
    import yaml

    manifest = load_manifest(config.store)
    train = manifest.select(split="train", **({} if config.modality is None else {"modality": config.modality}))
    fits = train[(manifest.column("shape")[train, 1:] >= config.crop_voxels).all(axis=1)]
    if not len(fits):
        raise DataError(f"{config.store}: no training volume has room for crop_voxels={list(config.crop_voxels)}")
    rows = fits[np.linspace(0, len(fits) - 1, min(arguments.volumes, len(fits))).astype(int)]
    cores = sorted(os.sched_getaffinity(0))
    job = {
        "store": str(config.store.resolve()),
        "rows": tuple(rows.tolist()),
        "crop_voxels": config.crop_voxels,
        "core": cores[-1],
    }
    entries = [entry for entry in OWN_ENTRIES if not (arguments.cold and entry.in_memory)]
    console.say(f"{len(entries)} contenders on core {cores[-1]}, {arguments.repeats} rounds each ...")
    with tempfile.TemporaryDirectory(prefix="mimscale_bench_") as folder:
        unzip_volumes(config.store, [manifest.sample_row(row) for row in rows.tolist()], Path(folder))
        measured = measure_entries(
            entries,
            {**job, "folder": folder},
            repeats=arguments.repeats,
            round_s=arguments.seconds,
            drop=arguments.cold,
        )
    table = with_ratios(measured, config.crop_voxels)
    console.say("the whole loader ...")
    tree = yaml.safe_load(config_yaml(config))
    tree["store"] = job["store"]
    return {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "stream",
        "surroundings": measure.surroundings(),
        "chunks_decoded_by": native.description,
        "config": tree,
        "volumes": len(rows),
        "cold": arguments.cold,
        "contenders": table,
        "modes": costs_of_modes(job, table),
        "loader": measure_loader(tree, cores, 6 * arguments.seconds),
    }


def _text(result: dict[str, Any]) -> str:
    where = result["surroundings"]
    return (
        f"Crops of {result['config']['crop_voxels']} voxels on one core of {where['cpu']}, load average "
        f"{where['load_average']:.1f}; chunks are decoded by {result['chunks_decoded_by']}\n\n"
        f"{as_markdown(result['contenders'])}\n{costs_as_markdown(result['modes'])}\n"
        f"The recipe's own mode, through the whole loader:\n\n{loader_as_markdown(result['loader'])}"
    )
