"""What a checkpoint costs: how long training stands still, written in the background and not; verifying, loading.

Beside each number stands what the machine alone takes for the same bytes (`mimscale.bench.checkpoint_ceiling`).
"""

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mimscale.bench import measure, results
from mimscale.bench.charts import Bars, draw_bars
from mimscale.bench.checkpoint_ceiling import KINDS, Ceiling
from mimscale.bench.figures import spread_percent
from mimscale.bench.verbs import bench_config
from mimscale.config import config_yaml, verb_parser
from mimscale.models.contract import CONTRACT_FILE, WEIGHTS_FILE
from mimscale.models.transfer import save_weights
from mimscale.train.build import build_pretrain
from mimscale.train.checkpoint import Checkpoints, Saved
from mimscale.train.committed import MANIFEST, PART_PREFIX, read_manifest, tags, why_not_loadable
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import Engine, joined_ranks
from mimscale.train.environment import installed_versions
from mimscale.train.ranks import Ranks
from mimscale.train.run_dir import RunDir
from mimscale.train.state import state_file
from mimscale.train.zero import shapes_of
from mimscale.world import World

MOST_STALL_PERCENT = 25.0  # of the synchronous save's: what a background save may hold up training
Mode = Literal["sync", "background"]
MODES: tuple[Mode, ...] = get_args(Mode)


def main(argv: list[str]) -> int:
    """`mimscale bench checkpoint RECIPE [--repeats N] [--folder DIR] [--json]`; 1 when it stalls for too long."""
    parser = verb_parser("bench", "How long training stands still for a checkpoint, and how long loading one takes.")
    parser.add_argument("--repeats", type=int, default=3, help="saves in each mode, after one warm-up each")
    parser.add_argument("--folder", type=Path, help="where to write: on the file system to measure (default: TMPDIR)")
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    results.add_outputs(parser)
    arguments = parser.parse_intermixed_args(argv)
    words = arguments.words[1:] if arguments.words[:1] == ["checkpoint"] else arguments.words
    config = bench_config(words, needs_store=False)
    if arguments.check:
        print(config_yaml(config), end="")
        return 0
    world, folder = World.from_environment(os.environ), results.folder_of(arguments.out, config.run_dir)
    # The saved state depends on neither; one crop a rank is the fastest step.
    config = replace(config, global_batch=world.size, micro_batch=1)
    if world.is_first:
        results.make_folder(folder)
    with joined_ranks(world, collective_timeout_min=config.engine.collective_timeout_min) as ranks:
        parent = ranks.first_does(lambda: tempfile.mkdtemp(prefix="mimscale_bench_", dir=arguments.folder))
        try:
            result = bench_checkpoints(replace(config, run_dir=Path(parent)), ranks, repeats=arguments.repeats)
        finally:
            ranks.first_does(lambda: shutil.rmtree(parent, ignore_errors=True))
    if ranks.is_first:
        results.tell(result, as_text, draw, as_json=arguments.json, folder=folder)
    return 0 if result["stall_percent"] <= MOST_STALL_PERCENT else 1


def bench_checkpoints(config: PretrainConfig, ranks: Ranks, *, repeats: int) -> dict[str, Any]:
    """All that the verb measures. A collective."""
    surroundings = measure.surroundings()  # before: the load is not that of this benchmark
    torch.manual_seed(config.seed)
    engine = Engine(build_pretrain(config, channels=1), config, ranks)
    step_s = [train_step(engine, config) for _ in range(2)][-1]  # the first also makes AdamW's moments

    def write_weights(folder: Path, step: int, weights: dict[str, Tensor]) -> list[Path]:
        save_weights(folder, weights, {"step": step})
        return [folder / WEIGHTS_FILE, folder / CONTRACT_FILE]

    run = RunDir(config.run_dir)
    keepers = {
        mode: Checkpoints(run, replace(config.checkpoint, mode=mode, keep=2), engine, ranks, write_weights)
        for mode in MODES
    }
    saves: dict[str, list[Saved]] = {mode: [] for mode in MODES}
    slowed: list[float] = []
    ceiling: Ceiling | None = None
    ceiling_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    alone = _alone()
    for repeat in range(repeats + 1):
        for number, mode in enumerate(MODES):
            keeper = keepers[mode]
            saved = keeper.save(2 * repeat + number + 1, {})
            if mode == "background":
                turns = _turns_per_s(keeper.is_written)
                saved = keeper.commit()
                if repeat:
                    slowed.append(turns / alone)
            assert saved is not None
            if repeat:
                saves[mode].append(saved)
        ceiling = ceiling or Ceiling(config.run_dir, _part_bytes(read_manifest(tags(run)[0]), ranks), ranks)
        for kind, seconds in ceiling.seconds().items():
            if repeat:
                ceiling_s[kind].append(seconds)
    newest, before = tags(run)[:2]
    manifests = [read_manifest(tag) for tag in (newest, before)]
    parts = [{name: manifest["files"][name] for name in manifest["files"] if "state" in name} for manifest in manifests]
    assert parts[0] == parts[1], f"the modes have written different bytes: {parts}"
    verify_s, load_s = [], []
    for _ in range(repeats):
        began_s = time.perf_counter()
        reasons = ranks.gather(why_not_loadable(newest, share=(ranks.world.rank, ranks.world.size)))
        assert not any(reasons), reasons
        verify_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        engine.load(newest, manifests[0]["files"])
        load_s.append(time.perf_counter() - began_s)
    stall_s = {mode: [saved.stall_s for saved in saves[mode]] for mode in MODES}
    medians = {mode: statistics.median(stall_s[mode]) for mode in MODES}
    return {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "checkpoint",
        "surroundings": surroundings,
        "packages": installed_versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world.size,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "parameters": sum(math.prod(shape) for shape in shapes_of(engine.module).values()),
        "checkpoint_bytes": saves["sync"][-1].total_bytes,
        "manifest_bytes": (newest / MANIFEST).stat().st_size,
        "repeats": repeats,
        "stall_s": stall_s,
        "stall_median_s": medians,
        "write_s": [saved.write_s for saved in saves["background"]],
        "stall_percent": 100 * medians["background"] / medians["sync"],
        "most_stall_percent": MOST_STALL_PERCENT,
        "speed_while_writing": statistics.median(slowed),
        "verify_s": verify_s,
        "load_s": load_s,
        "ceiling_s": ceiling_s,
        "step_s": step_s,
    }


def _part_bytes(manifest: dict[str, Any], ranks: Ranks) -> int:
    """What this rank has written of a checkpoint: its part of the state, and on rank 0 what is no rank's part."""
    own = state_file(ranks.world.rank)
    return sum(
        int(entry["bytes"])
        for name, entry in manifest["files"].items()
        if name == own or (ranks.is_first and not name.startswith(PART_PREFIX))
    )


def train_step(engine: Engine, config: PretrainConfig) -> float:
    """One step on random voxels, three quarters of them hidden; returns its seconds."""
    began_s = time.perf_counter()
    image = torch.rand(1, 1, *config.crop_voxels, device=engine.ranks.device)
    if engine.precision == "bf16":
        image = image.bfloat16()
    patches = math.prod(config.crop_voxels) // math.prod(config.patch_voxels)
    engine.set_learning_rate(config.optim.warmup_steps)
    engine.backward(engine(image, torch.arange(patches)[None] % 4 > 0).loss)
    engine.step()
    return time.perf_counter() - began_s


def _turns_per_s(done: Callable[[], bool]) -> float:
    """How fast this thread works until `done`: Python and matrix products in turn, so that a held GIL shows."""
    matrix = torch.ones(256, 256)
    turns, began_s = 0, time.perf_counter()
    while not done():
        for number in range(2_000):
            _ = number * number
        torch.mm(matrix, matrix)
        turns += 1
    return turns / (time.perf_counter() - began_s)


def _alone() -> float:
    end_s = time.perf_counter() + 1.0
    return _turns_per_s(lambda: time.perf_counter() > end_s)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of seconds, the ceilings among them."""
    rows = [(f"mimscale: {name}", statistics.median(times)) for name, times, _ in _rows(result)]
    rows += [(f"ceiling: {CEILINGS[kind]}", statistics.median(result["ceiling_s"][kind])) for kind in KINDS]
    title = f"A checkpoint of {result['checkpoint_bytes'] / 1e9:.2f} GB, {result['ranks']} rank(s)"
    draw_bars([Bars(title=title, unit="seconds", rows=rows)], path)


CEILINGS = {"copy": "a copy in memory", "write": "a plain write and flush", "read": "a plain read", "hash": "sha256"}


def _rows(result: dict[str, Any]) -> list[tuple[str, list[float], tuple[str, ...]]]:
    """What was timed, its repeats, and the ceilings that together are the least it could take."""
    stalls = result["stall_s"]
    return [
        ("training stands still, sync", stalls["sync"], ("copy", "write")),
        ("training stands still, background", stalls["background"], ("copy",)),
        ("written in the background", result["write_s"], ("write",)),
        ("verify", result["verify_s"], ("hash",)),
        ("load", result["load_s"], ("read",)),
    ]


REMARKS = {
    "training stands still, sync": "copy, write, flush, hash, commit",
    "written in the background": "write, flush, hash, by a thread of each rank",
    "verify": "sha256 of every file",
    "load": "into the engine",
}


def as_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    gigabytes = result["checkpoint_bytes"] / 1e9
    cells = []
    for name, times, kinds in _rows(result):
        median, least = statistics.median(times), sum(statistics.median(result["ceiling_s"][kind]) for kind in kinds)
        remark = REMARKS.get(name, f"{result['stall_percent']:.0f} % of sync")
        ceiling = f"{least:.2f} s: {' + '.join(CEILINGS[kind] for kind in kinds)}"
        cells.append([name, f"{median:.2f} s", _shown_spread(times), ceiling, f"{median / least:.1f}", remark])
    speed = f"{100 * result['speed_while_writing']:.0f} %"
    cells.append(["speed of training meanwhile", speed, "", "", "", "Python and matrix products"])
    spreads = [f"{CEILINGS[kind]} {_shown_spread(result['ceiling_s'][kind])}" for kind in KINDS]
    head = (
        f"{result['parameters'] / 1e6:.1f} M parameters, {gigabytes:.2f} GB, {result['ranks']} rank(s), ZeRO "
        f"{result['zero_stage']}, {result['precision']}, median of {result['repeats']}, load average "
        f"{result['surroundings']['load_average']:.1f}\n\n"
    )
    met = "reached" if result["stall_percent"] <= result["most_stall_percent"] else "missed"
    return (
        head
        + measure.table(("what", "time", "spread", "ceiling", "time, ceiling = 1", ""), cells)
        + f"\nA ceiling is what this machine takes for the same bytes in the same run. Spreads: {', '.join(spreads)}.\n"
        + f"\nTarget: a background save holds up training for at most {result['most_stall_percent']:.0f} %: {met}.\n"
    )


def _shown_spread(times: list[float]) -> str:
    spread = spread_percent(times)
    return "one run" if spread is None else f"{spread:.0f} %"
