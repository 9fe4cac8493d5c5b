"""The training step of ours and of other masked autoencoders, side by side in one process; see benchmarks/README.md.

Every contender has the same architecture, batch, loss, optimizer and threads.
"""

import sys
from pathlib import Path
from typing import Any

import step_peers

from mimscale.bench import measure
from mimscale.bench.charts import Bars, draw_bars
from mimscale.bench.step import CEILING, ENGINE, PLAIN, Setting, as_markdown, measure_setting, own_contenders
from mimscale.bench.verbs import bench_config
from mimscale.train.engine import join_ranks, leave_ranks
from mimscale.world import World

MONAI, FULL = "MONAI MaskedAutoEncoderViT", "MIM-Med3D style, all patches embedded"
SIMMIM = "MIM-Med3D style SimMIM, MONAI's blocks"
MAE_RECIPE, SIMMIM_RECIPE = "pretrain_mae_vit_b", "pretrain_simmim_vit_b"
# setting -> recipe and its changes, and the samples of a step on a CPU and on a GPU
SIZES: dict[str, tuple[list[str], int, int]] = {
    "ViT-B 96/16": ([MAE_RECIPE], 16, 256),
    "ViT-B 96/8": ([MAE_RECIPE, "patch_voxels=[8,8,8]"], 2, 32),
    "ViT-S 64/8": (
        [
            MAE_RECIPE,
            "crop_voxels=[64,64,64]",
            "patch_voxels=[8,8,8]",
            "model={dim: 384, heads: 6}",
            "mae={decoder_dim: 192, decoder_heads: 3}",
        ],
        8,
        256,
    ),
    "SimMIM ViT-B 96/16": ([SIMMIM_RECIPE], 4, 64),
}
QUICK_BATCH = 2
# Least part of the ceiling, least ratio to MONAI, most overhead of ZeRO-1 over plain torch in percent.
TARGETS = {"ceiling": 0.90, "monai": {"ViT-B 96/16": 1.15, "ViT-B 96/8": 1.60}, "engine_percent": 8.0}


def main() -> int:
    parser = measure.results_arguments("Benchmark of the training step.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round, at least one step")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="two samples a step: minutes instead of half an hour")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled contender")
    arguments = parser.parse_args()
    surroundings = measure.surroundings()
    ranks = join_ranks(World())
    tables = []
    try:
        for name in arguments.sizes:
            print(f"{name} ...", file=sys.stderr, flush=True)
            tables.append({"setting": name, **_measure(name, ranks, arguments)})
    finally:
        leave_ranks()
    tree = {
        "surroundings": surroundings,
        "config": {key: value for key, value in vars(arguments).items() if key != "out"},
        "targets": TARGETS,
        "tables": tables,
    }
    path = measure.write_result(arguments.out, "step", arguments.hardware, tree, _as_markdown(tree))
    _draw(tables, path.with_suffix(".png"))
    print(path.read_text())
    return 0


def _measure(name: str, ranks: Any, arguments: Any) -> dict[str, Any]:
    words, on_cpu, on_gpu = SIZES[name]
    batch = QUICK_BATCH if arguments.quick else on_gpu if ranks.device.type == "cuda" else on_cpu
    config = bench_config(
        [*words, f"micro_batch={batch}", f"global_batch={batch}", "engine.zero_stage=1"], needs_store=False
    )
    contenders = own_contenders(1)
    if arguments.no_compile:
        contenders = {key: build for key, build in contenders.items() if "compiled" not in key}
    if config.method == "simmim":
        contenders |= {SIMMIM: step_peers.simmim_step}
    else:
        contenders |= {MONAI: step_peers.monai_step, FULL: step_peers.full_embedding_step}
    table = measure_setting(Setting(config, 1, ranks), contenders, repeats=arguments.repeats, round_s=arguments.seconds)
    return {**table, "targets": against_targets(name, table["contenders"])}


def against_targets(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target beside what came out."""
    seconds = {row["name"]: row["step_s"] for row in rows}
    own = seconds[PLAIN]
    overhead = 100 * (seconds[ENGINE.format(1)] / own - 1)
    part = seconds[CEILING] / own
    least = TARGETS["ceiling"]
    lines = [
        {"what": "of the ceiling", "target": f">= {least:.2f}", "came": f"{part:.2f}", "reached": part >= least},
        {
            "what": "ZeRO-1 over plain torch",
            "target": f"<= {TARGETS['engine_percent']:.0f} %",
            "came": f"{overhead:.1f} %",
            "reached": overhead <= TARGETS["engine_percent"],
        },
    ]
    if name in TARGETS["monai"]:
        times, wanted = seconds[MONAI] / own, TARGETS["monai"][name]
        lines.append(
            {
                "what": "as fast as MONAI",
                "target": f">= {wanted:.2f}x",
                "came": f"{times:.2f}x",
                "reached": times >= wanted,
            }
        )
    return lines


def _as_markdown(tree: dict[str, Any]) -> str:
    where = tree["surroundings"]
    text = f"# Training step on {where['cpu']}, {where['time'][:10]}, commit {where['commit']}\n\n"
    text += f"Median of {tree['config']['repeats']} rounds of {tree['config']['seconds']} s, contenders in turn, after "
    text += f"a warm-up. Load average at the start {where['load_average']:.1f}.\n"
    for table in tree["tables"]:
        text += (
            f"\n## {table['setting']}, {table['config']['micro_batch']} samples a step, {table['threads']} threads, "
        )
        text += f"{table['dtype']}, {table['device']}\n\n{as_markdown(table)}\n"
        cells = [
            [line["what"], line["target"], line["came"], "yes" if line["reached"] else "no"]
            for line in table["targets"]
        ]
        text += measure.table(["target", "wanted", "came out", "reached"], cells)
    return text


def _draw(tables: list[dict[str, Any]], path: Path) -> None:
    """Bars of all contenders, one panel a setting."""
    panels = []
    for table in tables:
        rows = [(row["name"], row["samples_per_s"]) for row in table["contenders"]]
        panels.append(Bars(title=table["setting"], unit="samples a second", rows=rows))
    draw_bars(panels, path)


if __name__ == "__main__":
    raise SystemExit(main())
