"""Bytes that ranks exchange in a step, the time that takes, and what measured runs say about it.

n ranks | N nodes | P parameters
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.bench.gpus import Gpu
from mimscale.errors import ConfigError
from mimscale.train.config import RunConfig

_FP32_BYTES = 4  # gradients are summed in fp32, whatever the precision of the weights


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes a step that a rank of very many sends; of n ranks, (n - 1) / n of it (a ring; reduce or gather alike)."""

    behind_backward: int  # may travel while the backward pass goes on
    alone: int  # the step waits for it


def traffic(config: RunConfig, parameters: int, micro_batches: int, *, bf16: bool) -> Traffic:
    """What ZeRO moves (Rajbhandari et al. 2020, arXiv:1910.02054, sec. 7), in the types that the engine uses."""
    gradients, weights = _FP32_BYTES * parameters, (2 if bf16 else 4) * parameters
    match config.engine.zero_stage:
        case 0:
            return Traffic(behind_backward=0, alone=2 * gradients)
        case 1:  # one reduction a step; the engine overlaps it only where a step has one micro-batch
            if micro_batches == 1:
                return Traffic(behind_backward=gradients, alone=weights)
            return Traffic(behind_backward=0, alone=gradients + weights)
        case 2:  # every micro-batch reduces into the owner's share
            return Traffic(behind_backward=gradients * micro_batches, alone=weights)
        case _:  # forward and backward gather the weights again
            return Traffic(behind_backward=(gradients + 2 * weights) * micro_batches, alone=0)


def transfer_s(sent_bytes: float, nodes: int, gpus_per_node: int, gpu: Gpu) -> float:
    """Seconds for a ring through all ranks: as slow as its slowest link."""
    ranks = nodes * gpus_per_node
    within = sent_bytes / (gpu.peer_gb_per_s * 1e9) if gpus_per_node > 1 else 0.0
    between = sent_bytes / (gpu.network_gb_per_s * 1e9) if nodes > 1 else 0.0
    return max(within, between) * (ranks - 1) / ranks


@dataclass(frozen=True)
class WeakStep:
    """A measured step of n ranks with a fixed batch each."""

    ranks: int
    step_s: float
    ranks_a_core: float = 1.0  # above 1 where ranks share cores, and so compute in turns


@dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """step_s(n) = alone_s * ranks_a_core + sent_bytes * (n - 1) / n / bandwidth, fitted to measured runs."""

    alone_s: float  # of one rank
    gb_per_s: float | None  # what the step waits for, so after overlap; None: more ranks took no longer
    worst_miss_percent: float  # of a measured step, by the fit
    ranks: tuple[int, ...]  # that were measured
    nodes: int  # on so many at most

    def exposed_s(self, sent_bytes: float, ranks: int) -> float:
        """Seconds a step that `ranks` ranks wait for each other."""
        return 0.0 if self.gb_per_s is None else sent_bytes / (self.gb_per_s * 1e9) * (ranks - 1) / ranks


def fit_scaling(steps: Sequence[WeakStep], sent_bytes: float, nodes: int = 1) -> ScalingFit:
    """Least squares over the measured steps.

    Raises:
        ConfigError: fewer than two numbers of ranks.
    """
    ranks = tuple(step.ranks for step in steps)
    if len(set(ranks)) < 2:
        raise ConfigError(f"runs on {list(ranks)} ranks: a fit needs two or more numbers of ranks")
    crowding = np.array([step.ranks_a_core for step in steps])
    shares = np.array([(step.ranks - 1) / step.ranks for step in steps])
    seconds = np.array([step.step_s for step in steps])
    (alone_s, slope_s), *_ = np.linalg.lstsq(np.stack([crowding, shares], axis=1), seconds, rcond=None)
    if slope_s < 0:  # more ranks took no longer
        alone_s, slope_s = float(crowding @ seconds / (crowding @ crowding)), 0.0
    misses = np.abs(alone_s * crowding + slope_s * shares - seconds) / seconds
    return ScalingFit(
        alone_s=float(alone_s),
        gb_per_s=float(sent_bytes / slope_s / 1e9) if slope_s > 0 else None,
        worst_miss_percent=round(100 * float(misses.max()), 1),
        ranks=ranks,
        nodes=nodes,
    )


def weak_steps(result: dict[str, Any], origin: Path) -> tuple[list[WeakStep], int]:
    """The weak rows of `bench scaling`, on synthetic batches, and the nodes of the largest.

    Raises:
        ConfigError: another kind of result, or one without weak scaling.
    """
    rows = result.get("scaling", {}).get("weak") if result.get("benchmark") == "scaling" else None
    if not rows:
        raise ConfigError(f"{origin}: no weak scaling in it; expected the JSON of `mimscale bench scaling`")
    return [weak_step(row) for row in rows], max(row["nodes"] for row in rows)


def weak_step(row: dict[str, Any]) -> WeakStep:
    """Of a weak row of `bench scaling`, without a loader: what ranks wait for there is each other."""
    step_s = row["global_batch"] / row["modes"]["synthetic"]["samples_per_s"]
    return WeakStep(row["ranks"], step_s, row.get("ranks_a_core", 1.0))
