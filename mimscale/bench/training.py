"""A whole training step in three modes, on one rank or many: a batch on the device, the loader alone, and both.

The loop is the one that trains. End to end is at best the slower of the other two; what is missing is the fault of the
loader, or of work that does not overlap.
"""

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale.bench import hardware, measure
from mimscale.bench.charts import Bars, draw_bars
from mimscale.bench.products import ConvolutionError, record
from mimscale.bench.results import Windows, make_folder, tell
from mimscale.bench.synthetic import synthetic_batch
from mimscale.config import config_tree, tree_hash
from mimscale.models.flops import Flops
from mimscale.stream.batch import Batch
from mimscale.stream.device import OnDevice
from mimscale.train.config import PretrainConfig, accumulation
from mimscale.train.engine import Engine, joined_ranks
from mimscale.train.garbage import collected_between_steps
from mimscale.train.loop import train
from mimscale.train.pretrain import pretrain_objective
from mimscale.train.ranks import Ranks
from mimscale.train.size import run_flops
from mimscale.train.training_data import TrainingData
from mimscale.world import World

MODES = ("synthetic", "loader", "end_to_end")
LEAST_OF_SMALLER = 0.95  # of the slower part, that end to end must reach


@dataclass
class _Stopwatch:
    """A meter that keeps the seconds of each step of this rank; see `mimscale.train.meter.Meter`."""

    steps: list[dict[str, float]] = field(default_factory=list)
    _spans: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the block's wall time to `name` of the current step."""
        start = time.perf_counter()
        yield
        self._spans[name] = self._spans.get(name, 0.0) + time.perf_counter() - start

    def take_spans(self) -> dict[str, float]:
        """The seconds of this step."""
        spans, self._spans = self._spans, {}
        self.steps.append(spans)
        return dict(spans)

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Nothing: what is shared is not timed here."""

    def log_skipped(self, step: int, values: dict[str, float]) -> None:
        """Nothing: the update took its time none the less."""

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Nothing: there is none."""

    def record_samples(self, step: int, sample_ids: list[int]) -> None:
        """Nothing."""


class _Unwatched:
    """Judges nothing; see `mimscale.train.health.Health`. A healthy run's reads nothing from the device either."""

    skipped = 0

    def keep(self, step: int, losses: Sequence[Tensor], micro_batches: Sequence[Batch]) -> None:
        """Nothing."""

    def update_was_made(self, step: int, grad_norm: float) -> bool:
        """It was, as far as anybody looks."""
        return True

    def watch_loss(self, step: int, loss: float, done: int) -> None:
        """Nothing."""

    def compare_ranks(self, step: int, spans: dict[str, float]) -> dict[str, float]:
        """Nothing to compare."""
        return {}


class Bench:
    """One engine, and the modes that it is measured in."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, *, with_store: bool, channels: int = 1) -> None:
        self.config, self.ranks = config, ranks
        self.objective = pretrain_objective(config)
        self.data = TrainingData(config, None) if with_store else None
        self.channels = channels if self.data is None else self.data.channels
        torch.manual_seed(config.seed)
        self.engine = Engine(self.objective.build(self.channels), config, ranks)

    def synthetic(self) -> Iterator[Batch]:
        """The same batch on the device for ever."""
        return itertools.repeat(synthetic_batch(self.config, self.channels, self.ranks.device))

    def measure(self, windows: Windows) -> dict[str, Any]:
        """Every mode that the data allow: mode -> numbers, the same on every rank. A collective."""
        modes = {"synthetic": self._training(self.synthetic(), windows)}
        if self.data is not None:
            with self.data.loader(self.ranks.world, 0) as loader:
                modes["loader"] = self._loading(OnDevice(loader, self.ranks.device), windows)
            with self.data.loader(self.ranks.world, 0) as loader:
                modes["end_to_end"] = self._training(OnDevice(loader, self.ranks.device), windows)
        return modes

    def _training(self, batches: Iterator[Batch], windows: Windows) -> dict[str, Any]:
        device = self.ranks.device
        self._run(batches, windows.warmup_steps)
        energy = hardware.energy_j(device)
        seconds, steps = [], []
        for _ in range(windows.count):
            watch = _Stopwatch()
            self.ranks.gather(None)  # all begin together
            seconds.append(hardware.seconds_of(lambda watch=watch: self._run(batches, windows.steps, watch), device))  # type: ignore[misc]
            steps += watch.steps
        used = hardware.energy_j(device)
        own = {
            "rank": self.ranks.world.rank,
            "seconds": seconds,
            "step_s": [step["step_s"] for step in steps],
            "data_wait_s": sum(step.get("data_wait_s", 0.0) for step in steps),
            "energy_j": None if energy is None or used is None else used - energy,
            "memory": hardware.memory_of(device),
        }
        return self._summary(self.ranks.gather(own), windows)

    def _run(self, batches: Iterator[Batch], steps: int, watch: _Stopwatch | None = None) -> None:
        with collected_between_steps() as collect:
            train(
                first_step=0,
                steps=steps,
                accumulation=accumulation(self.config, self.ranks.world.size),
                engine=self.engine,
                ranks=self.ranks,
                batches=batches,
                loss_of=lambda batch: self.objective.loss(self.engine, batch),
                meter=watch or _Stopwatch(),
                health=_Unwatched(),
                stop_wanted=lambda: False,
                save=lambda step: None,
                save_due=lambda step: False,
                validate=dict,
                validation_due=lambda step: False,
                step_done=collect,
                take_yardsticks=self.objective.take_yardsticks,
            )

    def _loading(self, batches: Iterator[Batch], windows: Windows) -> dict[str, Any]:
        per_step = accumulation(self.config, self.ranks.world.size)
        self._draw(batches, windows.warmup_steps * per_step)
        seconds = []
        for _ in range(windows.count):
            self.ranks.gather(None)
            seconds.append(
                hardware.seconds_of(lambda: self._draw(batches, windows.steps * per_step), self.ranks.device)
            )
        own = {"rank": self.ranks.world.rank, "seconds": seconds}
        return self._summary(self.ranks.gather(own), windows)

    @staticmethod
    def _draw(batches: Iterator[Batch], count: int) -> None:
        for _ in range(count):
            next(batches)

    def _summary(self, of_rank: list[dict[str, Any]], windows: Windows) -> dict[str, Any]:
        """One mode: windows are as long as their slowest rank took."""
        slowest = [max(rank["seconds"][window] for rank in of_rank) for window in range(windows.count)]
        rates = [windows.steps * self.config.global_batch / seconds for seconds in slowest]
        tree: dict[str, Any] = {
            "samples_per_s": round(statistics.median(rates), 4),
            "spread_percent": round(100 * (max(rates) - min(rates)) / statistics.median(rates), 1),
            "windows_s": [round(seconds, 4) for seconds in slowest],
        }
        if "step_s" in of_rank[0]:
            step_s = sorted(max(pair) for pair in zip(*(rank["step_s"] for rank in of_rank), strict=True))
            waits = [100 * rank["data_wait_s"] / sum(rank["step_s"]) for rank in of_rank]
            joules = [rank["energy_j"] for rank in of_rank]
            tree |= {
                "step_p50_s": round(_quantile(step_s, 0.5), 5),
                "step_p95_s": round(_quantile(step_s, 0.95), 5),
                "step_max_s": round(step_s[-1], 5),
                "data_wait_percent": [round(wait, 2) for wait in waits],  # by rank
                "memory": [rank["memory"] for rank in of_rank],
                "energy_j_per_sample": None
                if None in joules
                else sum(joules) / (windows.count * windows.steps * self.config.global_batch),
            }
        return tree

    def flops(self) -> tuple[int, int]:
        """Of one sample: what a step needs, and what the device does when it recomputes. Counted, not estimated."""
        encoder = self.config.model
        try:
            full = self._record(self.config)
        except ConvolutionError:
            whole = sum(run_flops(self.config, self.channels).values(), start=Flops(forward=0, backward=0))
            return whole.training, whole.hardware
        if not encoder.checkpoint_activations:
            return full.flops // self.config.micro_batch, full.hardware_flops // self.config.micro_batch
        lean = self._record(replace(self.config, model=replace(encoder, checkpoint_activations=False)))
        return lean.flops // self.config.micro_batch, full.hardware_flops // self.config.micro_batch

    def _record(self, config: PretrainConfig) -> Any:
        objective, meta = pretrain_objective(config), torch.device("meta")
        model = objective.build(self.channels).to(meta)
        batch = synthetic_batch(config, self.channels, meta)

        def step() -> None:
            loss: Tensor = objective.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]

        return record(step)


def _quantile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def blame(modes: dict[str, Any]) -> tuple[float | None, str]:
    """End to end as a part of the slower of the other two, and who is to blame for what is missing."""
    if "end_to_end" not in modes:
        return None, "synthetic only: no store was given"
    step, loader, both = (modes[name]["samples_per_s"] for name in MODES)
    part = both / min(step, loader)
    wait = max(modes["end_to_end"]["data_wait_percent"])
    slower = "the loader" if loader < step else "the step"
    if part >= LEAST_OF_SMALLER:
        return round(part, 3), f"limited by {slower}; nothing is lost between the two"
    if wait > 100 * (1 - LEAST_OF_SMALLER):
        return round(part, 3), (
            f"the loader: ranks wait {wait:.0f} % of their time for data; more stream.workers or cores, crops that "
            "share a region, or a stage"
        )
    return round(part, 3), (
        "the step: it does not wait for data, but is slower beside the loader, which takes its cores or memory "
        "bandwidth; leave the trainer a core of its own"
    )


def bench_training(
    config: PretrainConfig, ranks: Ranks, windows: Windows, *, with_store: bool, channels: int = 1
) -> dict[str, Any]:
    """All that the verb measures, as its JSON tells it, on every rank. A collective."""
    bench = Bench(config, ranks, with_store=with_store, channels=channels)
    modes = bench.measure(windows)
    flops, hardware_flops = bench.flops()
    name = hardware.device_name(ranks.device)
    dtype = torch.bfloat16 if bench.engine.precision == "bf16" else torch.float32
    part, verdict = blame(modes)
    return {
        "schema_version": measure.SCHEMA_VERSION,
        "benchmark": "train",
        "surroundings": measure.surroundings(),
        "config": config_tree(config),
        "config_hash": tree_hash(config_tree(config)),
        "ranks": ranks.world.size,
        "nodes": sorted(set(ranks.gather(ranks.world.node))),
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "windows": dataclasses.asdict(windows),
        "modes": modes,
        "end_to_end_of_smaller": part,
        "verdict": verdict,
        "gflops_a_sample": round(flops / 1e9, 3),
        "utilisation": hardware.utilisation(
            flops=flops * config.global_batch,
            hardware_flops=hardware_flops * config.global_batch,
            seconds=config.global_batch / modes["synthetic"]["samples_per_s"],
            devices=ranks.world.size,
            name=name,
            dtype=dtype,
            measured=hardware.measured_flops_per_s(ranks.device, dtype),
        ),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """One row a mode, and who is to blame."""
    cells = []
    for name in MODES:
        if (mode := result["modes"].get(name)) is None:
            continue
        timed = "step_p50_s" in mode
        memory = max(rank["host_peak_bytes"] for rank in mode["memory"]) if timed else 0
        cells.append(
            [
                name.replace("_", " "),
                f"{mode['samples_per_s']:.2f}",
                f"{mode['spread_percent']:.0f} %",
                *(f"{1e3 * mode[f'step_{key}_s']:.1f}" if timed else "" for key in ("p50", "p95", "max")),
                f"{max(mode['data_wait_percent']):.1f} %" if timed else "",
                f"{memory / 1e9:.2f}" if timed else "",
            ]
        )
    columns = ["mode", "samples/s", "spread", "step p50, ms", "p95", "max", "data wait, slowest rank", "GB of a rank"]
    use, config = result["utilisation"], result["config"]
    mfu, hfu = (use[key] if use[key] is not None else use[f"{key}_of_measured"] for key in ("mfu", "hfu"))
    peak = "the data sheet's peak" if use["mfu"] is not None else "a large product measured here"
    return (
        f"{result['ranks']} rank(s), micro-batch {config['micro_batch']}, global batch {config['global_batch']}, "
        f"ZeRO-{config['engine']['zero_stage']}, {result['threads']} thread(s) a rank\n\n"
        + measure.table(columns, cells)
        + f"\nMFU {100 * mfu:.1f} %, HFU {100 * hfu:.1f} % of {peak}. {result['verdict']}\n"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the three modes."""
    rows = [(name.replace("_", " "), mode["samples_per_s"]) for name, mode in result["modes"].items()]
    title = f"{result['ranks']} rank(s) on {result['device']}"
    draw_bars([Bars(title=title, unit="samples a second", rows=rows)], path)


def run_training(config: PretrainConfig, windows: Windows, *, channels: int, as_json: bool, folder: Path | None) -> int:
    """The verb's body: measure as one rank, and let rank 0 tell; returns the exit code."""
    world = World.from_environment(os.environ)
    accumulation(config, world.size)
    if world.is_first:
        make_folder(folder)
    with joined_ranks(world, collective_timeout_min=config.engine.collective_timeout_min) as ranks:
        result = bench_training(config, ranks, windows, with_store=config.store != Path("none"), channels=channels)
    if world.is_first:
        tell(result, as_markdown, draw, as_json=as_json, folder=folder)
    return 0
