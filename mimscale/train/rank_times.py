"""Which rank makes the others wait?

All ranks end a step together, so its whole time is the same on each. A rank's *own* time is what it needs before it
meets the others: waiting for its data, and its forward passes. These are times of the host: on CUDA, where it runs
ahead of the device, a slow device is in them only as far as it makes the host wait.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# A rank that is slower by less than this part of a step costs too little to speak of.
LEAST_PART_OF_STEP = 0.05


@dataclass(frozen=True)
class RankTimes:
    """Mean times of one rank over some steps, seconds a step."""

    rank: int
    node: str
    step_s: float
    data_wait_s: float
    forward_s: float

    @property
    def own_s(self) -> float:
        """What the rank needs before it meets the others."""
        return self.data_wait_s + self.forward_s


def time_metrics(times: Sequence[RankTimes]) -> dict[str, float]:
    """The spread over the ranks, for metrics.jsonl."""
    slowest = max(times, key=lambda rank: rank.own_s)
    return {
        "rank_own_s_median": statistics.median_low(rank.own_s for rank in times),
        "rank_own_s_max": slowest.own_s,
        "rank_data_wait_s_max": max(rank.data_wait_s for rank in times),
        "slowest_rank": float(slowest.rank),
    }


def slow_rank(times: Sequence[RankTimes], factor: float) -> str | None:
    """The slowest rank in words, when its own time is more than `factor` times the median; else None."""
    slowest = max(times, key=lambda rank: rank.own_s)
    median_s = statistics.median_low(rank.own_s for rank in times)
    lost_s = slowest.own_s - median_s
    if slowest.own_s <= factor * median_s or lost_s < LEAST_PART_OF_STEP * slowest.step_s:
        return None
    return (
        f"rank {slowest.rank} on {slowest.node} needs {slowest.own_s:.2f} s a step before it meets the others (waits "
        f"for data {slowest.data_wait_s:.2f} s, forward {slowest.forward_s:.2f} s); the median rank needs "
        f"{median_s:.2f} s"
    )
