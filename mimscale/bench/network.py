"""Bytes that ranks exchange in a step, the time that takes, and what measured runs say about it.

n ranks | N nodes | P parameters
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """step_s(n) = alone_s + sent_bytes * (n - 1) / n / bandwidth, fitted to measured runs of a fixed batch a rank."""

    alone_s: float  # of one rank
    gb_per_s: float | None  # what the step waits for, so after overlap; None: more ranks took no longer
    worst_miss_percent: float  # of a measured step, by the fit
    ranks: tuple[int, ...]  # that were measured
    nodes: int  # on so many at most

    def exposed_s(self, sent_bytes: float, ranks: int) -> float:
        """Seconds a step that `ranks` ranks wait for each other."""
        return 0.0 if self.gb_per_s is None else sent_bytes / (self.gb_per_s * 1e9) * (ranks - 1) / ranks


def fit_scaling(steps: Sequence[tuple[int, float]], sent_bytes: float, nodes: int = 1) -> ScalingFit:
    """Least squares over (ranks, seconds a step).

    Raises:
        ConfigError: fewer than two numbers of ranks.
    """
    if len({ranks for ranks, _ in steps}) < 2:
        raise ConfigError(f"runs on {[ranks for ranks, _ in steps]} ranks: a fit needs two or more numbers of ranks")
    shares = [(ranks - 1) / ranks for ranks, _ in steps]
    mean_share = sum(shares) / len(steps)
    mean_s = sum(seconds for _, seconds in steps) / len(steps)
    spread = sum((share - mean_share) ** 2 for share in shares)
    slope_s = sum((share - mean_share) * seconds for share, (_, seconds) in zip(shares, steps, strict=True)) / spread
    slope_s = max(slope_s, 0.0)
    alone_s = mean_s - slope_s * mean_share
    misses = [
        abs(alone_s + slope_s * share - seconds) / seconds for share, (_, seconds) in zip(shares, steps, strict=True)
    ]
    return ScalingFit(
        alone_s=alone_s,
        gb_per_s=sent_bytes / slope_s / 1e9 if slope_s > 0 else None,
        worst_miss_percent=round(100 * max(misses), 1),
        ranks=tuple(ranks for ranks, _ in steps),
        nodes=nodes,
    )


def weak_steps(result: dict[str, Any], origin: Path) -> tuple[list[tuple[int, float]], int]:
    """(ranks, seconds a step) of the weak rows of `bench scaling`, on synthetic batches, and the nodes of the largest.

    Raises:
        ConfigError: another kind of result, or one without weak scaling.
    """
    rows = result.get("scaling", {}).get("weak") if result.get("benchmark") == "scaling" else None
    if not rows:
        raise ConfigError(f"{origin}: no weak scaling in it; expected the JSON of `mimscale bench scaling`")
    # Without a loader: what ranks wait for there is each other.
    steps = [(row["ranks"], row["global_batch"] / row["modes"]["synthetic"]["samples_per_s"]) for row in rows]
    return steps, max(row["nodes"] for row in rows)
