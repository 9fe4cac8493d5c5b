"""The estimates of `mimscale plan` beside what this machine measures.

Sizes, FLOPs and kept activations are those of packaged recipes, on tensors without numbers. Peaks and files are those
of small runs on real ranks. A save, the loader and steps are timed: there the machine matters, and what the planner
would ask a user for (speed of the disk, of products, of the reader) is measured in the same run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training import synthetic_store

from mimscale.bench import measure, peak, plan, shapes
from mimscale.bench.estimate import Assumptions, Cluster, estimate
from mimscale.bench.gpus import Gpu
from mimscale.bench.step import Setting, engine_step
from mimscale.bench.verbs import bench_config
from mimscale.config import config_tree
from mimscale.store.manifest import load_manifest
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import join_ranks, leave_ranks
from mimscale.train.size import checkpoint_bytes, run_flops, save_seconds
from mimscale.world import World

PRODUCT_EDGE = 1536
QUICK_RECIPES, QUICK_CASES = ("ViT-B/16", "UNETR"), {2: ("MAE, bf16", "UNETR, fp32")}
SAVED, QUICK_SAVED = "pretrain_mae_vit_b", "pretrain_mae_vit_s"
READ = ["pretrain_mae_vit_b", "modality=null", "micro_batch=4", "global_batch=4"]
LOADER_MODES: dict[str, dict[str, Any]] = {
    "random origins": {"align_voxels": 1},
    "four crops of a region": {"align_voxels": 32, "region_voxels": [128, 128, 128]},
}
SMALL = [
    "pretrain_mae_vit_b",
    "crop_voxels=[64,64,64]",
    "patch_voxels=[8,8,8]",
    "model={dim: 384, heads: 6}",
    "mae={decoder_dim: 192, decoder_heads: 3}",
]
# Of the first it is measured which share of the machine's products a step reaches; of the others the step is predicted.
STEPS: dict[str, tuple[list[str], int]] = {
    "ViT-S 64/8": (SMALL, 8),
    "ViT-B 96/16": (["pretrain_mae_vit_b"], 4),
    "ViT-B 96/8": (["pretrain_mae_vit_b", "patch_voxels=[8,8,8]"], 1),
}
QUICK_STEPS: dict[str, tuple[list[str], int]] = {
    "ViT-S 64/8": (SMALL, 1),
    "ViT-S 64/16": ([*SMALL, "patch_voxels=[16,16,16]"], 4),
}


def main() -> int:
    parser = measure.results_arguments("The planner's estimates beside measurements.")
    parser.add_argument("--quick", action="store_true", help="fewer recipes and runs, smaller ones: under a minute")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: TMPDIR)")
    parser.add_argument("--ranks-to", type=Path, help="internal: this process is a rank, and its peaks go there")
    arguments = parser.parse_args()
    if arguments.ranks_to is not None:
        return _be_rank(arguments.ranks_to, arguments.quick)
    surroundings = measure.surroundings()
    rows = _sizes(arguments.quick)
    for ranks in _cases(arguments.quick):
        rows += _peaks(ranks, arguments.quick)
    saves, disk = _saves(arguments)
    loader, reader = _loader(arguments)
    steps, products = _steps(arguments)
    tree = {
        "surroundings": surroundings,
        "config": {key: value for key, value in vars(arguments).items() if key not in ("out", "ranks_to", "folder")},
        "assumed": {**disk, **reader, **products},
        "rows": [*rows, *saves, *loader, *steps],
    }
    path = measure.write_result(arguments.out, "plan", arguments.hardware, tree, _as_markdown(tree))
    print(path.read_text())
    return 0


def row(
    what: str, name: str, unit: str, estimate: float, measured: float, most_miss: float | None = None
) -> dict[str, Any]:
    """An estimate beside its measurement.

    Args:
        what: is estimated; rows of one `what` stand together.
        name: of which run or recipe.
        unit: of both numbers.
        estimate: the planner's.
        measured: here.
        most_miss: share of the measured value by which the estimate may miss it; None where no limit was asked for.
    """
    ratio = estimate / measured
    holds = None if most_miss is None else abs(ratio - 1) <= most_miss
    return {
        "what": what,
        "name": name,
        "unit": unit,
        "estimate": float(f"{estimate:.6g}"),
        "measured": float(f"{measured:.6g}"),
        "ratio": round(ratio, 4),
        "most_miss": most_miss,
        "holds": holds,
    }


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _sizes(quick: bool) -> list[dict[str, Any]]:
    rows: dict[str, list[dict[str, Any]]] = {}

    def add(what: str, *pair: Any) -> None:
        rows.setdefault(what, []).append(row(what, *pair))

    for name in QUICK_RECIPES if quick else shapes.RECIPES:
        _say(f"sizes of {name}")
        config = shapes.config_of(name)
        planned, counted = shapes.planned_sizes(config), shapes.counted_sizes(config)
        add("parameters", name, "M", planned.parameters / 1e6, counted.parameters / 1e6, 0.0)
        flops = (planned.flops / 1e9, counted.flops / 1e9)
        add("FLOPs of a sample", name, "GFLOP", *flops, shapes.MOST_MISS)
        for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            sizes = (shapes.planned_kept_bytes(config, dtype) / 1e6, shapes.kept_bytes(config, dtype) / 1e6)
            add(f"kept activations of a sample, {precision}", name, "MB", *sizes, shapes.MOST_MISS)
    return [one for of_kind in rows.values() for one in of_kind]


def _cases(quick: bool) -> dict[int, dict[str, list[dict[str, Any]]]]:
    if not quick:
        return peak.CASES
    return {ranks: {name: peak.CASES[ranks][name][:1] for name in names} for ranks, names in QUICK_CASES.items()}


def title_of(kind: str, ranks: int, case: str) -> str:
    """What a `peak` or `checkpoint` of a small run is called."""
    title = {"peak": "peak of a rank", "checkpoint": "files of a checkpoint"}[kind]
    return f"{title}, {ranks} rank{'s' if ranks > 1 else ''}, {case}"


def _peaks(ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Peaks of a rank and files of all, of small runs on so many ranks."""
    _say(f"memory of {ranks} rank(s)")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="bench_plan_") as folder:
        out = Path(folder) / "peaks.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--ranks-to", str(out), *(["--quick"] if quick else [])]
        subprocess.run(command, stdout=sys.stderr, check=True, env=environment)
        measured = iter(json.loads(out.read_text()))
    rows: dict[str, list[dict[str, Any]]] = {"peak": [], "checkpoint": []}
    for case, trees in _cases(quick)[ranks].items():
        for tree in trees:
            name = f"ZeRO-{tree['engine']['zero_stage']}"
            for kind, sizes in peak.against_estimates(tree, ranks, next(measured)).items():
                megabytes = [size / 1e6 for size in sizes]
                rows[kind].append(row(title_of(kind, ranks, case), name, "MB", *megabytes, peak.MOST_MISS))
    return rows["peak"] + rows["checkpoint"]


def _be_rank(out: Path, quick: bool) -> int:
    ranks = join_ranks(World.from_environment(os.environ))
    try:
        trees = [tree for trees in _cases(quick)[ranks.world.size].values() for tree in trees]
        measured = peak.measure_cases(trees, ranks)
    finally:
        leave_ranks()
    if ranks.is_first:
        out.write_text(json.dumps(measured))
    return 0


def _saves(arguments: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A checkpoint on disk, and a save for which training waits, as before the end of a job."""
    recipe = QUICK_SAVED if arguments.quick else SAVED
    config = bench_config([recipe], needs_store=False)
    repeats = 1 if arguments.quick else arguments.repeats
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="bench_plan_", dir=arguments.folder) as folder:
        _say("speed of the disk")
        megabytes = checkpoint_bytes(config) / 1e6
        written = [_write_mb_per_s(Path(folder), megabytes) for _ in range(repeats)]
        _say(f"saves of {recipe}")
        command = [sys.executable, "-m", "mimscale.cli", "bench", "checkpoint", recipe, "--json", f"--folder={folder}"]
        command.append(f"--repeats={repeats}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
        assert done.returncode in (0, 1), f"bench checkpoint ended with {done.returncode}"  # 1: its target was missed
        result = json.loads(done.stdout.splitlines()[-1])
        written += [_write_mb_per_s(Path(folder), megabytes) for _ in range(repeats)]
    speed = statistics.median(written)
    sizes = (checkpoint_bytes(config) / 1e6, result["checkpoint_bytes"] / 1e6)
    seconds = (save_seconds(config, 1, speed), statistics.median(result["stall_s"]["sync"]))
    rows = [
        row("a checkpoint on disk", recipe, "MB", *sizes, peak.MOST_MISS),
        row("a save for which training waits", recipe, "s", *seconds),
    ]
    return rows, {"write_mb_per_s": round(speed), "write_mb_per_s_of_runs": [round(one) for one in written]}


def _write_mb_per_s(folder: Path, megabytes: float) -> float:
    """Of one file with fsync, as a checkpoint's are written."""
    block = np.random.default_rng(1).bytes(16_000_000)
    path = folder / "written"
    began_s = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, round(megabytes / 16))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds, size = time.perf_counter() - began_s, path.stat().st_size
    path.unlink()
    return size / 1e6 / seconds


def _loader(arguments: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A core of the loader: what half a second of the reader alone lets the planner expect, and one worker.

    By processor time, as the planner takes it: others on the machine disturb it least.
    """
    seconds, edge = (0.5, 160) if arguments.quick else (3.0, 256)
    repeats = 1 if arguments.quick else arguments.repeats
    cores = sorted(os.sched_getaffinity(0))
    rows, shares = [], {}
    with tempfile.TemporaryDirectory(prefix="bench_plan_") as folder:
        _say("a store")
        store = synthetic_store(Path(folder), edge)
        for name, stream in LOADER_MODES.items():
            _say(f"loader, {name}")
            options = {"crops_per_volume": 4, "workers": 1, **stream}
            config = bench_config([*READ, f"store={store}", f"stream={json.dumps(options)}"])
            tree = {"config": config_tree(config), "workers": 1, "cores": cores, "seconds": seconds}
            expected, found = [], []
            for _ in range(repeats):  # in turn: what else the machine does hits both
                expected.append(plan.read_quickly(config, load_manifest(store)).crops_per_s)
                rate = measure.in_new_process_tree("mimscale.bench.loader", "loader_rate_of_tree", tree)
                found.append(1e3 / rate["cpu_ms_per_crop"])  # of all processes, by the time of a processor
            gigabytes = np.prod(config.crop_voxels) * 2 / 1e9  # int16
            pair = (statistics.median(expected), statistics.median(found))
            rows.append(row("a core of the loader", name, "GB/s", *(rate * gigabytes for rate in pair)))
            shares[name] = round(plan.WORKER_OF_READER * pair[1] / pair[0], 3)
    return rows, {"worker_of_reader": plan.WORKER_OF_READER, "worker_of_reader_measured": shares}


def _steps(arguments: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Steps a second of one rank, by the machine's products and the share of them that another network reaches.

    On one thread and by processor time, which others on the machine disturb least.
    """
    torch.set_num_threads(1)
    wanted = QUICK_STEPS if arguments.quick else STEPS
    repeats = 2 if arguments.quick else arguments.repeats
    configs = {
        name: bench_config(
            [*words, f"micro_batch={batch}", f"global_batch={batch}", "engine={zero_stage: 1, precision: fp32}"],
            needs_store=False,
        )
        for name, (words, batch) in wanted.items()
    }
    ranks = join_ranks(World())
    try:
        calls = {}
        for name, config in configs.items():
            _say(f"steps of {name}")
            calls[name] = engine_step(Setting(config, 1, ranks), zero_stage=1)
            calls[name]()  # makes the moments
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        products = []
        for _ in range(repeats):
            products.append(_product_flops_per_s())
            for name, call in calls.items():
                seconds[name].append(_processor_s(call))
    finally:
        leave_ranks()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rate = statistics.median(products)
    first, *others = configs
    of_peak = _hardware_flops(configs[first]) / medians[first] / rate
    cluster = Cluster(gpu_name="this CPU", gpu=_as_gpu(rate), nodes=1, gpus_per_node=1)
    rows = []
    for name in others:
        expected = estimate(configs[name], cluster, Assumptions(of_peak=of_peak))["step"]["steps_per_s"]
        rows.append(row(f"steps a second, share of {first}", name, "steps/s", expected, 1 / medians[name]))
    return rows, {
        "gflops_per_s": round(rate / 1e9, 1),
        "of_peak": round(of_peak, 3),
        "of_peak_measured_with": first,
    }


def _processor_s(call: Callable[[], object]) -> float:
    """Processor time of a call."""
    began_s = time.process_time()
    call()
    return time.process_time() - began_s


def _product_flops_per_s() -> float:
    """The best rate of one large square product."""
    left, right, out = (torch.randn(PRODUCT_EDGE, PRODUCT_EDGE) for _ in range(3))
    return 2 * PRODUCT_EDGE**3 / min(_processor_s(lambda: torch.mm(left, right, out=out)) for _ in range(7))


def _hardware_flops(config: PretrainConfig) -> int:
    """Of a step."""
    return config.global_batch * sum(part.hardware for part in run_flops(config).values())


def _as_gpu(flops_per_s: float) -> Gpu:
    """This machine, as the planner's table describes a GPU."""
    return Gpu(
        device_name="cpu",
        bf16_tflops=flops_per_s / 1e12,
        fp32_tflops=flops_per_s / 1e12,
        memory_gib=measure.surroundings()["memory_gib"],
        peer_gb_per_s=1,  # never asked for: there is one rank
        network_gb_per_s=1,
        source="a large product, measured",
    )


def _as_markdown(tree: dict[str, Any]) -> str:
    where, assumed = tree["surroundings"], tree["assumed"]
    text = f"# Estimates of `mimscale plan` on {where['cpu']}, {where['time'][:10]}, commit {where['commit']}, load "
    text += f"average {where['load_average']:.1f} at the start\n\n"
    text += f"Measured for the estimates: the disk writes {assumed['write_mb_per_s']} MB/s; products run at "
    text += f"{assumed['gflops_per_s']} GFLOP/s on one thread, of which a step of "
    text += (
        f"{assumed['of_peak_measured_with']} reaches {100 * assumed['of_peak']:.0f} %. The planner takes a worker for "
    )
    text += f"{assumed['worker_of_reader']} of its reader; here it is "
    shares = assumed["worker_of_reader_measured"].items()
    text += f"{', '.join(f'{share:.2f} ({name})' for name, share in shares)}.\n\n"
    cells = [
        [
            one["what"],
            one["name"],
            f"{one['estimate']:.5g} {one['unit']}",
            f"{one['measured']:.5g} {one['unit']}",
            f"{one['ratio']:.3f}",
            "" if one["most_miss"] is None else f"{100 * one['most_miss']:.0f} %",
            "" if one["holds"] is None else "yes" if one["holds"] else "no",
        ]
        for one in tree["rows"]
    ]
    columns = ["estimate of", "", "estimate", "measured", "estimate / measured", "may miss by", "holds"]
    return text + measure.table(columns, cells)


if __name__ == "__main__":
    raise SystemExit(main())
