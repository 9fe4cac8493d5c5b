"""The training loop. It says what happens in each step and nothing about how."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from mimscale.errors import DataError
from mimscale.stream.batch import Batch
from mimscale.train.meter import Meter
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
        """End a micro-batch; the last one of a step updates the weights."""

    def grad_norm(self) -> float:
        """Global norm before clipping."""


class Together(Protocol):
    """What the loop needs of the ranks; see `mimscale.train.ranks.Ranks`."""

    world: World

    def sum(self, values: dict[str, Tensor | float]) -> Any:
        """Start a reduction; `.wait()` gives the sums over all ranks."""


def train(
    *,
    first_step: int,
    steps: int,
    accumulation: int,
    engine: Stepper,
    ranks: Together,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    meter: Meter,
    stop_wanted: Callable[[], bool],
    save: Callable[[int], None],
    save_due: Callable[[int], bool],
    validate: Callable[[], dict[str, float]],
    validation_due: Callable[[int], bool],
    take_counts: Callable[[], dict[str, float]] = dict,
    is_written: Callable[[], bool] = lambda: False,
    commit: Callable[[], None] = lambda: None,
) -> int:
    """Train from `first_step` to `steps`, or to the stop step that all ranks agree on; returns the steps done.

    A stop flag rides on the sums that each step starts and the next step reads, so all ranks see it at the same step
    and nobody waits for it. `take_counts` says what this rank counted in a step, by the same names on every rank.
    `is_written` says that this rank has written a checkpoint in the background; when all have, they `commit` it.
    """
    pending = _Pending(meter, ranks.world.size)
    for step in range(first_step, steps):
        loss_sum: Tensor | float = 0.0
        substituted, voxels_decoded, bytes_read = 0, 0.0, 0.0
        sample_ids: list[int] = []
        volume_ids: list[str] = []
        with meter.span("step_s"):
            rate = engine.set_learning_rate(step)
            for micro_index in range(accumulation):
                with meter.span("data_wait_s"):
                    batch = next(batches)
                engine.seed_micro_batch(step, micro_index)
                loss = loss_of(batch)
                engine.backward(loss)
                engine.step()
                loss_sum = loss_sum + loss.detach().double() / accumulation
                substituted += batch.substituted
                voxels_decoded += batch.voxels_decoded
                bytes_read += batch.bytes_read
                sample_ids += batch.sample_ids.tolist()
                volume_ids += batch.volume_ids
            stopping = pending.finish()
        if pending.written_everywhere:
            commit()
        meter.record_samples(step + 1, sample_ids)
        counts = {"substituted": float(substituted), **take_counts()}
        sums = {
            "loss": loss_sum,
            "stop": float(stop_wanted()),
            "written": float(is_written()),
            **counts,
            "samples": float(len(sample_ids)),
            "voxels_decoded": voxels_decoded,
            "bytes_read": bytes_read,
            **meter.take_spans(),
        }
        pending.begin(step + 1, rate, engine.grad_norm(), ranks.sum(sums), tuple(counts), volume_ids)

        done = step + 1
        if validation_due(done):
            pending.finish()
            meter.log_validation(done, _finite(done, validate()))
        if save_due(done) or done == steps or stopping:
            pending.finish()
            save(done)
        if stopping:
            return done
    pending.finish()
    return max(first_step, steps)


def _finite(step: int, values: dict[str, float]) -> dict[str, float]:
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong:
        raise DataError(f"validation after step {step}: {wrong}; lower optim.lr, or look at the validation volumes")
    return values


class _Pending:
    """The sums of the step before: read once, one step late."""

    def __init__(self, meter: Meter, world_size: int) -> None:
        self._meter = meter
        self._world_size = world_size
        self._under_way: tuple[int, float, float, Any, tuple[str, ...], list[str]] | None = None
        self._stop_seen = False
        self.written_everywhere = False

    def begin(
        self, step: int, rate: float, grad_norm: float, sums: Any, counts: tuple[str, ...], volume_ids: list[str]
    ) -> None:
        """Remember what to read later; `counts` names the sums that are logged as sums and not as means."""
        self._under_way = (step, rate, grad_norm, sums, counts, volume_ids)

    def finish(self) -> bool:
        """Read, check and log the sums under way; True once any rank asked to stop.

        Raises:
            DataError: the loss is not finite; this rank's volumes of that step are named.
        """
        self.written_everywhere = False
        if self._under_way is not None:
            step, rate, grad_norm, sums, counts, volume_ids = self._under_way
            self._under_way = None
            shared = sums.wait()
            means = {name: value / self._world_size for name, value in shared.items()}
            if not (math.isfinite(means["loss"]) and math.isfinite(grad_norm)):
                raise DataError(
                    f"step {step}: the loss is {means['loss']}, its gradient norm {grad_norm}; this rank trained on "
                    f"volumes {', '.join(volume_ids)}. "
                    "Look at them (`mimscale inspect STORE VOLUME --png FILE`), or lower optim.lr; the last checkpoint "
                    "lies before it"
                )
            self._stop_seen = self._stop_seen or shared["stop"] > 0
            self.written_everywhere = shared["written"] == self._world_size
            values = {name: means[name] for name in ("loss", "step_s", "data_wait_s")}
            values |= {"lr": rate, "grad_norm": grad_norm, **{name: shared[name] for name in counts}}
            values |= {
                f"{name}_per_crop": shared[name] / shared["samples"] for name in ("voxels_decoded", "bytes_read")
            }
            self._meter.log_step(step, values)
        return self._stop_seen
