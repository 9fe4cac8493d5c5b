"""1, 2, 4 ... ranks: efficiency and memory; or the same table of jobs that ran on 1, 2, 4 ... nodes.

Weak scaling keeps the batch of a rank: E(N) = rate(N) / (N x rate(1)). Strong scaling keeps the global batch:
E(N) = time(1) / (N x time(N)). One rank stands for the smallest number that was measured.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mimscale import console
from mimscale.bench import measure, results
from mimscale.bench.charts import Lines, draw_lines
from mimscale.bench.network import fit_scaling, weak_step
from mimscale.bench.results import RESULT_FILE, read_result
from mimscale.bench.verbs import bench_config
from mimscale.config import config_yaml, verb_parser
from mimscale.errors import ConfigError, LaunchError
from mimscale.train.config import PretrainConfig
from mimscale.world import World

STAGES = (0, 1, 2, 3)


def efficiency_table(results: Sequence[dict[str, Any]], *, kind: str) -> list[dict[str, Any]]:
    """A row for each number of ranks, smallest first, from results of `bench train`.

    Args:
        results: of different numbers of ranks.
        kind: `weak` or `strong`.

    Raises:
        ConfigError: fewer than two, two of one size, or batches that do not fit the kind.
    """
    results = sorted(results, key=lambda result: int(result["ranks"]))
    sizes = [int(result["ranks"]) for result in results]
    if len(set(sizes)) != len(sizes) or len(sizes) < 2:
        raise ConfigError(f"results of {sizes} ranks: scaling needs two or more different numbers of ranks")
    first = results[0]
    for result in results:
        batch, base = result["config"]["global_batch"], first["config"]["global_batch"]
        wanted = base * result["ranks"] // first["ranks"] if kind == "weak" else base
        if batch != wanted:
            raise ConfigError(
                f"{result['ranks']} ranks with global_batch={batch}: {kind} scaling from {first['ranks']} rank(s) with "
                f"{base} needs {wanted}"
            )
    rows = []
    for result in results:
        modes = {}
        for mode, numbers in result["modes"].items():
            rate, base_rate = numbers["samples_per_s"], first["modes"][mode]["samples_per_s"]
            modes[mode] = {
                "samples_per_s": rate,
                "spread_percent": numbers["spread_percent"],
                "efficiency": round(rate / base_rate * first["ranks"] / result["ranks"], 3),
            }
            if "data_wait_percent" in numbers:
                modes[mode]["data_wait_percent"] = max(numbers["data_wait_percent"])
        rows.append(
            {
                "ranks": result["ranks"],
                "nodes": len(result["nodes"]),
                "ranks_a_core": _ranks_a_core(result),
                "global_batch": result["config"]["global_batch"],
                "modes": modes,
                "mfu": result["utilisation"]["mfu"],
                "verdict": result["verdict"],
            }
        )
    return rows


def _ranks_a_core(result: dict[str, Any]) -> float:
    """Above 1 where the ranks of a node compute in turns, on fewer cores than they have threads."""
    if result["device"] != "cpu":
        return 1.0
    threads = result["ranks"] / len(result["nodes"]) * result["threads"]
    return float(max(1.0, threads / len(result["surroundings"]["cores_used"])))


def foretold(result: dict[str, Any]) -> str:
    """How well a fit to all weak rows but the largest foretells that one; empty with fewer than three rows."""
    rows = sorted(result["scaling"].get("weak", []), key=lambda row: int(row["ranks"]))
    if len(rows) < 3:
        return ""
    steps = [weak_step(row) for row in rows]
    last = steps[-1]
    fit = fit_scaling(steps[:-1], 1e9)  # as many bytes as one likes: it foretells seconds
    seconds = fit.alone_s * last.ranks_a_core + fit.exposed_s(1e9, last.ranks)
    fewer = " and ".join(str(step.ranks) for step in steps[:-1])
    crowded = f", {last.ranks_a_core:g} of which share a core," if last.ranks_a_core > 1 else ""
    return (
        f"A fit of the synthetic step to {fewer} ranks (`mimscale plan --scaling` makes it) foretells "
        f"{1e3 * seconds:.0f} ms a step for {last.ranks} ranks{crowded} and {1e3 * last.step_s:.0f} ms were measured: "
        f"{100 * (seconds / last.step_s - 1):+.1f} %.\n"
    )


def kind_of(results: Sequence[dict[str, Any]]) -> str:
    """`strong` where all have one global batch, else `weak`."""
    return "strong" if len({result["config"]["global_batch"] for result in results}) == 1 else "weak"


def run_ranks(words: Sequence[str], count: int, threads: int) -> None:
    """`mimscale bench WORDS` as `count` ranks on this machine.

    Raises:
        LaunchError: a rank failed; torchrun has said which.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "mimscale.cli", "bench", *words]
    done = subprocess.run(command, stdout=sys.stderr, check=False, env=environment)
    if done.returncode:
        raise LaunchError(f"bench {words[0]} on {count} rank(s) ended with {done.returncode}; its output stands above")


def measure_scaling(
    config: PretrainConfig, counts: Sequence[int], *, steps: int, windows: int, threads: int
) -> dict[str, list[dict[str, Any]]]:
    """`bench train` on each number of ranks of this machine: weak and strong tables.

    The recipe's global batch is that of the smallest number of ranks.
    """
    tree = yaml.safe_load(config_yaml(config))
    if tree["store"] != "none":
        tree["store"] = str(Path(tree["store"]).resolve())
    tables = {}
    with tempfile.TemporaryDirectory(prefix="mimscale_bench_") as name:
        folder = Path(name)
        for kind in ("weak", "strong"):
            results = []
            for count in counts:
                batch = config.global_batch * count // min(counts) if kind == "weak" else config.global_batch
                place = folder / f"{kind}_{count}"
                if count == min(counts) and kind == "strong":
                    place = folder / f"weak_{count}"  # it is the same run
                else:
                    recipe = folder / f"{kind}_{count}.yaml"
                    recipe.write_text(yaml.safe_dump({**tree, "run_dir": str(place), "global_batch": batch}))
                    console.say(f"{kind} scaling, {count} rank(s), global batch {batch} ...")
                    words = ["train", str(recipe), f"--steps={steps}", f"--windows={windows}"]
                    run_ranks(words, count, threads)
                results.append(read_result(place / RESULT_FILE))
            tables[kind] = efficiency_table(results, kind=kind)
    return tables


def measure_memory(config: PretrainConfig, counts: Sequence[int], *, threads: int) -> list[dict[str, Any]]:
    """Bytes of a rank by ZeRO stage and number of ranks, in bf16 from stage 1 on."""
    tree = yaml.safe_load(config_yaml(config))
    tree["engine"]["precision"] = "bf16"
    tree["engine"]["zero_stage"] = 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mimscale_bench_") as name:
        recipe, out = Path(name) / "recipe.yaml", Path(name) / "memory.json"
        recipe.write_text(yaml.safe_dump(tree))
        for count in counts:
            console.say(f"memory of {count} rank(s) ...")
            run_ranks(["memory", str(recipe), "--out", str(out), "--stages", *map(str, STAGES)], count, threads)
            rows += json.loads(out.read_text())
    return rows


def ranks_text(row: dict[str, Any]) -> str:
    """Of a table: the number of ranks, and how many of them share a core."""
    crowding = row.get("ranks_a_core", 1.0)
    return f"{row['ranks']} ({crowding:g} a core)" if crowding > 1 else str(row["ranks"])


def as_markdown(result: dict[str, Any]) -> str:
    """Tables of efficiency, then of memory."""
    text = ""
    for kind, rows in result["scaling"].items():
        modes = list(rows[0]["modes"])
        cells = [
            [
                ranks_text(row),
                row["global_batch"],
                *(
                    f"{row['modes'][mode]['samples_per_s']:.2f} ({100 * row['modes'][mode]['efficiency']:.0f} %)"
                    for mode in modes
                ),
                row["verdict"],
            ]
            for row in rows
        ]
        columns = ["ranks", "global batch", *(f"{mode.replace('_', ' ')}, samples/s" for mode in modes), "limited by"]
        text += f"{kind.capitalize()} scaling; in brackets the efficiency\n\n{measure.table(columns, cells)}\n"
    if told := foretold(result):
        text += f"{told}\n"
    if result.get("memory"):
        cells = [
            [
                row["zero_stage"],
                row["ranks"],
                row["precision"],
                f"{max(row['bytes_of_rank']) / 1e6:.1f}",
                f"{row['theory_bytes'] / 1e6:.1f}",
                f"{max(row['bytes_of_rank']) / row['parameters']:.2f}",
                f"{row['of_theory']:.2f}",
                f"{row['bucket_bytes'] / 1e6:.1f}",
            ]
            for row in result["memory"]
        ]
        columns = ["ZeRO stage", "ranks", "precision", "MB of the largest rank", "theory, MB", "bytes a parameter"]
        text += "Weights, gradients and optimizer after the backward pass\n\n"
        text += measure.table([*columns, "of theory", "a bucket, MB"], cells)
        text += (
            "\nStage 3 holds buckets as well at that moment, which theory leaves out; `mimscale plan` counts them.\n"
        )
    return text


def main(argv: list[str]) -> int:
    """`mimscale bench scaling RECIPE [store=STORE] --ranks 1 2 4` here, or `--from RUN_DIR ...` of jobs that ran."""
    parser = verb_parser("bench scaling", "Weak and strong scaling, and memory of a rank by ZeRO stage.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks on this machine")
    parser.add_argument("--memory-ranks", type=int, nargs="*", default=[1, 2, 4], help="of the table of memory")
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--windows", type=int, default=3, help="of which median and spread are told")
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument(
        "--from", dest="run_dirs", type=Path, nargs="+", help="run directories of `submit bench`; nothing is run"
    )
    results.add_outputs(parser)
    arguments = parser.parse_intermixed_args(argv)
    tree: dict[str, Any] = {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "scaling",
        "surroundings": measure.surroundings(),
    }
    if (world := World.from_environment(os.environ)).size > 1:
        raise ConfigError(
            f"bench scaling starts its ranks itself, and is one of {world.size} here; give it alone, or `mimscale "
            "bench train` on each number of ranks and then `mimscale bench scaling --from`"
        )
    if arguments.run_dirs:
        if arguments.words:
            raise ConfigError(f"--from reads results; it takes no recipe, got {arguments.words}")
        measured = [read_result(run_dir) for run_dir in arguments.run_dirs]
        folder = arguments.out
        results.make_folder(folder)
        kind = kind_of(measured)
        tree |= {"scaling": {kind: efficiency_table(measured, kind=kind)}, "memory": []}
        first = min(measured, key=lambda result: int(result["ranks"]))
        tree |= {"config": {**first["config"], "run_dir": "none"}}
    else:
        if min(arguments.ranks) < 1 or len(set(arguments.ranks)) < 2:
            raise ConfigError(f"--ranks {arguments.ranks}: two or more different numbers, each at least 1")
        config = bench_config(arguments.words, needs_store=False)
        folder = results.folder_of(arguments.out, config.run_dir)
        results.make_folder(folder)
        counts = sorted(set(arguments.ranks))
        threads = arguments.threads
        tree |= {
            "config": yaml.safe_load(config_yaml(config)),
            "threads": threads,
            "scaling": measure_scaling(
                config, counts, steps=arguments.steps, windows=arguments.windows, threads=threads
            ),
            "memory": measure_memory(config, arguments.memory_ranks, threads=threads),
        }
    results.tell(tree, as_markdown, draw, as_json=arguments.json, folder=folder)
    return 0


def draw(result: dict[str, Any], path: Path) -> None:
    """Efficiency by ranks, and where memory was measured, bytes a parameter by ZeRO stage beside theory (dashed)."""
    efficiency = {
        f"{kind}, {mode.replace('_', ' ')}": [(row["ranks"], 100 * row["modes"][mode]["efficiency"]) for row in rows]
        for kind, rows in result["scaling"].items()
        for mode in rows[0]["modes"]
    }
    panels = [Lines(title="Scaling", x="ranks", y="efficiency, %", lines=efficiency)]
    if result["memory"]:
        lines: dict[str, list[tuple[float, float]]] = {}
        theory: dict[str, list[tuple[float, float]]] = {}
        for row in result["memory"]:
            name, parameters = f"ZeRO-{row['zero_stage']}", row["parameters"]
            lines.setdefault(name, []).append((row["ranks"], max(row["bytes_of_rank"]) / parameters))
            theory.setdefault(name, []).append((row["ranks"], row["theory_bytes"] / parameters))
        title = "Memory of a rank; dashed: theory"
        panels.append(Lines(title=title, x="ranks", y="bytes a parameter", lines=lines, dashed=theory))
    draw_lines([panels], path)
