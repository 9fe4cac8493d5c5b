"""Bootstrap intervals against a loop that says in words what is drawn; coverage against the truth."""

import numpy as np
import pytest

from mimscale.study.statistics import (
    Time,
    median_time,
    paired_bootstrap,
    spread,
    time_ratio,
    time_to_target,
)


def plain_bootstrap(ours, theirs, *, replicates, seed, level):
    """Number by number. The draws are taken from the generator in the same order, so results agree to rounding."""
    random = np.random.default_rng(seed)
    num_pretrain, num_finetune, num_cases = ours.shape
    differences = []
    for _ in range(replicates):
        pretrain_seeds = random.integers(num_pretrain, size=(num_pretrain,))
        finetune_seeds = random.integers(num_finetune, size=(num_pretrain, num_finetune))
        cases = random.integers(num_cases, size=(num_cases,))
        total, count = 0.0, 0
        for place, pretrain_seed in enumerate(pretrain_seeds):
            for finetune_seed in finetune_seeds[place]:
                for case in cases:
                    other = 0 if theirs.shape[0] == 1 else pretrain_seed
                    value = ours[pretrain_seed, finetune_seed, case] - theirs[other, finetune_seed, case]
                    if not np.isnan(value):
                        total, count = total + value, count + 1
        if count:
            differences.append(total / count)
    differences.sort()

    def quantile(share):
        place = share * (len(differences) - 1)
        low = int(place)
        high = min(low + 1, len(differences) - 1)
        return differences[low] + (place - low) * (differences[high] - differences[low])

    return quantile((1 - level) / 2), quantile(1 - (1 - level) / 2)


@pytest.mark.parametrize("theirs_pretrained", [1, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_intervals_are_those_of_a_plain_loop(theirs_pretrained, missing):
    random = np.random.default_rng(5)
    ours, theirs = random.normal(0.6, 0.1, (3, 2, 7)), random.normal(0.5, 0.1, (theirs_pretrained, 2, 7))
    if missing:
        ours[1, 0] = np.nan  # a run that failed
        theirs[0, 1, 3] = np.nan  # a case without a score
    interval = paired_bootstrap(ours, theirs, replicates=150, seed=11, level=0.9)
    low, high = plain_bootstrap(ours, theirs, replicates=150, seed=11, level=0.9)
    # The same sums in another order: rounding alone.
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)
    assert interval.low < interval.difference < interval.high


def test_the_same_seed_draws_the_same_interval_and_another_seed_another():
    scores = np.random.default_rng(0).normal(size=(2, 2, 2, 5))
    first, again, other = (paired_bootstrap(*scores, replicates=50, seed=seed, level=0.95) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_pairing_removes_what_cases_have_in_common():
    random = np.random.default_rng(2)
    difficulty = random.normal(0, 0.2, 20)  # of cases: far larger than the difference
    noise = random.normal(0, 0.005, (2, 3, 3, 20))
    paired = paired_bootstrap(
        0.53 + difficulty + noise[0], 0.5 + difficulty + noise[1], replicates=400, seed=0, level=0.95
    )
    assert paired.shows == "higher"
    assert paired.high - paired.low < 0.02
    alone = paired_bootstrap(
        0.53 + difficulty + noise[0], 0.5 + difficulty[::-1] + noise[1], replicates=400, seed=0, level=0.95
    )
    assert alone.shows == "nothing"


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # Differences between seeds of 0.05 and between cases of 0.05. Seven seeds of each stage: with very few the
    # percentile interval is too narrow, which is why reports give the number of seeds beside it.
    random = np.random.default_rng(4)
    held = 0
    for trial in range(120):
        seeds, cases = random.normal(0, 0.05, (7, 1, 1)), random.normal(0, 0.05, (1, 1, 16))
        ours = 0.1 + seeds + cases + random.normal(0, 0.02, (7, 2, 16))
        interval = paired_bootstrap(ours, np.zeros((1, 2, 16)), replicates=200, seed=trial, level=0.9)
        held += interval.low <= 0.1 <= interval.high
    # 0.9 +- three standard deviations of 120 draws is 0.82 to 0.98; percentile intervals of few draws err to the low.
    assert 0.75 <= held / 120 <= 0.98


@pytest.mark.parametrize(("num_theirs", "same_pretraining"), [(1, True), (3, True), (3, False), (2, False)])
def test_a_case_or_run_that_one_arm_alone_has_shifts_no_difference(num_theirs, same_pretraining):
    random = np.random.default_rng(4)
    difficulty = np.array([0.3, 0.5, 0.7, 0.9])
    ours = 0.1 + difficulty + random.normal(0, 1e-4, (3, 2, 4))
    theirs = difficulty + random.normal(0, 1e-4, (num_theirs, 2, 4))
    ours[:, :, 3] = np.nan  # the easy case has no score of ours
    ours[1, 1] = np.nan  # and one run is not there yet
    interval = paired_bootstrap(ours, theirs, replicates=100, seed=0, level=0.95, same_pretraining=same_pretraining)
    assert interval.difference == pytest.approx(0.1, abs=1e-3)
    assert interval.low <= interval.difference <= interval.high


def test_one_run_on_one_case_has_a_difference_and_no_interval():
    interval = paired_bootstrap(np.full((1, 1, 1), 0.7), np.full((1, 1, 1), 0.5), replicates=10, seed=0, level=0.9)
    assert interval.difference == pytest.approx(0.2)
    assert (interval.low, interval.high, interval.shows) == (None, None, "nothing")
    nothing = paired_bootstrap(np.full((1, 1, 2), np.nan), np.zeros((1, 1, 2)), replicates=10, seed=0, level=0.9)
    assert nothing.difference is None


def test_the_target_is_reached_at_the_first_validation_that_is_not_below_it():
    curve = [(10, 0.2), (20, 0.5), (30, 0.4), (40, 0.6)]
    assert time_to_target(curve, 0.5, 40) == Time(value=20, censored=False)
    assert time_to_target(curve, 0.61, 40) == Time(value=40, censored=True)
    assert time_to_target([], 0.1, 40) == Time(value=40, censored=True)


@pytest.mark.parametrize(
    ("times", "median"),
    [
        ([(30, False), (10, False), (20, False)], (20, False)),
        ([(30, False), (40, True), (20, False)], (30, False)),
        ([(40, True), (40, True), (20, False)], (40, True)),
        ([(10, False), (40, True)], (40, True)),  # half of them never: nobody knows the median
    ],
)
def test_a_time_that_was_never_reached_is_later_than_all_others(times, median):
    found = median_time([Time(value=value, censored=censored) for value, censored in times])
    assert found == Time(value=median[0], censored=median[1])


@pytest.mark.parametrize(
    ("reference", "arm", "value", "bound"),
    [
        ((140, False), (100, False), 1.4, ""),
        ((200, True), (100, False), 2.0, "at least"),
        ((100, False), (200, True), 0.5, "at most"),
        ((200, True), (200, True), None, ""),
    ],
)
def test_a_ratio_of_times_says_when_it_is_only_a_bound(reference, arm, value, bound):
    ratio = time_ratio(*(Time(value=v, censored=c) for v, c in (reference, arm)))
    assert (ratio.value, ratio.bound) == (value, bound)
    assert time_ratio(None, Time(value=1, censored=False)).value is None


def test_the_spread_is_over_what_was_measured():
    assert spread([0.5, None, 0.7]).mean == pytest.approx(0.6)
    assert spread([0.5, None, 0.7]).std == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert spread([0.5]).std is None
    assert spread([]).mean is None
