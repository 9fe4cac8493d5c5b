"""The training loop. It says what happens in each step and nothing about how."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mimscale.errors import DataError
from mimscale.stream.batch import Batch
from mimscale.world import World


class Stepper(Protocol):
    """What the loop needs of an engine; see `mimscale.train.engine.Engine`."""

    def seed_micro_batch(self, step: int, micro_index: int) -> None:
        """Seed dropout."""

    def set_learning_rate(self, step: int) -> float:
        """Set and return the rate of a step."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch."""

    def step(self) -> None:
        """End a micro-batch; the last one of a step updates the weights, unless the gradient is not finite."""

    def grad_norm(self) -> Tensor | float:
        """Global norm before clipping, the same on every rank; not finite where any gradient was not."""


class Together(Protocol):
    """What the loop needs of the ranks; see `mimscale.train.ranks.Ranks`."""

    world: World

    def sum(self, values: dict[str, Tensor | float]) -> Any:
        """Start a reduction; `.wait()` gives the sums over all ranks."""


class Watch(Protocol):
    """What the loop needs of a meter; see `mimscale.train.meter.Meter`."""

    def span(self, name: str, /) -> AbstractContextManager[None]:
        """Time a block."""

    def take_spans(self) -> dict[str, float]:
        """The seconds of this step's spans."""

    def record_samples(self, step: int, sample_ids: list[int], /) -> None:
        """Note what this rank trained on."""

    def log_step(self, step: int, values: dict[str, float], /) -> None:
        """Write one step down."""

    def log_skipped(self, step: int, values: dict[str, float], /) -> None:
        """Write down a step whose update was left out."""

    def log_validation(self, step: int, values: dict[str, float], /) -> None:
        """Write one validation down."""


class Judge(Protocol):
    """What the loop needs of a run's health; see `mimscale.train.health.Health`."""

    skipped: int

    def keep(self, step: int, losses: Sequence[Tensor], micro_batches: Sequence[Batch], /) -> None:
        """Keep what a step trained on until its norm is read."""

    def update_was_made(self, step: int, grad_norm: float, /) -> bool:
        """Whether the engine made the update of a step, by its norm, which is read late."""

    def watch_loss(self, step: int, loss: float, done: int, /) -> None:
        """Judge the shared loss of a step."""

    def compare_ranks(self, step: int, spans: dict[str, float], /) -> dict[str, float]:
        """Compare what the ranks spent their time on; empty at most steps."""


def train(
    *,
    first_step: int,
    steps: int,
    accumulation: int,
    engine: Stepper,
    ranks: Together,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    meter: Watch,
    health: Judge,
    stop_wanted: Callable[[], bool],
    save: Callable[[int], None],
    save_due: Callable[[int], bool],
    validate: Callable[[], dict[str, float]],
    validation_due: Callable[[int], bool],
    step_done: Callable[[int], None] = lambda step: None,
    take_counts: Callable[[], dict[str, float]] = dict,
    take_yardsticks: Callable[[], dict[str, Tensor | float]] = dict,
    is_written: Callable[[], bool] = lambda: False,
    commit: Callable[[], None] = lambda: None,
) -> int:
    """Train from `first_step` to `steps`, or to the stop step that all ranks agree on; returns the steps done.

    A stop flag rides on the sums that each step starts and the next step reads, so all ranks see it at the same step
    and nobody waits for it. `step_done` is told of each; `take_counts` says what this rank counted in it, by the same
    names on every rank, and `take_yardsticks` what its loss is to be compared with. `is_written` says that this rank
    has written a checkpoint in the background; when all have, they `commit` it.
    """
    pending = _Pending(meter, health, ranks.world.size)
    for done in range(first_step + 1, steps + 1):
        micro_batches: list[Batch] = []
        losses: list[Tensor] = []
        with meter.span("step_s"):
            rate = engine.set_learning_rate(done - 1)
            for micro_index in range(accumulation):
                with meter.span("data_wait_s"):
                    batch = next(batches)
                engine.seed_micro_batch(done - 1, micro_index)
                with meter.span("forward_s"):
                    loss = loss_of(batch)
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
                micro_batches.append(batch)
            stopping = pending.finish(done)
        step_done(done)
        if pending.written_everywhere:
            commit()
        health.keep(done, losses, micro_batches)
        sample_ids = [sample_id for batch in micro_batches for sample_id in batch.sample_ids.tolist()]
        meter.record_samples(done, sample_ids)
        spans = meter.take_spans()
        counts = {"substituted": float(sum(batch.substituted for batch in micro_batches)), **take_counts()}
        yardsticks = take_yardsticks()
        sums = {
            "loss": sum(loss.double() / accumulation for loss in losses),
            "grad_norm": engine.grad_norm(),
            "stop": float(stop_wanted()),
            "written": float(is_written()),
            **counts,
            "samples": float(len(sample_ids)),
            "voxels_decoded": sum(batch.voxels_decoded for batch in micro_batches),
            "bytes_read": sum(batch.bytes_read for batch in micro_batches),
            **{f"yardstick_{name}": loss for name, loss in yardsticks.items()},
            **spans,
        }
        times = health.compare_ranks(done, spans)
        pending.begin(_Step(done, rate, ranks.sum(sums), tuple(counts), tuple(yardsticks), times))

        if validation_due(done):
            pending.finish(done)
            meter.log_validation(done, _finite(done, validate()))
        if save_due(done) or done == steps or stopping:
            pending.finish(done)
            save(done)
        if stopping:
            return done
    pending.finish(steps)
    return max(first_step, steps)


def _finite(step: int, values: dict[str, float]) -> dict[str, float]:
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong:
        raise DataError(f"validation after step {step}: {wrong}; lower optim.lr, or look at the validation volumes")
    return values


@dataclass(frozen=True)
class _Step:
    """What is known of a step before its sums are."""

    number: int
    rate: float
    sums: Any
    counts: tuple[str, ...]  # names of the sums that are logged as sums and not as means
    yardsticks: tuple[str, ...]  # names of what the loss is compared with
    rank_times: dict[str, float]


class _Pending:
    """The sums of the step before: read once, one step late."""

    def __init__(self, meter: Watch, health: Judge, world_size: int) -> None:
        self._meter = meter
        self._health = health
        self._world_size = world_size
        self._under_way: _Step | None = None
        self._stop_seen = False
        self.written_everywhere = False

    def begin(self, step: _Step) -> None:
        """Remember what to read later."""
        self._under_way = step

    def finish(self, done: int) -> bool:
        """Read, log and judge the sums under way, when `done` steps were made; True once any rank asked to stop.

        Raises:
            DataError: as `Health.update_was_made` and `Health.watch_loss`.
        """
        self.written_everywhere = False
        if self._under_way is not None:
            step, self._under_way = self._under_way, None
            shared = step.sums.wait()
            means = {name: value / self._world_size for name, value in shared.items()}
            was_made = self._health.update_was_made(step.number, means["grad_norm"])
            self._stop_seen = self._stop_seen or shared["stop"] > 0
            self.written_everywhere = shared["written"] == self._world_size
            values = {name: means[name] for name in ("step_s", "data_wait_s")}
            values |= {"lr": step.rate, **{name: shared[name] for name in step.counts}, **step.rank_times}
            if was_made:
                values |= {name: means[name] for name in ("loss", "grad_norm")}
                for name in step.yardsticks:
                    if (guess := means[f"yardstick_{name}"]) > 0:
                        values[f"loss_vs_{name}"] = means["loss"] / guess
                values |= {
                    f"{name}_per_crop": shared[name] / shared["samples"] for name in ("voxels_decoded", "bytes_read")
                }
                self._meter.log_step(step.number, values)
                self._health.watch_loss(step.number, means["loss"], done)
            else:
                self._meter.log_skipped(step.number, {**values, "skipped_steps": float(self._health.skipped)})
        return self._stop_seen
