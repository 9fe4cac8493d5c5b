"""The training step alone: ways to run it in turn, on one batch on the device, against the time of its products.

`mimscale bench step RECIPE [key=value ...] [--json]` runs what needs no other package; `benchmarks/bench_step.py` adds
the peers.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimscale import console
from mimscale.bench import hardware, measure, results
from mimscale.bench.charts import Bars, draw_bars
from mimscale.bench.compiled import Fallbacks, fallbacks
from mimscale.bench.products import Recorded, Replay, record
from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.config import config_tree, config_yaml, verb_parser
from mimscale.errors import ConfigError
from mimscale.stream.batch import Batch
from mimscale.train.compiled_blocks import compile_blocks
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import Engine, joined_ranks
from mimscale.train.optim import adamw
from mimscale.train.pretrain import pretrain_objective
from mimscale.train.ranks import Ranks
from mimscale.world import World

PLAIN, COMPILED, ENGINE = "mimscale", "mimscale, blocks compiled", "mimscale, DeepSpeed ZeRO-{}"
CEILING = "ceiling: the products alone"

Step = Callable[[], Tensor]  # one optimizer step on the batch; the loss stays on the device


@dataclass(frozen=True)
class Setting:
    """What all contenders are given."""

    config: PretrainConfig
    channels: int
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.ranks.device

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in: as the engine would choose."""
        wanted = self.config.engine.precision
        automatic = wanted == "auto" and self.device.type == "cuda" and self.config.engine.zero_stage > 0
        return torch.bfloat16 if automatic or wanted == "bf16" else torch.float32

    def batch(self) -> Batch:
        """The batch of every step."""
        return synthetic_batch(self.config, self.channels, self.device)


Build = Callable[[Setting], Step]


def plain_step(setting: Setting, model: nn.Module, loss_of: Callable[[], Tensor], *, clip: float) -> Step:
    """A step in plain torch: forward, backward, clipped by the global norm, fused AdamW."""
    optimizer = adamw(model, setting.config.optim, setting.config.model.layers)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def own_step(setting: Setting, *, compiled: bool = False) -> Step:
    """Our model and loss without DeepSpeed. In bf16 the weights are bf16: nothing keeps a copy in fp32."""
    objective, batch = pretrain_objective(setting.config), setting.batch()
    torch.manual_seed(setting.config.seed)
    model = objective.build(setting.channels).to(setting.device, setting.dtype)
    if compiled:
        compile_blocks(model)
    return plain_step(setting, model, lambda: objective.loss(model, batch), clip=setting.config.engine.clip_grad_norm)


def engine_step(setting: Setting, *, zero_stage: int) -> Step:
    """The engine with DeepSpeed, one micro-batch a step. Its blocks are compiled only if the config says so."""
    config = setting.config
    compiled = bool(config.engine.compile_blocks)
    config = replace(config, engine=replace(config.engine, zero_stage=zero_stage, compile_blocks=compiled))  # type: ignore[arg-type]
    objective, batch = pretrain_objective(config), setting.batch()
    torch.manual_seed(config.seed)
    engine = Engine(objective.build(setting.channels), config, setting.ranks)

    def step() -> Tensor:
        engine.set_learning_rate(0)
        loss = objective.loss(engine, batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def own_contenders(zero_stage: int) -> dict[str, Build]:
    """Our ways to run a step."""
    return {
        PLAIN: own_step,
        COMPILED: lambda setting: own_step(setting, compiled=True),
        ENGINE.format(zero_stage): lambda setting: engine_step(setting, zero_stage=zero_stage),
    }


def measure_steps(
    setting: Setting, contenders: dict[str, Build], *, repeats: int, round_s: float
) -> tuple[list[dict[str, Any]], Recorded]:
    """Time all contenders in turn, and the products of the first of them alone. A collective.

    All are alive at once and work in turn, so that what else the machine does hits every one of them.

    Args:
        setting: what they are given.
        contenders: name -> how to build it; the first one's products are the ceiling.
        repeats: rounds that count, after one that does not.
        round_s: how long a round should be; at least one step.

    Returns:
        for each: name, step_s (median of the rounds, each as long as its slowest rank took), max_s, cpu_s (of all
        threads of this rank; a busy machine disturbs it least), spread_percent, samples_per_s (of all ranks),
        energy_j_per_sample (None without NVML), the loss of the first step, and what of it torch could not compile; and
        the products of a step of one rank.
    """
    steps: dict[str, Step] = {}
    losses: dict[str, float | None] = {}
    compiler: Fallbacks | None = None
    recorded = None
    for name, build in contenders.items():
        _say(setting, f"first step of {name} ...")
        with fallbacks() if name == COMPILED else nullcontext(None) as found:
            steps[name] = build(setting)
            losses[name] = float(steps[name]())
        if found is not None:
            compiler = found
            if found.count:
                _say(setting, f"{name}: {found.count} function(s) run as they are: {found.reason}")
        if recorded is None:
            recorded = record(steps[name])
    assert recorded is not None
    calls: dict[str, Callable[[], object]] = {**steps, CEILING: Replay(recorded, setting.device)}
    gc.collect()
    rounds: dict[str, list[_Round]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            done = _round(call, setting, round_s)
            if number:
                rounds[name].append(done)
    rows = [_row(name, runs, losses.get(name), setting) for name, runs in rounds.items()]
    for row in rows:
        if compiler is not None and row["name"] == COMPILED:
            row |= {"plain_functions": compiler.count, "plain_reason": compiler.reason}
    return rows, recorded


def _say(setting: Setting, text: str) -> None:
    if setting.ranks.is_first:
        console.say(text)


@dataclass(frozen=True)
class _Round:
    """The mean step of one round."""

    wall_s: float  # of the slowest rank
    cpu_s: float
    energy_j: float | None  # of all ranks


def _round(call: Callable[[], object], setting: Setting, round_s: float) -> _Round:
    ranks = setting.ranks
    once_s = max(ranks.gather(hardware.seconds_of(call, setting.device)))  # as many steps on every rank
    count = max(1, round(round_s / once_s))
    joules, busy_s = hardware.energy_j(setting.device), time.process_time()
    wall_s = hardware.seconds_of(lambda: _repeat(call, count), setting.device) / count
    busy_s, after = time.process_time() - busy_s, hardware.energy_j(setting.device)
    of_ranks = ranks.gather((wall_s, None if joules is None or after is None else (after - joules) / count))
    energies = [energy for _, energy in of_ranks if energy is not None]
    return _Round(
        wall_s=max(seconds for seconds, _ in of_ranks),
        cpu_s=busy_s / count,
        energy_j=sum(energies) if len(energies) == len(of_ranks) else None,
    )


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _row(name: str, runs: Sequence[_Round], loss: float | None, setting: Setting) -> dict[str, Any]:
    seconds = [run.wall_s for run in runs]
    median, samples = statistics.median(seconds), setting.config.micro_batch * setting.ranks.world.size
    joules = [run.energy_j for run in runs if run.energy_j is not None]
    return {
        "name": name,
        "step_s": round(median, 5),
        "max_s": round(max(seconds), 5),
        "cpu_s": round(statistics.median(run.cpu_s for run in runs), 5),
        "spread_percent": round(100 * (max(seconds) - min(seconds)) / median, 1),
        "samples_per_s": round(samples / median, 3),
        "energy_j_per_sample": round(statistics.median(joules) / samples, 3) if joules else None,
        "loss": loss,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `of_ceiling` to ours and `times` (ours in plain torch is so many times as fast) to the others."""
    seconds = {row["name"]: row["step_s"] for row in rows}
    for row in rows:
        row["of_ceiling"] = round(seconds[CEILING] / row["step_s"], 3) if row["name"] != CEILING else None
        row["times"] = round(row["step_s"] / seconds[PLAIN], 3) if row["name"] not in (PLAIN, CEILING) else None
    return rows


def measure_setting(setting: Setting, contenders: dict[str, Build], *, repeats: int, round_s: float) -> dict[str, Any]:
    """One table: contenders of one architecture and batch, the FLOPs, the utilisation of our plain step."""
    rows, recorded = measure_steps(setting, contenders, repeats=repeats, round_s=round_s)
    rows = with_ratios(rows)
    measured = hardware.measured_flops_per_s(setting.device, setting.dtype)
    own = next(row for row in rows if row["name"] == PLAIN)
    return {
        "config": config_tree(setting.config),
        "device": hardware.device_name(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": setting.ranks.world.size,
        "gflops_a_sample": round(recorded.flops / setting.config.micro_batch / 1e9, 3),
        "products": len(recorded.products),
        "contenders": rows,
        "utilisation": hardware.utilisation(
            flops=recorded.flops,
            hardware_flops=recorded.hardware_flops,
            seconds=own["step_s"],
            devices=1,
            name=hardware.device_name(setting.device),
            dtype=setting.dtype,
            measured=measured,
        ),
        "memory": hardware.memory_of(setting.device),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """A table of `measure_setting`, fastest first."""
    rows = sorted(result["contenders"], key=lambda row: row["step_s"])
    cells = [
        [
            results.shown_name(row),
            f"{1e3 * row['step_s']:.0f}" if row["step_s"] >= 0.1 else f"{1e3 * row['step_s']:.2f}",
            f"{row['spread_percent']:.0f} %",
            f"{1e3 * row['cpu_s']:.0f}",
            f"{row['samples_per_s']:.2f}",
            "" if row["of_ceiling"] is None else f"{100 * row['of_ceiling']:.0f} %",
            "" if row["times"] is None else f"{row['times']:.2f}",
        ]
        for row in rows
    ]
    columns = ["contender", "ms a step", "spread", "CPU ms", "samples/s", "of ceiling", "time, mimscale = 1"]
    use = result["utilisation"]
    mfu, hfu = (use[key] if use[key] is not None else use[f"{key}_of_measured"] for key in ("mfu", "hfu"))
    peak = "data sheet" if use["mfu"] is not None else "a large product measured here"
    return (
        measure.table(columns, cells)
        + f"\n{result['gflops_a_sample']:.1f} GFLOP a sample in {result['dtype']}; {PLAIN}: MFU {100 * mfu:.0f} %, HFU "
        f"{100 * hfu:.0f} % of "
        f"{(use['peak_flops_per_s'] or use['measured_flops_per_s']) / 1e9:.0f} GFLOP/s ({peak}).\n"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of all contenders."""
    rows = [(row["name"], row["samples_per_s"]) for row in result["contenders"]]
    draw_bars([Bars(title=f"The training step on {result['device']}", unit="samples a second", rows=rows)], path)


def main(argv: list[str]) -> int:
    """`mimscale bench step RECIPE [key=value ...] [--json] [--out FOLDER]`, alone, under torchrun or in a job."""
    parser = verb_parser(
        "bench step", "The training step alone, against the time of the matrix products that it needs."
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each contender")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, at least one step")
    parser.add_argument("--channels", type=int, default=1, help="of the images")
    parser.add_argument("--no-compile", action="store_true", help="leave out the contender that compiles its blocks")
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    results.add_outputs(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.repeats < 1 or not arguments.seconds > 0:
        raise ConfigError(f"--repeats {arguments.repeats} --seconds {arguments.seconds}: 1 or more, and above 0")
    config = bench_config(arguments.words, needs_store=False)
    if arguments.check:
        print(config_yaml(config), end="")
        return 0
    world, folder = World.from_environment(os.environ), results.folder_of(arguments.out, config.run_dir)
    if world.is_first:
        results.make_folder(folder)
    result = bench_recipe(config, arguments, world)
    if world.is_first:
        results.tell(result, as_markdown, draw, as_json=arguments.json, folder=folder)
    return 0


def bench_recipe(config: PretrainConfig, arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """All that the verb measures, as its JSON tells it."""
    # The engine then takes an optimizer step each time.
    config = replace(config, global_batch=config.micro_batch * world.size)
    with joined_ranks(world, collective_timeout_min=config.engine.collective_timeout_min) as ranks:
        contenders = own_contenders(config.engine.zero_stage)
        if arguments.no_compile:
            del contenders[COMPILED]
        setting = Setting(config, arguments.channels, ranks)
        table = measure_setting(setting, contenders, repeats=arguments.repeats, round_s=arguments.seconds)
    return {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "step",
        "surroundings": measure.surroundings(),
        **table,
    }
