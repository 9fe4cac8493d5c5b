"""How large a difference is, and how sure: means over seeds, paired intervals, steps to a target.

    P pretraining seeds | P' those of the arm that is compared with | F fine-tuning seeds | N cases
    R bootstrap replicates

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
Ints = NDArray[np.int64]
_SEEDS, _CASES = 0, 1  # streams of random numbers: how many cases there are changes no draw of seeds


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


# [P][F] -> the times of the runs with these seeds: one, of folds one of each, none where there is no run
SeedTimes = Sequence[Sequence[Sequence[Time]]]


@dataclass(frozen=True, kw_only=True)
class RatioInterval:
    """A quotient of two times with its bootstrap interval; the ends are None where there is none.

    Either end may itself be only a bound, and one without a value is unknown: in the replicates that it follows from,
    neither arm reached the target.
    """

    ratio: Ratio
    low: Ratio | None = None
    high: Ratio | None = None
    pretrain_seeds: int = 0
    finetune_seeds: int = 0

    @property
    def shows(self) -> str:
        """What the interval says about the quotient, in a word: sooner, later, or nothing."""
        if self.low is None or self.high is None:
            return "nothing"
        if self.low.value is not None and self.low.value > 1 and self.low.bound != "at most":
            return "sooner"
        later = self.high.value is not None and self.high.value < 1 and self.high.bound != "at least"
        return "later" if later else "nothing"


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

    A replicate draws, with replacement, pretraining seeds, fine-tuning seeds and cases, and takes every run of these
    seeds on these cases. The two kinds of seeds are crossed: each pretraining is fine-tuned with the same seeds, and a
    seed does there what it does elsewhere, as it gives the same order of volumes and the same first decoder. So one
    draw of fine-tuning seeds holds for all pretraining seeds of a replicate, although such intervals are called nested
    over seeds and cases. To draw them anew within each pretraining seed would average their effects over P x F draws
    where there are F seeds. Scratch shows it best: it has F runs in all, so its mean varies as one of F runs does,
    whatever the number of pretrainings that it is compared with. For the same reason one draw of cases holds for all
    runs. What a run has of its own, beside the effects of its two seeds, makes a crossed bootstrap rather too wide
    (Owen 2007, "The pigeonhole bootstrap").

    Both arms have the same fine-tuning seeds, which pairs them.

    Args:
        ours: scores [P, F, N], NaN where there is none.
        theirs: scores [P', F, N] of the arm to compare with; P' is 1 for one that was not pretrained.
        replicates: R.
        seed: of the draws.
        level: of the interval, for example 0.95.
        same_pretraining: the seeds of `theirs` are drawn together with ours; False draws them on their own.
    """
    num_ours, num_finetune, num_cases = ours.shape
    together = same_pretraining and theirs.shape[0] == num_ours
    # Run by run and case by case: what one arm alone has a score of says nothing of a difference. [P, P' or 1, F, N]
    pairs = (ours - theirs)[:, None] if together else ours[:, None] - theirs[None]
    difference = _mean_of(pairs)
    counts = {"pretrain_seeds": num_ours, "finetune_seeds": num_finetune, "cases": num_cases}
    if not math.isfinite(difference):
        return Interval(difference=None, low=None, high=None, **counts)
    p, other, f = map(_how_often, _seed_draws(seed, replicates, pairs.shape[:3]), pairs.shape)
    n = _how_often(np.random.default_rng([seed, _CASES]).integers(num_cases, size=(replicates, num_cases)), num_cases)
    # A replicate has a run on a case as often as it drew both, so its sums are those of products: [R, P, P', F] with
    # the sums over its cases of each run, [P, P', F, R].
    runs = p[:, :, None, None] * other[:, None, :, None] * f[:, None, None, :]
    there = np.isfinite(pairs)
    total, count = (np.einsum("rpof,pofr->r", runs, values @ n.T) for values in (np.where(there, pairs, 0.0), there))
    found = total[count > 0] / count[count > 0]
    if pairs.size < 2 or not len(found):
        return Interval(difference=difference, low=None, high=None, **counts)
    tail = (1 - level) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(difference=difference, low=float(low), high=float(high), **counts)


def _seed_draws(seed: int, replicates: int, counts: Sequence[int]) -> list[Ints]:
    """The seeds of each replicate, [R, count] of every kind: the same for scores and times of as many seeds."""
    random = np.random.default_rng([seed, _SEEDS])
    return [random.integers(count, size=(replicates, count)) for count in counts]


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
    """The median of times, of an even number the mean of the middle two.

    It is censored when half of them or more are: they are later than all others, and the mean with a time that is at
    least so much is at least so much too. The later one of the middle two would be simpler, and of two runs be their
    maximum, later than the median of as many runs of another arm that are three.
    """
    if not times:
        return None
    ordered = sorted(times, key=lambda time: (time.censored, time.value))
    middle = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return Time(value=(middle[0].value + middle[1].value) / 2, censored=middle[1].censored)


def time_ratio(reference: Time | None, arm: Time | None) -> Ratio:
    """How many times sooner `arm` is than `reference`."""
    if reference is None or arm is None or (reference.censored and arm.censored) or arm.value <= 0:
        return Ratio(value=None)
    bound = "at least" if reference.censored else "at most" if arm.censored else ""
    return Ratio(value=reference.value / arm.value, bound=bound)


def ratio_bootstrap(
    ours: SeedTimes, theirs: SeedTimes, *, replicates: int, seed: int, level: float, same_pretraining: bool = True
) -> RatioInterval:
    """How many times sooner `ours` is: the quotient of median times, theirs over ours, and its percentile interval.

    Seeds are drawn as in `paired_bootstrap`: for the same numbers of them and the same `seed` they are the same draws.
    Cases are not drawn, as a run has one time. The quotient of a replicate is only bounded where one arm is censored,
    and unknown where both are; an end of the interval is known as far as these allow.

    There is no interval where an arm has runs of a single pair of seeds: nothing then says how far its time may be off.

    Args:
        ours: times [P, F].
        theirs: times [P', F] of the arm to compare with; P' is 1 for one that was not pretrained.
        replicates: R.
        seed: of the draws.
        level: of the interval, for example 0.95.
        same_pretraining: the seeds of `theirs` are drawn together with ours; False draws them on their own.
    """
    ratio = time_ratio(*(median_time([time for row in arm for cell in row for time in cell]) for arm in (theirs, ours)))
    alone = any(sum(bool(cell) for row in arm for cell in row) < 2 for arm in (ours, theirs))
    if ratio.value is None or alone:
        return RatioInterval(ratio=ratio)
    together = same_pretraining and len(theirs) == len(ours)
    p, other, f = _seed_draws(seed, replicates, (len(ours), 1 if together else len(theirs), len(ours[0])))
    mine, never_mine = _drawn_medians(ours, p, f)
    yours, never_yours = _drawn_medians(theirs, p if together else other, f)
    there = np.isfinite(mine) & np.isfinite(yours) & (mine > 0)
    if not there.any():
        return RatioInterval(ratio=ratio)
    quotient = (yours / np.where(there, mine, 1.0))[there]
    # The quotient of a replicate is at least and at most this; both are the same where both arms reached the target.
    least, most = np.where(never_mine[there], 0.0, quotient), np.where(never_yours[there], np.inf, quotient)
    tail = (1 - level) / 2
    # Order statistics, the outer ones: between a number and infinity there is nothing to interpolate.
    low = _end(*(float(np.quantile(side, tail, method="lower")) for side in (least, most)), lower=True)
    high = _end(*(float(np.quantile(side, 1 - tail, method="higher")) for side in (least, most)), lower=False)
    if low.value is None and high.value is None:
        return RatioInterval(ratio=ratio)
    return RatioInterval(ratio=ratio, low=low, high=high)


def _drawn_medians(times: SeedTimes, p: Ints, f: Ints) -> tuple[Floats, NDArray[np.bool_]]:
    """`median_time` of the runs of each replicate: value [R], NaN where it drew no run, and whether it is censored [R].

    Args:
        times: [P, F].
        p: the pretraining seeds that were drawn, [R, P].
        f: the fine-tuning seeds that were drawn, [R, F].
    """
    runs = [(time, i, j) for i, row in enumerate(times) for j, cell in enumerate(row) for time in cell]
    runs.sort(key=lambda run: (run[0].censored, run[0].value))
    # A run takes part as often as its pretraining seed was drawn times as often as its fine-tuning seed was: [R, runs]
    drawn = (
        _how_often(p, len(times))[:, [i for _, i, _ in runs]] * _how_often(f, len(times[0]))[:, [j for *_, j in runs]]
    )
    so_far = drawn.cumsum(axis=1)
    total = so_far[:, -1]
    middle = [(so_far > (count // 2)[:, None]).argmax(axis=1) for count in (total - 1, total)]
    value = np.array([time.value for time, *_ in runs])[middle].mean(axis=0)
    return np.where(total > 0, value, np.nan), np.array([time.censored for time, *_ in runs])[middle[1]]


def _how_often(draws: Ints, count: int) -> Ints:
    """How often each of `count` things was drawn: [R, draws] -> [R, count]."""
    counts = np.zeros((len(draws), count), np.int64)
    np.add.at(counts, (np.arange(len(draws))[:, None], draws), 1)
    return counts


def _end(least: float, most: float, *, lower: bool) -> Ratio:
    """An end of an interval that is known to lie between two numbers, 0 and infinity being no knowledge.

    Where both are known, the outer one is taken: the interval is then too wide rather than too narrow.
    """
    if least == most:
        return Ratio(value=least)
    outer, inner = (Ratio(value=least, bound="at least"), Ratio(value=most, bound="at most"))[:: 1 if lower else -1]
    return next((end for end in (outer, inner) if end.value and math.isfinite(end.value)), Ratio(value=None))
