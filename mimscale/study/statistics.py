"""How large a difference is, and how sure: means over seeds, paired intervals, steps to a target.

    P pretraining seeds | F fine-tuning seeds | N cases | R bootstrap replicates

Pure NumPy on small arrays. What was not measured is NaN, and takes no part.
"""

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation over seeds; the deviation is None of a single one."""

    mean: float | None
    std: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A difference of two arms with its bootstrap interval; None when there is nothing to compare."""

    difference: float | None
    low: float | None
    high: float | None
    pretrain_seeds: int
    finetune_seeds: int
    cases: int

    @property
    def shows(self) -> str:
        """What the interval says about the difference, in a word: higher, lower, or nothing."""
        if self.low is None or self.high is None:
            return "nothing"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "nothing"


@dataclass(frozen=True, kw_only=True)
class Time:
    """When something was reached; censored: not until then."""

    value: float
    censored: bool


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A quotient of two times; `bound` says when it is only known to be at least or at most this much."""

    value: float | None
    bound: str = ""  # "", "at least", "at most"


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample standard deviation of the values that are there."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(
        mean=statistics.fmean(there) if there else None,
        std=statistics.stdev(there) if len(there) > 1 else None,
        count=len(there),
    )


def paired_bootstrap(
    ours: Floats, theirs: Floats, *, replicates: int, seed: int, level: float, same_pretraining: bool = True
) -> Interval:
    """The mean difference of two arms that scored the same cases, and its percentile interval.

    A replicate draws, with replacement, pretraining seeds; within each of these, fine-tuning seeds; and cases. Every
    run scores all cases, so one draw of cases holds for all runs of a replicate: to draw them anew for every run would
    average their difficulty away. Fine-tuning seeds are the same in both arms, which pairs them.

    Args:
        ours: scores [P, F, N], NaN where there is none.
        theirs: scores [P', F, N] of the arm to compare with; P' is 1 for one that was not pretrained.
        replicates: R.
        seed: of the draws.
        level: of the interval, for example 0.95.
        same_pretraining: the seeds of `theirs` are drawn together with ours; False draws them on their own.
    """
    num_ours, num_finetune, num_cases = ours.shape
    num_theirs = theirs.shape[0]
    together = same_pretraining and num_theirs == num_ours
    # Run by run and case by case, as in the replicates: what one arm alone has a score of says nothing of a difference.
    difference = _mean_of(ours - theirs if together else ours[:, None] - theirs[None])
    counts = {"pretrain_seeds": num_ours, "finetune_seeds": num_finetune, "cases": num_cases}
    if not math.isfinite(difference):
        return Interval(difference=None, low=None, high=None, **counts)
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(replicates):
        p = random.integers(num_ours, size=(num_ours,))  # [P]
        f = random.integers(num_finetune, size=(num_ours, num_finetune))  # [P, F]
        n = random.integers(num_cases, size=(num_cases,))  # [N]
        if num_theirs == 1 and num_ours > 1:
            other = np.zeros_like(p)
        elif together:
            other = p
        else:
            other = random.integers(num_theirs, size=(num_ours,))
        mine = ours[p[:, None, None], f[:, :, None], n[None, None, :]]  # [P, F, N]
        yours = theirs[other[:, None, None], f[:, :, None], n[None, None, :]]
        draws.append(_mean_of(mine - yours))
    found = np.array(draws)
    found = found[np.isfinite(found)]
    if num_ours * num_finetune * num_cases < 2 or not len(found):
        return Interval(difference=difference, low=None, high=None, **counts)
    tail = (1 - level) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(difference=difference, low=float(low), high=float(high), **counts)


def _mean_of(scores: Floats) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN the mean is NaN, which is meant
        return float(np.nanmean(scores))


def time_to_target(curve: Sequence[tuple[int, float]], target: float, last_step: int) -> Time:
    """The first step of a curve (step, score) at which the target is reached; censored at `last_step` when at none."""
    for step, score in curve:
        if score >= target:
            return Time(value=step, censored=False)
    return Time(value=last_step, censored=True)


def median_time(times: Sequence[Time]) -> Time | None:
    """The median of times. It is censored when half of them or more are; they are then later than all others.

    Of an even number the later one of the middle two is taken: the mean with a censored time would be no time.
    """
    if not times:
        return None
    ordered = sorted(times, key=lambda time: (time.censored, time.value))
    return ordered[len(ordered) // 2]


def time_ratio(reference: Time | None, arm: Time | None) -> Ratio:
    """How many times sooner `arm` is than `reference`."""
    if reference is None or arm is None or (reference.censored and arm.censored) or arm.value <= 0:
        return Ratio(value=None)
    bound = "at least" if reference.censored else "at most" if arm.censored else ""
    return Ratio(value=reference.value / arm.value, bound=bound)
