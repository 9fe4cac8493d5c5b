"""Sections that `readme_section.py` writes besides that on performance: estimates, the stream, thousands of ranks.

A result comes as (path of its JSON, the JSON); `Found` are the newest of each benchmark and machine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimscale.bench.measure import table

Found = Sequence[tuple[Path, dict[str, Any]]]

PEERS = ("zarr-python", "zarrs", "tensorstore", "blosc2 (nnU-Net)")
STREAM_LOADERS = ("random origins", "four crops of a region")


def of_readme(found: Found) -> dict[str, str]:
    """Section -> its text, in README.md; empty where there is no result."""
    return {"stream": stream(_of("stream", found)), "plan": _each(plan, _of("plan", found))}


def of_benchmarks_readme(found: Found) -> dict[str, str]:
    """The same of benchmarks/README.md."""
    return {"simulation": _each(simulation, _of("simulate", found))}


def _of(benchmark: str, found: Found) -> Found:
    return [(path, tree) for path, tree in found if tree["benchmark"] == benchmark]


def _each(write: Any, found: Found) -> str:
    return "\n".join(f"{write(tree)}\n{_source(path, tree)}" for path, tree in found)


def _source(path: Path, tree: dict[str, Any]) -> str:
    where = tree["surroundings"]
    return (
        f"From `benchmarks/results/{path.name}`: {where['cpu']}, commit {where['commit']}, load average "
        f"{where['load_average']:.1f}.\n"
    )


def plan(tree: dict[str, Any]) -> str:
    """The planner's estimates beside measurements: a line for each kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in tree["rows"]:
        kinds.setdefault(row["what"], []).append(row)
    cells = []
    for what, rows in kinds.items():
        unit, most_miss = rows[0]["unit"], rows[0]["most_miss"]
        misses = [row["name"] for row in rows if row["holds"] is False]
        limit = "" if most_miss is None else "exact" if most_miss == 0 else f"within {100 * most_miss:.0f} %"
        cells.append(
            [
                f"{what}: {' / '.join(row['name'] for row in rows)}",
                *(" / ".join(f"{row[key]:.4g}" for row in rows) + f" {unit}" for key in ("estimate", "measured")),
                " / ".join(f"{row['ratio']:.3f}" for row in rows),
                limit,
                "" if most_miss is None else f"no: {', '.join(misses)}" if misses else "yes",
            ]
        )
    return table(["estimate of", "estimate", "measured", "estimate / measured", "asked for", "holds"], cells)


def stream(found: Found) -> str:
    """Crops a second of the machine that was measured last: each condition from its newest file."""
    found = sorted(found, key=lambda one: str(one[1]["surroundings"]["time"]))
    if not found:
        return ""
    cpu = found[-1][1]["surroundings"]["cpu"]
    of_cpu = [(path, tree) for path, tree in found if tree["surroundings"]["cpu"] == cpu]
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path, tree in of_cpu:
        newest.update(dict.fromkeys(tree["config"]["conditions"], (path, tree)))
    rows = [
        _stream_row(one, tree)
        for condition, (_, tree) in newest.items()
        for one in tree["tables"]
        if _is_main(one, condition, tree)
    ]
    columns = ["volumes", "files", "crops/s", *(f"by {peer}" for peer in PEERS), "four crops of a region", "by blosc2"]
    text = f"{table(columns, rows)}\n"
    if "warm" in newest:  # as the loader's files are
        _, tree = newest["warm"]
        gpus = [f"cores for one {gpu}, {rate} crops/s" for gpu, rate in tree["gpu_crops_per_s"].items()]
        columns = ["whole loader, warm", "workers, each with a core", "of so many readers alone", *gpus]
        text += f"{table(columns, _loader_rows(tree))}\n"
    for path, tree in dict(newest.values()).items():
        conditions = [condition for condition, (own, _) in newest.items() if own == path]
        text += f"{', '.join(conditions).capitalize()}: f{_source(path, tree)[1:]}"
    return text


def _is_main(one: dict[str, Any], condition: str, tree: dict[str, Any]) -> bool:
    edge = tree["config"]["crops"][0]
    return one["condition"] == condition and one["crop_voxels"] == [edge] * 3


def _stream_row(one: dict[str, Any], tree: dict[str, Any]) -> list[str]:
    rate = {(row["name"], row["mode"]): row["crops_per_s"] for row in one["contenders"]}
    own, region = rate["mimscale", "random"], rate["mimscale", "region_4"]
    return [
        f"{one['volumes']}, {tree['volumes'][one['volumes']]['dtype']}",
        one["condition"],
        f"{own:.0f}",
        *(f"{own / rate[peer, 'random']:.2f}" for peer in PEERS),
        f"{region:.0f}",
        f"{region / rate[PEERS[-1], 'random']:.2f}",
    ]


def _loader_rows(tree: dict[str, Any]) -> list[list[str]]:
    rows = []
    for kind in tree["volumes"]:
        for mode in STREAM_LOADERS:
            most = max(tree["loader"][f"{kind}, {mode}"], key=lambda row: int(row["workers"]))
            cores = [str(most["cores_for"][gpu]) for gpu in tree["gpu_crops_per_s"]]
            rows.append([f"{kind}, {mode}", str(most["workers"]), f"{100 * most['of_linear']:.0f} %", *cores])
    return rows


def simulation(tree: dict[str, Any]) -> str:
    """Time and memory of each part of a checkpoint by ranks."""
    rows = {(row["part"], row["ranks"]): row for row in tree["by_ranks"]}
    parts = [part for part in dict.fromkeys(part for part, _ in rows) if "ZeRO" in part]
    cells = [
        [f"{ranks:,}".replace(",", " "), *(_cost(rows[part, ranks]) for part in parts)]
        for ranks in sorted({ranks for _, ranks in rows})
    ]
    return table(["ranks", *parts], cells)


def _cost(row: dict[str, Any]) -> str:
    seconds, megabytes = row["seconds"], row["peak_bytes"] / 1e6
    time = f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
    return f"{time}, {megabytes:.1f} MB" if megabytes < 1 else f"{time}, {megabytes:.0f} MB"
