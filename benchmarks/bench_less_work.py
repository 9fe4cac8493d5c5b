"""Ways to do less work in a step, beside what they do to the loss.

Each way is timed at the sizes of `bench_step.py`, on one batch on the device, and trains a small model from the same
seed on the packaged real volume and subjects derived from it. A *view* is one crop under one mask. The loss is that of
all hidden patches of validation crops, by that of the mean of the visible voxels: 1 is a network that learned nothing.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mimscale.bench import measure
from mimscale.bench.charts import Lines, draw_lines
from mimscale.bench.step import Build, Setting, measure_steps, own_step, plain_step
from mimscale.bench.verbs import bench_config
from mimscale.config import load_verb_config
from mimscale.ingest.cohort import write_cohort
from mimscale.ingest.config import CohortConfig, IngestConfig
from mimscale.ingest.run import ingest
from mimscale.stream.device import OnDevice
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import join_ranks, leave_ranks
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.train.ranks import Ranks
from mimscale.train.training_data import TrainingData
from mimscale.world import World

VIEWS = 8  # of a training step
SMALL = ["demo/pretrain", "model={dim: 144, depth: 4, heads: 4}", "mask={ratio: 0.75}", "seed=0"]
RATE = "optim={lr: 1e-3, warmup_steps: 20, min_lr_ratio: 1.0, weight_decay: 0.05, betas: [0.9, 0.95]}"
# setting -> recipe and changes, and views of a step on a CPU
SIZES = {"ViT-B 96/16": (["pretrain_mae_vit_b"], 8), "ViT-B 96/8": (["pretrain_mae_vit_b", "patch_voxels=[8,8,8]"], 2)}
USUAL = "as the recipe has it"
# way -> masks of a crop, share of the hidden patches that is predicted, the decoder's width by the recipe's, its blocks
WAYS: dict[str, tuple[int, float, float, int]] = {
    USUAL: (1, 1.0, 1.0, 2),
    "half of the hidden patches decoded": (1, 0.5, 1.0, 2),
    "a quarter of the hidden patches decoded": (1, 0.25, 1.0, 2),
    "two masks of each crop": (2, 1.0, 1.0, 2),
    "decoder of one block": (1, 1.0, 1.0, 1),
    "decoder of half the width, one block": (1, 1.0, 0.5, 1),
}


def main() -> int:
    parser = measure.results_arguments("Benchmark of ways to do less work in a step.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round, at least one step")
    parser.add_argument("--train-seconds", type=float, default=120.0, help="processor seconds that each way trains for")
    parser.add_argument("--views", type=int, default=400, help="between two validations")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="two views a step")
    arguments = parser.parse_args()
    surroundings = measure.surroundings()
    with tempfile.TemporaryDirectory(prefix="bench_less_work_") as name:
        store = _store(Path(name))
        ranks = join_ranks(World())
        try:
            speed = {size: _speed(size, ranks, arguments) for size in arguments.sizes}
            curves = {}
            for way in WAYS:
                print(f"training: {way} ...", file=sys.stderr, flush=True)
                curves[way] = train_for(_small(way, store), arguments.train_seconds, arguments.views, ranks)
        finally:
            leave_ranks()
    tree = {
        "surroundings": surroundings,
        "config": {key: value for key, value in vars(arguments).items() if key != "out"},
        "threads": torch.get_num_threads(),
        "speed": speed,
        "curves": curves,
        "rows": rows_of(speed, curves),
    }
    path = measure.write_result(arguments.out, "less_work", arguments.hardware, tree, _as_markdown(tree))
    draw(curves, path.with_suffix(".png"))
    print(path.read_text())
    return 0


def _words(way: str, decoder_dim: int, heads: int, views: int) -> list[str]:
    """The recipe's changes of a way; as many views a step whatever it does."""
    repeats, share, width, depth = WAYS[way]
    return [
        f"mask.repeats={repeats}",
        f"mask.predicted_share={share}",
        f"mae.decoder_dim={int(decoder_dim * width)}",
        f"mae.decoder_depth={depth}",
        f"mae.decoder_heads={int(heads * width)}",
        f"micro_batch={max(1, views // repeats)}",
        f"global_batch={max(1, views // repeats)}",
    ]


def _speed(size: str, ranks: Ranks, arguments: Any) -> list[dict[str, Any]]:
    """Each way's step on a batch on the device, in turn."""
    words, views = SIZES[size]
    views = 2 if arguments.quick else views
    print(f"{size} ...", file=sys.stderr, flush=True)
    configs = {
        way: bench_config([*words, *_words(way, 384, 6, views), "engine.zero_stage=1"], needs_store=False)
        for way in WAYS
    }

    def build_of(config: PretrainConfig) -> Build:
        return lambda setting: own_step(replace(setting, config=config))

    builds = {way: build_of(config) for way, config in configs.items()}
    setting = Setting(configs[USUAL], 1, ranks)
    rows, _ = measure_steps(setting, builds, repeats=arguments.repeats, round_s=arguments.seconds)
    return [row for row in rows if row["name"] in WAYS]


def _store(folder: Path) -> Path:
    """MNI152 and three subjects derived from it, one of the four for validation."""
    write_cohort(CohortConfig(out=folder / "cohort", subjects=3, seed=1, workers=1))
    words = [f"sources={folder}/cohort/dataset.json", f"out={folder}/store", "parts=1", "workers=1"]
    ingest(load_verb_config(IngestConfig, ["demo/ingest", *words], needs_recipe=True))
    return folder / "store"


def _small(way: str, store: Path) -> PretrainConfig:
    stream = "stream={workers: 0, crops_per_volume: 8, origins: foreground}"
    words = [*SMALL, RATE, stream, f"store={store}", "validation={every_steps: 0, crops_per_volume: 16}"]
    return bench_config([*words, *_words(way, 72, 4, VIEWS)])


def train_for(config: PretrainConfig, cpu_s: float, views_between: int, ranks: Ranks) -> list[dict[str, float]]:
    """Train for some processor seconds of all threads, reading of crops included and validation not.

    Returns:
        After every `views_between` views and at the end: views, cpu_s, wall_s, and loss, by that of the mean voxel.
    """
    objective, data, world = MaskedReconstruction(config), TrainingData(config, None), World()
    torch.manual_seed(config.seed)
    model = objective.build(data.channels)
    batches = None
    curve: list[dict[str, float]] = []
    views, spent_cpu, spent_wall = 0, 0.0, 0.0
    with data.loader(world, 0) as loader:
        batches = OnDevice(loader, ranks.device)
        step = plain_step(
            Setting(config, data.channels, ranks),
            model,
            lambda: objective.loss(model, next(batches)),
            clip=config.engine.clip_grad_norm,
        )
        while spent_cpu < cpu_s:
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            spent_cpu += time.process_time() - cpu
            spent_wall += time.perf_counter() - wall
            before, views = views, views + config.micro_batch * config.mask.repeats
            objective.take_yardsticks()
            if views // views_between > before // views_between or spent_cpu >= cpu_s:
                loss = _validation_loss(objective, model, data, world, ranks)
                curve.append({"views": views, "cpu_s": spent_cpu, "wall_s": spent_wall, "loss": loss})
    return curve


def _validation_loss(
    objective: MaskedReconstruction, model: torch.nn.Module, data: TrainingData, world: World, ranks: Ranks
) -> float:
    sums: dict[str, Any] = {}
    with torch.no_grad():
        for batch in OnDevice(data.validation_batches(world), ranks.device):
            for name, value in objective.validation_sums(model, batch).items():
                sums[name] = sums.get(name, 0.0) + value
    numbers = {name: value if value.dim() else float(value) for name, value in sums.items()}
    return objective.validation_metrics(numbers)["val_loss_vs_mean_voxel"]


def rows_of(speed: dict[str, list[dict[str, Any]]], curves: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row a way: how many times as fast, and the losses [low, median, high] of the last quarter of all of the time,
    and of the last quarter of as many views as every way has seen: a loss alone jumps by more than ways differ."""
    looked_at = [{point["views"] for point in curve} for curve in curves.values()]
    common = max(set.intersection(*looked_at), default=None)  # where every way's loss is known
    rows = []
    for way, curve in curves.items():
        times = {}
        for size, measured in speed.items():
            seconds = {row["name"]: row["cpu_s"] for row in measured}
            times[size] = round(seconds[USUAL] / seconds[way], 3)
        rows.append(
            {
                "way": way,
                "times": times,
                "views": curve[-1]["views"],
                "loss_after_time": _late_losses(curve, "cpu_s", curve[-1]["cpu_s"]),
                "common_views": common,
                "loss_after_views": None if common is None else _late_losses(curve, "views", common),
            }
        )
    return rows


def _late_losses(curve: list[dict[str, float]], key: str, end: float) -> list[float]:
    """Lowest, median and highest loss between three quarters of `end` and `end`."""
    losses = [point["loss"] for point in curve if 0.75 * end <= point[key] <= end]
    return [round(value, 4) for value in (min(losses), statistics.median(losses), max(losses))]


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """The validation loss of every way, over processor seconds and over views."""
    panels = [
        Lines(
            title="A subject that was left out",
            x=name,
            y="loss, by that of the mean voxel",
            lines={way: [(point[key], point["loss"]) for point in curve] for way, curve in curves.items()},
        )
        for key, name in (("cpu_s", "processor seconds"), ("views", "views"))
    ]
    draw_lines([panels], path)


def _as_markdown(tree: dict[str, Any]) -> str:
    where, config = tree["surroundings"], tree["config"]
    text = f"# Less work on {where['cpu']}, {where['time'][:10]}, commit {where['commit']}\n\n"
    text += f"{tree['threads']} threads, load average at the start {where['load_average']:.1f}. Times by processor "
    text += f"seconds: steps on one batch on the device, median of {config['repeats']} rounds; and "
    text += (
        f"{config['train_seconds']:.0f} s of training of a small ViT (4 blocks of 144, decoder 72) from one seed on "
    )
    text += "MNI152 and subjects derived from it, three of four. Loss of all hidden patches of the fourth, by that of "
    text += "the mean voxel; median, lowest and highest of its validations in the last quarter.\n\n"
    sizes = list(tree["speed"])
    columns = ["way", *sizes, "views in that time", "loss late in that time"]
    cells = [
        [
            row["way"],
            *(f"{row['times'][size]:.2f}x" for size in sizes),
            row["views"],
            measure.range_text(row["loss_after_time"]),
        ]
        for row in tree["rows"]
    ]
    views = tree["rows"][0]["common_views"]
    if views is not None:  # a short run has no number of views after which all ways were validated
        columns.append(f"loss late in {views} views")
        for cell, row in zip(cells, tree["rows"], strict=True):
            cell.append(measure.range_text(row["loss_after_views"]))
    return text + measure.table(columns, cells)


if __name__ == "__main__":
    raise SystemExit(main())
