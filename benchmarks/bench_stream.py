"""The stream: crops a second of our reader, its ceiling and its peers, on the same volumes, one core each.

    python benchmarks/bench_stream.py --hardware my_cpu

Needs the `bench` extra, and a C compiler for the slow file system. Volumes: a CT that is made (int16, 320^3) and real
MR (MNI152 and, where Debian's mricron-data is installed, Colin27; uint8).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import stream_peers
from ingest_volumes import Kind, kinds, synthetic_ct, write_files

from mimscale.bench import measure
from mimscale.bench.stream import (
    CEILING,
    GPU_CROPS_PER_S,
    OWN,
    OWN_ENTRIES,
    Entry,
    as_markdown,
    costs_as_markdown,
    costs_of_modes,
    loader_as_markdown,
    measure_entries,
    measure_loader,
    with_ratios,
)
from mimscale.config import build_config
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.run import ingest
from mimscale.store.manifest import load_manifest

PEERS = tuple(
    Entry(name=name, contender=f"stream_peers:{contender}", mode=mode)
    for name, contender, mode in (
        ("zarrs", "Zarrs", "random"),
        ("tensorstore", "TensorStore", "random"),
        ("blosc2 (nnU-Net)", "Blosc2", "random"),
        ("blosc2 (nnU-Net)", "Blosc2", "aligned_16"),
        ("blosc2 (nnU-Net)", "Blosc2", "region_4"),
        ("blosc2 (nnU-Net), float32", "Blosc2Float", "random"),
        ("npy, mapped", "Npy", "random"),
        ("MONAI PersistentDataset, 4 crops", "Monai", "random"),
        ("TorchIO Queue, 4 crops", "TorchIO", "random"),
        ("NIfTI, whole", "Nifti", "random"),
    )
)
# mode: name, least ratio of our crops/s to the peer's at random origins
TARGETS = (
    ("random", "zarr-python", 10.0),
    ("random", "zarrs", 1.5),
    ("random", "tensorstore", 1.0),
    ("random", "blosc2 (nnU-Net)", 1.0),
    ("random", CEILING, 0.75),
    ("region_4", "blosc2 (nnU-Net)", 2.2),
    ("aligned_16", "blosc2 (nnU-Net)", 2.2),
)
CONDITIONS = {
    "warm": "everything in the page cache",
    "once": "in the page cache, but files are opened anew for each round of at most 16 calls: as in training, hardly "
    "any crop is read twice, and a mapped file pays for the first touch of its pages",
    "cold": "page cache emptied before each round (posix_fadvise DONTNEED), files opened anew",
    "slow": "1 ms a request and 2 000 requests a second in every process's file access, files opened anew each round",
}
SLOW = {"SLOW_LATENCY_US": "1000", "SLOW_IOPS": "2000"}
CALLS_ONCE, MOST_CALLS = 16, 2000
LOADER_STREAMS: dict[str, dict[str, Any]] = {
    "random origins": {"align_voxels": 1},
    "16-aligned origins": {"align_voxels": 16},
    "four crops of a region": {"align_voxels": 32, "region_voxels": None},  # its edge: a crop's and a chunk's
}


def main() -> int:
    parser = measure.results_arguments("Benchmark of the stream.")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round; the loader takes three")
    parser.add_argument("--crops", type=int, nargs="+", default=[96, 128], help="edges; the first is the main one")
    parser.add_argument(
        "--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="of the main crop"
    )
    parser.add_argument("--ct-edge", type=int, default=320, help="edge of the CT, voxels")
    arguments = parser.parse_args()
    surroundings = measure.surroundings()
    with tempfile.TemporaryDirectory(prefix="bench_stream_") as name:
        results = _run(Path(name), arguments)
    tree = {
        "surroundings": {**surroundings, "peers": _versions()},
        "config": {**{key: value for key, value in vars(arguments).items() if key != "out"}, **SLOW},
        "gpu_crops_per_s": GPU_CROPS_PER_S,
        "targets": TARGETS,
        **results,
    }
    path = measure.write_result(
        arguments.out, "stream", arguments.hardware, tree, _as_markdown(tree, arguments.crops[0])
    )
    _draw(tree, arguments.crops[0], path.with_suffix(".png"))
    print(path.read_text())
    return 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("zarrs", "tensorstore", "blosc2", "monai", "torchio", "torch")}


def _run(folder: Path, arguments: Any) -> dict[str, Any]:
    library = folder / "slow_files.so"
    source = Path(__file__).with_name("slow_files.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    cores = sorted(os.sched_getaffinity(0))
    results: dict[str, Any] = {"volumes": {}, "tables": [], "loader": {}}
    for kind, volumes in (("ct", [_ct(arguments.ct_edge)]), ("mr", _mr())):
        place = folder / kind
        store = _store(place, kind, volumes)
        rows = tuple(range(len(load_manifest(store))))
        copies = place / "copies"
        copies.mkdir()
        sizes = stream_peers.prepare(store, list(rows), copies)
        shapes = load_manifest(store).column("shape").tolist()
        results["volumes"][kind] = {"shapes_czyx": shapes, "dtype": str(volumes[0].voxels.dtype), "mb": sizes}
        for crop in arguments.crops:
            job = {
                "store": str(store),
                "rows": rows,
                "crop_voxels": (crop,) * 3,
                "folder": str(copies),
                "core": cores[-1],
            }
            for condition in arguments.conditions if crop == arguments.crops[0] else ["warm"]:
                print(f"{kind} {crop} {condition} ...", file=sys.stderr)
                results["tables"].append(_table(kind, job, condition, library, place, arguments))
        for name, stream in LOADER_STREAMS.items():
            print(f"{kind} loader, {name} ...", file=sys.stderr)
            tree = _training(store, arguments.crops[0], stream)
            results["loader"][f"{kind}, {name}"] = measure_loader(tree, cores, 3 * arguments.seconds)
    return results


def _table(
    kind: str, job: dict[str, Any], condition: str, library: Path, place: Path, arguments: Any
) -> dict[str, Any]:
    slow = {"LD_PRELOAD": str(library), "SLOW_FOLDER": str(place), **SLOW} if condition == "slow" else {}
    entries = [entry for entry in (*OWN_ENTRIES, *PEERS) if condition == "warm" or not entry.in_memory]
    rows = measure_entries(
        entries,
        {**job, "slow": slow},
        repeats=arguments.repeats,
        round_s=arguments.seconds,
        reopen=condition != "warm",
        drop=condition in ("cold", "slow"),
        most_calls=CALLS_ONCE if condition == "once" else MOST_CALLS,
    )
    rows = with_ratios(rows, job["crop_voxels"])
    return {
        "volumes": kind,
        "crop_voxels": job["crop_voxels"],
        "condition": condition,
        "load_average": os.getloadavg()[0],
        "contenders": rows,
        "modes": costs_of_modes(job, rows),
        "targets": _against_targets(rows) if condition in ("warm", "once") else [],
    }


def _against_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rate = {(row["name"], row["mode"]): row["crops_per_s"] for row in rows}
    cpu_ms = {(row["name"], row["mode"]): row["cpu_ms_per_crop"] for row in rows}
    reached = []
    for mode, peer, least in TARGETS:
        if (peer, "random") not in rate:
            continue
        ratio = round(rate[OWN, mode] / rate[peer, "random"], 2)
        cpu_ratio = round(cpu_ms[peer, "random"] / cpu_ms[OWN, mode], 2)
        reached.append(
            {
                "mode": mode,
                "peer": peer,
                "least": least,
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "reached": ratio >= least,
            }
        )
    return reached


def _ct(edge: int) -> Kind:
    voxels = synthetic_ct((edge, edge, edge))
    return Kind("ct", "ct", voxels, np.diag([-0.8, -0.8, 1.0, 1.0]))


def _mr() -> list[Kind]:
    return [kind for kind in kinds() if kind.modality == "mr" and kind.voxels.dtype == np.uint8]


def _store(place: Path, modality: str, volumes: list[Kind]) -> Path:
    """A store of preset `fast` made by `mimscale ingest`: four volumes, shifted copies of each kind."""
    sources = place / "sources"
    sources.mkdir(parents=True)
    paths = [path for kind in volumes for path in write_files(kind, sources, 4 // len(volumes), ".nii")]
    tree = {"sources": paths, "out": str(place / "store"), "modality": modality, "codec": "fast", "workers": 1}
    summary = ingest(build_config(IngestConfig, {**tree, "val_fraction": 0.0, "parts": 1}, "benchmark"))
    assert summary["stored"] == len(paths), summary
    return place / "store"


def _training(store: Path, crop: int, stream: dict[str, Any]) -> dict[str, Any]:
    """A pretraining config as plain values: micro-batches of four crops."""
    if "region_voxels" in stream:
        stream = {**stream, "region_voxels": [crop + stream["align_voxels"]] * 3}
    return {
        "store": str(store),
        "run_dir": "none",
        "steps": 1,
        "global_batch": 4,
        "micro_batch": 4,
        "crop_voxels": [crop] * 3,
        "patch_voxels": [16] * 3,
        "stream": {"crops_per_volume": 4, "workers": 1, **stream},
    }


def _as_markdown(tree: dict[str, Any], main_crop: int) -> str:
    where = tree["surroundings"]
    text = f"# Stream on {where['cpu']}, {where['time'][:10]}, commit {where['commit']}\n\n"
    text += "Each contender in a process of its own on one core, all in turn, median of "
    text += f"{tree['config']['repeats']} rounds of {tree['config']['seconds']} s after a warm-up. Preset `fast`. "
    text += "CPU time a crop is what a busy machine disturbs least. MB/crop: by system calls (a mapped file has none); "
    text += "decoded: voxels decompressed or converted for each voxel of the crop. "
    text += f"Load average {where['load_average']:.1f}.\n"
    for kind, volumes in tree["volumes"].items():
        sizes = ", ".join(f"{name} {size}" for name, size in volumes["mb"].items())
        text += f"\n{kind}: {volumes['dtype']} {volumes['shapes_czyx']}; MB: {sizes}\n"
    for table in tree["tables"]:
        text += f"\n## {table['volumes']}, {table['crop_voxels'][0]}^3, {table['condition']}: "
        text += f"{CONDITIONS[table['condition']]}\n\n{as_markdown(table['contenders'])}"
        if table["targets"]:
            cells = [
                [one["mode"], one["peer"], f"{one['ratio']:.2f}", one["least"], "yes" if one["reached"] else "no"]
                for one in table["targets"]
            ]
            text += "\n" + measure.table(
                ["mimscale's mode", "by, at random origins", "ratio", "target", "reached"], cells
            )
        if table["condition"] == "warm" and table["crop_voxels"][0] == main_crop:
            text += "\nWhat a mode costs in randomness:\n\n" + costs_as_markdown(table["modes"])
    text += "\n## The whole loader\n"
    for name, rows in tree["loader"].items():
        text += f"\n{name}\n\n{loader_as_markdown(rows)}"
    return text


def _draw(tree: dict[str, Any], crop: int, path: Path) -> None:
    """Bars of the main crop's tables, of the warm ones or of the first condition that there is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = tree["tables"][0]["condition"]
    condition = "warm" if "warm" in tree["config"]["conditions"] else first
    tables = [table for table in tree["tables"] if table["condition"] == condition and table["crop_voxels"][0] == crop]
    figure, axes = pyplot.subplots(1, len(tables), figsize=(8 * len(tables), 8), layout="constrained", squeeze=False)
    for axis, table in zip(axes[0], tables, strict=True):
        rows = sorted(table["contenders"], key=lambda row: row["crops_per_s"])
        names = [f"{row['name']}, {row['mode']}" for row in rows]
        colours = ["#1b6ca8" if row["name"] == OWN else "#bbbbbb" for row in rows]
        colours = ["#e0c068" if "ceiling" in row["name"] else colour for row, colour in zip(rows, colours, strict=True)]
        bars = axis.barh(names, [row["crops_per_s"] for row in rows], color=colours)
        axis.bar_label(bars, [f"{row['crops_per_s']:.0f}" for row in rows], padding=3)
        axis.set_xscale("log")
        axis.set_xlabel("crops a second on one core (log)")
        axis.set_title(f"{table['volumes']} {tree['volumes'][table['volumes']]['dtype']}, {crop}^3 crops, {condition}")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
