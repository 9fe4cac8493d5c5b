"""What a run says about itself: metrics.jsonl, trackers, heartbeat, and a line for the person who watches.

Only rank 0 writes; the other ranks measure their spans and hand them into the reduction that the loop makes anyway.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mimscale import durable
from mimscale.console import say
from mimscale.errors import CheckpointError
from mimscale.train.config import MeterConfig
from mimscale.train.run_dir import RunDir
from mimscale.train.trackers import TensorBoard, Tracker, WeightsAndBiases
from mimscale.world import World

HEARTBEAT_EVERY_S = 5.0
LINE_EVERY_S = 2.0


class Meter:
    """Times the parts of a step and writes the shared numbers down.

    Args:
        run: where.
        config: what.
        world: rank 0 writes, the others only measure.
        steps: of the whole run, for the progress line.
        global_batch: samples a step.
    """

    def __init__(self, run: RunDir, config: MeterConfig, world: World, *, steps: int, global_batch: int) -> None:
        self._run = run
        self._config = config
        self._world = world
        self._steps = steps
        self._global_batch = global_batch
        self._spans: dict[str, float] = defaultdict(float)
        self._earlier_s = 0.0  # wall clock of earlier jobs
        self._last_beat_s = self._last_line_s = float("-inf")
        self._trackers: list[Tracker] = []
        self.last_metrics: dict[str, Any] = {}

    def start(self, first_step: int) -> None:
        """Forget lines of steps that were never saved: the run repeats them."""
        if not self._world.is_first:
            return
        metrics = self._run.read_metrics()
        kept = [line for line in metrics if line["step"] <= first_step]
        self._earlier_s = max((float(line["wall_s"]) for line in kept if "wall_s" in line), default=0.0)
        if len(kept) < len(metrics):
            say(f"{len(metrics) - len(kept)} logged step(s) after step {first_step} were not saved and are repeated")
        with self._writing(self._run.metrics):
            durable.write_text(self._run.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        with self._writing(self._run.path):
            if self._config.tensorboard:
                self._trackers.append(TensorBoard(self._run.tensorboard, first_step))
            if self._config.wandb is not None:
                self._trackers.append(WeightsAndBiases(self._run, self._config.wandb))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the block's wall time to `name` of the current step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans[name] += time.perf_counter() - start

    def take_spans(self) -> dict[str, float]:
        """The seconds of this step's spans on this rank; the next step starts at zero."""
        spans = dict(self._spans)
        self._spans.clear()
        return spans

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Write one optimizer step. `values` holds at least loss, lr, grad_norm, step_s and data_wait_s."""
        if not self._world.is_first:
            return
        values = {"samples_per_s": self._global_batch / values["step_s"], **values}
        self.last_metrics |= values
        now = time.monotonic()
        if step % self._config.log_every_steps == 0 or step == self._steps:
            self._append(step, values)
        if now - self._last_line_s >= LINE_EVERY_S or step == self._steps:
            self._last_line_s = now
            wait_percent = 100 * values["data_wait_s"] / values["step_s"]
            say(
                f"step {step}/{self._steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
                f"{values['samples_per_s']:.2f} samples/s  data wait {wait_percent:.1f} %"
            )
        if now - self._last_beat_s >= HEARTBEAT_EVERY_S or step == self._steps:
            self._last_beat_s = now
            beat = {name: values[name] for name in ("loss", "samples_per_s")}
            with self._writing(self._run.heartbeat):
                durable.write_json(
                    self._run.heartbeat, {"step": step, "steps": self._steps, "time_s": time.time(), **beat}
                )

    def log_skipped(self, step: int, values: dict[str, float]) -> None:
        """Write a step whose update was left out: it has no loss."""
        if self._world.is_first:
            self._append(step, values)

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Write the validation after `step` steps."""
        if not self._world.is_first:
            return
        self.last_metrics |= values
        self._append(step, values)
        shown = {name: value for name, value in values.items() if "/" not in name}  # groups stand in the files
        say(f"step {step}/{self._steps}  " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    def log_checkpoint(self, step: int, values: dict[str, float]) -> None:
        """Write what the checkpoint of `step` steps cost."""
        if self._world.is_first:
            self._append(step, values)

    def log_cost(self, step: int, *, peak_memory_bytes: float, job_s: float) -> None:
        """Write what `step` steps have cost: the most memory that a rank of this job has held, and the wall clock.

        Of earlier jobs the time counts up to the save that this one has continued from.
        """
        if self._world.is_first:
            wall_s = round(self._earlier_s + job_s, 3)
            self._append(step, {"peak_memory_bytes": peak_memory_bytes, "wall_s": wall_s})

    def _append(self, step: int, values: dict[str, float]) -> None:
        with self._writing(self._run.metrics), self._run.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        for tracker in self._trackers:
            with self._writing(self._run.path):
                tracker.add(step, values)

    def record_samples(self, step: int, sample_ids: list[int]) -> None:
        """Write which samples this rank trained on in a step, when the config asks for it."""
        if self._config.record_samples:
            path = self._run.samples / f"rank{self._world.rank:05d}.jsonl"
            with self._writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps({"step": step, "sample_ids": sample_ids}) + "\n")

    @staticmethod
    def _writing(path: Path) -> AbstractContextManager[None]:
        return durable.explained(CheckpointError, path, "free space, then give the same command again")

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            # Points that it cannot write any more must not hide the error that ends the run.
            with suppress(OSError) if error is not None else self._writing(self._run.path):
                tracker.close()
