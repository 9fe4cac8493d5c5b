"""What is done about a step that went wrong: an update that is not finite, a loss that spikes, a rank that is slow.

Every decision is made from numbers that all ranks share, so all ranks decide alike. A step whose update is left out,
and steps that a rollback takes back, still count: a step is a global batch that was read, and the order of the data
goes on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mimscale.console import say
from mimscale.errors import DataError
from mimscale.stream.batch import Batch
from mimscale.train.config import HealthConfig
from mimscale.train.diagnostics import bundle_name, write_bundle
from mimscale.train.health_log import Event, HealthLog
from mimscale.train.rank_times import RankTimes, slow_rank, time_metrics
from mimscale.train.run_dir import RunDir
from mimscale.train.spikes import SpikeDetector
from mimscale.world import World

T = TypeVar("T")
MOST_BUNDLES = 8  # ranks that leave one for the same step


class Together(Protocol):
    """What health needs of the ranks; see `mimscale.train.ranks.Ranks`."""

    world: World

    def gather(self, item: T) -> list[T]:
        """One object of every rank."""

    def first_does(self, action: Callable[[], T]) -> T:
        """Rank 0's result or error, on every rank."""


@dataclass(frozen=True)
class _Trained:
    """What one rank trained on in a step that went wrong."""

    rank: int
    node: str
    losses: list[float]  # of its micro-batches
    volume_ids: list[list[str]]  # of each micro-batch

    @property
    def is_bad(self) -> bool:
        return not all(math.isfinite(loss) for loss in self.losses)

    def __str__(self) -> str:
        named = [
            (loss, ids)
            for loss, ids in zip(self.losses, self.volume_ids, strict=True)
            if not (self.is_bad and math.isfinite(loss))
        ]
        parts = "; ".join(f"loss {loss:g} on volumes {', '.join(ids)}" for loss, ids in named)
        return f"rank {self.rank} on {self.node}: {parts}"


class Health:
    """Watches one job of a run.

    Args:
        config: what counts as ill.
        run: where events and bundles go.
        ranks: the processes that share the work.
        tree: the run's config, for bundles.
        rollback: loads the last checkpoint on all ranks and returns its step; None where there is none. A collective.
    """

    def __init__(
        self,
        config: HealthConfig,
        run: RunDir,
        ranks: Together,
        *,
        tree: dict[str, Any],
        rollback: Callable[[], int | None],
    ) -> None:
        self._config, self._run, self._ranks, self._tree, self._rollback = config, run, ranks, tree, rollback
        self._log = HealthLog(run.health)
        self._spikes = SpikeDetector(config)
        self._times: dict[str, float] = {}
        self._timed_steps = 0
        self._rolled_back_at = 0
        self.skipped = self._rollbacks = 0
        self._unread: dict[int, tuple[Sequence[Tensor], Sequence[Batch]]] = {}  # steps whose norm is read late

    def start(self, first_step: int) -> None:
        """Take up what earlier jobs of the run have seen. A collective."""
        self.skipped, self._rollbacks, losses = self._ranks.first_does(lambda: self._seen_before(first_step))
        for loss in losses:
            self._spikes.observe(loss)

    def _seen_before(self, first_step: int) -> tuple[int, int, list[float]]:
        lines = [line for line in self._run.read_metrics() if "loss" in line and line["step"] <= first_step]
        # Twice the window: the losses in it, and what those were judged by.
        losses = [float(line["loss"]) for line in lines[-2 * self._config.spike_window :]]
        return (
            self._log.count("skipped", up_to_step=first_step),
            self._log.count("rolled_back", up_to_step=first_step),
            losses,
        )

    def keep(self, step: int, losses: Sequence[Tensor], micro_batches: Sequence[Batch]) -> None:
        """Keep what a step trained on until its norm is read, which is a step later: so nobody waits for the device."""
        self._unread[step] = (losses, micro_batches)

    def update_was_made(self, step: int, grad_norm: float) -> bool:
        """Whether the engine made the update of a step: not where the global gradient norm is not finite.

        That is the case on all ranks or on none, so the rest is a collective that only happens when something is wrong.

        Raises:
            DataError: more than `max_skipped` updates were left out.
        """
        losses, micro_batches = self._unread.pop(step)
        if math.isfinite(grad_norm):
            return True
        self._leave_out(step, grad_norm, losses, micro_batches)
        return False

    def _leave_out(self, step: int, grad_norm: float, losses: Sequence[Tensor], micro_batches: Sequence[Batch]) -> None:
        world = self._ranks.world
        own = _Trained(world.rank, world.node, [float(loss) for loss in losses], [b.volume_ids for b in micro_batches])
        everybody = self._ranks.gather(own)
        # With finite losses the reduction has mixed all gradients: the largest loss is the likeliest cause.
        named = [rank for rank in everybody if rank.is_bad] or [max(everybody, key=lambda rank: max(rank.losses))]
        kept = named[:MOST_BUNDLES]
        if own.rank in [rank.rank for rank in kept]:
            self._write_bundle(step, own, grad_norm, micro_batches)
        self.skipped += 1
        bundles = ", ".join(str(self._run.diagnostics / bundle_name(step, rank.rank)) for rank in kept)
        text = "\n  ".join(
            [
                f"step {step}: the loss or its gradient (norm {grad_norm:g}) is not finite; its update was left out",
                *(str(rank) for rank in named),
                f"the batches are in {bundles}",
            ]
        )
        if self.skipped > self._config.max_skipped:
            text += (
                f"\nThese were {self.skipped} such steps, more than health.max_skipped={self._config.max_skipped}. "
                "Look at the volumes (`mimscale inspect STORE VOLUME --png FILE`), or lower optim.lr; the last "
                "checkpoint is untouched by them"
            )
            self._event(step, "stopped", text, volume_ids=_ids(named))
            raise DataError(text)
        self._event(step, "skipped", text, volume_ids=_ids(named))

    def _write_bundle(self, step: int, own: _Trained, grad_norm: float, micro_batches: Sequence[Batch]) -> None:
        folder = self._run.diagnostics / bundle_name(step, own.rank)
        try:
            write_bundle(
                folder,
                micro_batches=micro_batches,
                losses=own.losses,
                grad_norm=grad_norm,
                step=step,
                config=self._tree,
            )
        except OSError as error:  # the run can go on without it
            say(f"{folder}: not written ({error})")

    def watch_loss(self, step: int, loss: float, done: int) -> None:
        """Judge the shared loss of a step, when `done` steps have been made: it is read late. May be a collective.

        Raises:
            DataError: more than `max_rollbacks` spikes.
            CheckpointError: the checkpoint to roll back to cannot be loaded.
        """
        if step <= self._rolled_back_at:
            return  # made with the weights that were given up
        spike = self._spikes.observe(loss)
        if spike is None:
            return
        text = (
            f"step {step}: loss {spike.loss:.4g}, the {self._config.spike_steps}. in a row above {spike.threshold:.4g} "
            f"(median {spike.median:.4g})"
        )
        self._event(step, "spike", text, loss=spike.loss, median=spike.median, threshold=spike.threshold)
        if self._config.on_spike == "rollback":
            self._roll_back(step, text, done)

    def _roll_back(self, step: int, spike: str, done: int) -> None:
        if self._rollbacks >= self._config.max_rollbacks:
            text = (
                f"{spike}; {self._rollbacks} rollback(s) did not help (health.max_rollbacks="
                f"{self._config.max_rollbacks}); lower optim.lr, then give the same command again"
            )
            self._event(step, "stopped", text)
            raise DataError(text)
        saved = self._rollback()
        if saved is None:
            self._event(step, "spike", f"step {step}: there is no checkpoint to roll back to; training goes on")
            return
        self._rollbacks += 1
        self._rolled_back_at = done
        self._spikes.forget_spike()
        text = (
            f"step {done}: weights and optimizer are those of step {saved} again; the data go on behind the spike "
            f"({self._rollbacks} of at most {self._config.max_rollbacks} rollbacks)"
        )
        self._event(done, "rolled_back", text, to_step=saved, steps_undone=done - saved)

    def compare_ranks(self, step: int, spans: dict[str, float]) -> dict[str, float]:
        """Add this rank's seconds of a step; every so many steps gather all ranks' and return their spread, else {}."""
        for name, seconds in spans.items():
            self._times[name] = self._times.get(name, 0.0) + seconds
        self._timed_steps += 1
        if step % self._config.compare_ranks_every_steps or self._ranks.world.size == 1:
            return {}
        means = {name: seconds / self._timed_steps for name, seconds in self._times.items()}
        self._times, self._timed_steps = {}, 0
        world = self._ranks.world
        times = self._ranks.gather(
            RankTimes(world.rank, world.node, means["step_s"], means["data_wait_s"], means["forward_s"])
        )
        if (slow := slow_rank(times, self._config.slow_rank_factor)) is not None:
            self._event(step, "slow_rank", f"step {step}: {slow}")
        return time_metrics(times)

    def _event(self, step: int, event: Event, message: str, **facts: Any) -> None:
        if self._ranks.world.is_first:
            say(message)
            self._log.append(step, event, message, **facts)


def _ids(named: Sequence[_Trained]) -> list[str]:
    return sorted({volume for rank in named for ids in rank.volume_ids for volume in ids})
