"""Ingest: conversion speed and memory, stored size, and what grows with the number of volumes.

    taskset -c 1 python benchmarks/bench_ingest.py --hardware my_cpu

One core, one worker. All contenders run in this process, in turn, so that ratios hold on a machine that others use too.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ingest_conversion as conversion
import ingest_scale as scale
import numpy as np
from ingest_volumes import kinds, synthetic_ct, tiled_ct

from mimscale.bench import measure

TARGETS = {
    "from .nii.gz": "40 MB/s of raw voxels a core, zstd, everything included",
    "from .nii": "60 MB/s of raw voxels a core, zstd, everything included",
    "memory": "below 4 times the largest volume a worker",
    "size": "within 5 % of the smallest Blosc preset",
    "merge": "100 000 receipts in less than 60 s",
    "manifest": "the plan's columns of 400 000 rows in less than 1 s and 400 MB",
}


def main() -> int:
    parser = measure.results_arguments("Benchmark of mimscale ingest.")
    parser.add_argument("--receipts", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these of the volumes that there are")
    parser.add_argument(
        "--mb-a-run", type=float, default=60, help="raw voxels of a timed ingest, so that little is fixed"
    )
    parser.add_argument("--edge-factor", type=int, default=2, help="memory is measured on a CT of 33 MB x this squared")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) > 1:
        print("not pinned to one core (taskset -c N): the figures are still of one process", file=sys.stderr)
    surroundings = measure.surroundings()  # before: the code that runs is that of this commit
    with tempfile.TemporaryDirectory(prefix="bench_ingest_") as name:
        results = _run(Path(name), arguments)
    tree = {"surroundings": surroundings, "config": _config(arguments), "targets": TARGETS, **results}
    path = measure.write_result(arguments.out, "ingest", arguments.hardware, tree, as_markdown(tree))
    print(path.read_text())
    return 0


def _config(arguments: Any) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(arguments).items() if name != "out"},
        "chunk_voxels": conversion.CHUNK_VOXELS,
    }


def _run(folder: Path, arguments: Any) -> dict[str, Any]:
    results: dict[str, Any] = {"volumes": {}, "conversion": {}, "pieces": {}, "sizes": {}}
    for kind in kinds():
        if arguments.kinds and kind.name not in arguments.kinds:
            continue
        print(f"{kind.name} ...", file=sys.stderr)
        place = folder / kind.name
        place.mkdir()
        results["volumes"][kind.name] = {"shape_xyz": kind.voxels.shape, "mb": measure.megabytes(kind.voxels)}
        results["conversion"][kind.name] = conversion.conversion(place, kind, arguments.mb_a_run, arguments.repeats)
        results["pieces"][kind.name] = conversion.pieces(place, kind, arguments.repeats)
        results["sizes"][kind.name] = conversion.sizes(conversion.store_order(kind), kind.modality)
    print("memory ...", file=sys.stderr)
    results["memory"] = _memory(folder, arguments.edge_factor)
    print("merge and manifest ...", file=sys.stderr)
    results["merge"] = scale.merge_receipts(folder / "merge", arguments.receipts)
    large = folder / "large"
    results["manifest"] = scale.write_large_manifest(large, arguments.rows)
    results["manifest"]["imports"] = measure.in_new_process("ingest_scale", "imports_alone")
    for columns in ("plan", "training", "all"):
        opened = [
            measure.in_new_process("ingest_scale", "open_manifest", str(large), columns)
            for _ in range(arguments.repeats)
        ]
        results["manifest"][columns] = sorted(opened, key=lambda one: one["seconds"])[len(opened) // 2]
    results["inspect"] = measure.in_new_process("ingest_scale", "describe", str(large))
    return results


def _memory(folder: Path, edge_factor: int) -> dict[str, Any]:
    """Peak of a process that ingests one volume, beyond the peak of one that ingests a tiny one, in volumes."""
    results = {}
    large, tiny = tiled_ct(edge_factor), synthetic_ct((32, 32, 32))
    for name, dtype, suffix, labelled in (
        ("int16 .nii", np.int16, ".nii", False),
        ("int16 .nii.gz", np.int16, ".nii.gz", False),
        ("int16 .nii.gz with a label map", np.int16, ".nii.gz", True),
        ("float32 .nii.gz", np.float32, ".nii.gz", False),
    ):
        peaks = []
        for voxels in (tiny, large):
            place = Path(tempfile.mkdtemp(dir=folder))
            # A third makes fractions of whole numbers: they are kept as float32.
            scaled = voxels if dtype == np.int16 else voxels.astype(dtype) / np.float32(3)
            sources = json.dumps(conversion.write_ct(place, scaled, suffix, labelled=labelled))
            peaks.append(measure.in_new_process("ingest_conversion", "memory_of_ingest", str(place), sources)["bytes"])
            shutil.rmtree(place)
        results[name] = {
            "raw_bytes": scaled.nbytes,
            "peak_bytes": peaks[1],
            "peak_of_tiny_bytes": peaks[0],
            "times_volume": round((peaks[1] - peaks[0]) / scaled.nbytes, 2),
        }
    return results


def as_markdown(tree: dict[str, Any]) -> str:
    """The result for a person."""
    where, presets = tree["surroundings"], ("zstd", "fast")
    text = f"# Ingest on {where['cpu']}, {where['time'][:10]}, commit {where['commit']}\n\n"
    text += f"One process on one of {where['cores']} cores, load average {where['load_average']:.1f}; "
    text += (
        f"median of {tree['config']['repeats']} runs after a warm-up. MB are 10^6 bytes of raw voxels, seconds those "
    )
    text += "of the processor: others used the machine too.\n\n"
    text += "## `mimscale ingest`, from planning to the manifest, MB/s of a core (spread; by the wall clock)\n\n"
    columns = [f"{suffix} {codec}" for suffix in (".nii", ".nii.gz") for codec in presets]
    rows = [[kind, *(_speed(one[name]) for name in columns)] for kind, one in tree["conversion"].items()]
    text += measure.table(["volume", *columns], rows)
    text += "\nTargets: 60 from .nii, 40 from .nii.gz, at zstd.\n\n## Its pieces alone, MB/s of a core\n\n"
    kinds_ = list(tree["pieces"])
    names = list(next(iter(tree["pieces"].values())))
    rows = [[name, *(f"{tree['pieces'][kind][name]['mb_per_cpu_s']:.0f}" for kind in kinds_)] for name in names]
    text += measure.table(["piece", *kinds_], rows) + "\n## Stored size, MB\n\n"
    names = list(next(iter(tree["sizes"].values()))["stored_bytes"])
    rows = [[name, *(f"{tree['sizes'][kind]['stored_bytes'][name] / 1e6:.2f}" for kind in kinds_)] for name in names]
    for preset in presets:
        ours = [tree["sizes"][kind]["ours"][preset] for kind in kinds_]
        cells = [f"{one['settings']}: {one['above_best_percent']:+.1f} %, ratio {one['ratio']}" for one in ours]
        rows.append([f"**chosen by preset {preset}**", *cells])
    text += measure.table(["Blosc settings", *kinds_], rows)
    memory, merge, manifest = tree["memory"], tree["merge"], tree["manifest"]
    text += "\nTarget for zstd: within 5 % of the smallest.\n\n## Memory and scale\n\n"
    rows = [
        *([f"memory of a worker, {name}, in volumes", one["times_volume"], "below 4"] for name, one in memory.items()),
        [f"merge of {merge['receipts']} receipts, s", merge["seconds"], "below 60"],
        ["Python with numpy and pyarrow alone, MB", manifest["imports"]["peak_mb"], ""],
    ]
    for name, target in (("plan", "below 1; below 400"), ("training", ""), ("all", "")):
        opened = f"{manifest[name]['seconds']}; {manifest[name]['peak_mb']}"
        rows.append([f"{manifest['rows']} rows, {name} columns: s; MB", opened, target])
    rows.append(["one sample row, us", manifest["training"]["row_us"], ""])
    rows.append([f"inspect of {manifest['rows']} volumes without receipts, s", tree["inspect"]["seconds"], ""])
    return text + measure.table(["what", "measured", "target"], rows)


def _speed(rate: dict[str, float]) -> str:
    return f"{rate['mb_per_cpu_s']:.0f} ({rate['spread_percent']:.0f} %; {rate['mb_per_wall_s']:.0f})"


if __name__ == "__main__":
    raise SystemExit(main())
