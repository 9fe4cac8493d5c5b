"""Bootstrap intervals against a loop that says in words what is drawn; coverage against the truth."""

import math

import numpy as np
import pytest

from mimscale.study.statistics import (
    Ratio,
    RatioInterval,
    Time,
    median_time,
    paired_bootstrap,
    ratio_bootstrap,
    spread,
    time_ratio,
    time_to_target,
)


def plain_seeds(seed, replicates, num_ours, num_theirs, num_finetune):
    """The seeds of every replicate, of our pretraining, of theirs and of fine-tuning, in the generator's order."""
    random = np.random.default_rng([seed, 0])
    drawn = [random.integers(count, size=(replicates, count)) for count in (num_ours, num_theirs, num_finetune)]
    return list(zip(*drawn, strict=True))


def plain_bootstrap(ours, theirs, *, replicates, seed, level, together):
    """Number by number. The draws are taken from the generators in the same order, so results agree to rounding."""
    num_theirs, num_cases = theirs.shape[0], ours.shape[2]
    seeds = plain_seeds(seed, replicates, len(ours), 1 if together else num_theirs, ours.shape[1])
    cases_of = np.random.default_rng([seed, 1]).integers(num_cases, size=(replicates, num_cases))
    differences = []
    for (our_seeds, their_seeds, finetune_seeds), cases in zip(seeds, cases_of, strict=True):
        total, count = 0.0, 0
        for our_seed in our_seeds:
            for their_seed in [our_seed] if together else their_seeds:
                # The same fine-tuning seeds for every pretraining seed, as in the study.
                for finetune_seed in finetune_seeds:
                    for case in cases:
                        value = ours[our_seed, finetune_seed, case] - theirs[their_seed, finetune_seed, case]
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


@pytest.mark.parametrize(("num_theirs", "together"), [(1, False), (3, True), (3, False), (2, False)])
@pytest.mark.parametrize("missing", [False, True])
def test_intervals_are_those_of_a_plain_loop(num_theirs, together, missing):
    random = np.random.default_rng(5)
    ours, theirs = random.normal(0.6, 0.1, (3, 2, 7)), random.normal(0.5, 0.1, (num_theirs, 2, 7))
    if missing:
        ours[1, 0] = np.nan  # a run that failed
        theirs[0, 1, 3] = np.nan  # a case without a score
    how = {"replicates": 150, "seed": 11, "level": 0.9}
    interval = paired_bootstrap(ours, theirs, same_pretraining=together, **how)
    low, high = plain_bootstrap(ours, theirs, together=together, **how)
    # The same sums in another order: rounding alone.
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)
    assert interval.low < interval.difference < interval.high


def test_an_interval_does_not_depend_on_which_arm_comes_first():
    random = np.random.default_rng(6)
    scratch, pretrained = random.normal(0.5, 0.1, (1, 3, 4)), random.normal(0.6, 0.1, (4, 3, 4))
    how = {"replicates": 2000, "seed": 0, "level": 0.9}
    one, other = paired_bootstrap(pretrained, scratch, **how), paired_bootstrap(scratch, pretrained, **how)
    assert other.difference == pytest.approx(-one.difference)
    # Up to which draws came out: a quantile of 2000 is known to about 4 % of the width.
    assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.1)


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


def test_intervals_against_a_noisy_scratch_hold_the_truth_about_as_often_as_they_say():
    # Scratch has a run for each of 6 fine-tuning seeds and no pretraining seeds. Nothing that its seeds do is less for
    # being compared with 4 pretrainings; drawing seeds anew for each of these held the truth in only 69 of 120.
    random = np.random.default_rng(8)
    held = 0
    for trial in range(120):
        pretraining, cases = random.normal(0, 0.01, (4, 1, 1)), random.normal(0, 0.02, (1, 1, 12))
        ours = 0.6 + pretraining + cases + random.normal(0, 0.01, (4, 6, 12))
        theirs = 0.5 + random.normal(0, 0.05, (1, 6, 1)) + cases + random.normal(0, 0.01, (1, 6, 12))
        interval = paired_bootstrap(ours, theirs, replicates=200, seed=trial, level=0.9)
        held += interval.low <= 0.1 <= interval.high
    # As above; a percentile interval of 6 draws holds 0.83 of normal means where it says 0.9.
    assert 0.73 <= held / 120 <= 0.98


def test_what_a_fine_tuning_seed_does_to_every_pretraining_is_not_averaged_over_pretrainings():
    # Both arms are pretrained; a fine-tuning seed shifts their difference by the same under every pretraining seed.
    shift = np.random.default_rng(9).normal(0, 0.05, (1, 5, 1))
    how = {"replicates": 2000, "seed": 0, "level": 0.9}
    widths = []
    for num_pretrain in (1, 2, 8):
        ours = np.broadcast_to(0.6 + shift, (num_pretrain, 5, 3))
        interval = paired_bootstrap(ours, np.full((num_pretrain, 5, 3), 0.5), **how)
        widths.append(interval.high - interval.low)
    # The mean of five seeds has few values, so quantiles of other draws differ a little.
    assert widths == pytest.approx([widths[0]] * 3, rel=0.1)


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


@pytest.mark.parametrize(("seeds", "low", "high"), [((1, 2), 0.2, 0.45), ((3, 3), 0.05, 0.2), ((10, 10), 0.0, 0.1)])
def test_without_an_effect_as_many_differences_are_called_one_as_the_report_says(seeds, low, high):
    """Several times the 5 % of a 95 % interval where seeds are few: runs that differ by 0.05, cases by 0.04."""
    random, called, trials = np.random.default_rng(8), 0, 200
    for trial in range(trials):
        ours = random.normal(0, 0.05, (*seeds, 1)) + random.normal(0, 0.04, (1, 1, 10))
        scratch = np.broadcast_to(random.normal(0, 0.05, (1, seeds[1], 1)), (1, seeds[1], 10))
        interval = paired_bootstrap(ours, scratch, replicates=200, seed=trial, level=0.95, same_pretraining=False)
        called += interval.shows != "nothing"
    assert low <= called / trials <= high


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
        ([(10, False), (40, True)], (25, True)),  # half of them never: the median is at least this
        ([(10, False), (20, False), (30, False), (40, True)], (25, False)),
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


def plain_ends(ours, theirs, *, replicates, seed, level, together):
    """Both ends of the interval of a ratio, each as the least and the most that it can be."""
    seeds = plain_seeds(seed, replicates, len(ours), 1 if together else len(theirs), len(ours[0]))
    least, most = [], []
    for our_seeds, their_seeds, finetune_seeds in seeds:
        mine = [time for i in our_seeds for j in finetune_seeds for time in ours[i][j]]
        yours = [
            time for i in (our_seeds if together else their_seeds) for j in finetune_seeds for time in theirs[i][j]
        ]
        if not mine or not yours:
            continue
        arm, reference = median_time(mine), median_time(yours)
        least.append(0.0 if arm.censored else reference.value / arm.value)
        most.append(math.inf if reference.censored else reference.value / arm.value)
    least.sort()
    most.sort()
    first = math.floor((1 - level) / 2 * (len(least) - 1))
    last = math.ceil((1 - (1 - level) / 2) * (len(least) - 1))
    return (least[first], most[first]), (least[last], most[last])


def times(random, shape, never=0.0, runs=1):
    """Times of made-up runs, [P][F]; of some the target was never reached."""
    return [
        [
            [
                Time(value=float(random.integers(5, 40) * 10), censored=bool(random.random() < never))
                for _ in range(runs)
            ]
            for _ in range(shape[1])
        ]
        for _ in range(shape[0])
    ]


@pytest.mark.parametrize(("num_theirs", "together"), [(1, False), (3, True), (2, False)])
@pytest.mark.parametrize(("ours_never", "theirs_never"), [(0, 0), (0, 0.3), (0.3, 0), (0.2, 0.2), (0, 0.9), (0.9, 0)])
@pytest.mark.parametrize("runs", [1, 2])
def test_intervals_of_ratios_are_those_of_a_plain_loop(num_theirs, together, ours_never, theirs_never, runs):
    random = np.random.default_rng(3)
    ours, theirs = times(random, (3, 4), ours_never, runs), times(random, (num_theirs, 4), theirs_never, runs)
    ours[0][1] = []  # a run that failed
    theirs[0][2] = theirs[0][2][:-1]  # one of two folds, or the only run
    how = {"replicates": 200, "seed": 7, "level": 0.9}
    found = ratio_bootstrap(ours, theirs, same_pretraining=together, **how)
    assert found.ratio.value is not None
    (low_least, low_most), (high_least, high_most) = plain_ends(ours, theirs, together=together, **how)
    for end, least, most, outer_is_least in (
        (found.low, low_least, low_most, True),
        (found.high, high_least, high_most, False),
    ):
        at_least, at_most = Ratio(value=least, bound="at least"), Ratio(value=most, bound="at most")
        if least == most:
            expected = Ratio(value=least)
        elif least == 0 and most == math.inf:
            expected = Ratio(value=None)
        elif least == 0:
            expected = at_most
        elif most == math.inf:
            expected = at_least
        else:
            expected = at_least if outer_is_least else at_most
        assert end == expected


def column(*values):
    """Times [1, F] of one pretraining seed, or of scratch; > marks one that was never reached."""
    return [[[Time(value=float(str(value).lstrip(">")), censored=str(value).startswith(">"))] for value in values]]


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high", "shows"),
    [
        ((100, 100, 100), (200, 200, 200), (2.0, ""), (2.0, ""), "sooner"),
        ((100, 100, 100), (">200", ">200", ">200"), (2.0, "at least"), (2.0, "at least"), "sooner"),
        ((">200", ">200", ">200"), (100, 100, 100), (0.5, "at most"), (0.5, "at most"), "later"),
        # In a draw with the last seed twice the other arm never reaches the target: nobody knows how much sooner we do.
        ((100, 100, 100), (120, 140, ">200"), (1.2, ""), (2.0, "at least"), "sooner"),
        ((100, 100, ">200"), (120, 120, 120), (0.6, "at most"), (1.2, ""), "nothing"),
        # In such a draw neither does, and the quotient may be anything.
        ((100, 100, ">200"), (90, 90, ">200"), (0.9, "at most"), (0.9, "at least"), "nothing"),
        ((100, 100, ">200"), (">200", ">200", ">200"), (None, ""), (2.0, "at least"), "nothing"),
    ],
)
def test_an_end_of_an_interval_of_a_ratio_may_be_only_a_bound(ours, theirs, low, high, shows):
    found = ratio_bootstrap(column(*ours), column(*theirs), replicates=400, seed=0, level=0.9)
    assert (found.low.value, found.low.bound) == low
    assert (found.high.value, found.high.bound) == high
    assert found.shows == shows


def test_an_arm_of_one_seed_has_no_interval_of_its_ratio():
    how = {"replicates": 50, "seed": 0, "level": 0.9}
    one, several = column(100), [column(value)[0] for value in (50, 60, 70)]
    for ours, theirs, ratio in ((one, one, 1.0), (several, one, 100 / 60), (one, several, 60 / 100)):
        found = ratio_bootstrap(ours, theirs, **how)
        assert found == RatioInterval(ratio=Ratio(value=ratio))
        assert found.shows == "nothing"
    folds = [[[Time(value=value, censored=False) for value in (50, 60, 70)]]]  # three folds, but one seed
    assert ratio_bootstrap(folds, folds, **how) == RatioInterval(ratio=Ratio(value=1.0))
    never = column(">100", ">100")
    assert ratio_bootstrap(never, never, **how) == RatioInterval(ratio=Ratio(value=None))


def test_intervals_of_ratios_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(12)
    held = 0
    for trial in range(120):
        seeds = random.normal(0, 0.1, 7)  # what a fine-tuning seed does to both arms
        scratch = 140 * np.exp(seeds + random.normal(0, 0.25, (1, 7)))
        ours = 100 * np.exp(seeds + random.normal(0, 0.05, (4, 7)))
        tables = [[[[Time(value=value, censored=False)] for value in row] for row in arm] for arm in (ours, scratch)]
        found = ratio_bootstrap(*tables, replicates=200, seed=trial, level=0.9)
        held += found.low.value <= 1.4 <= found.high.value
    # As above; medians have few values, which makes their intervals wider rather than narrower.
    assert 0.8 <= held / 120 <= 1.0


def test_the_spread_is_over_what_was_measured():
    assert spread([0.5, None, 0.7]).mean == pytest.approx(0.6)
    assert spread([0.5, None, 0.7]).std == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert spread([0.5]).std is None
    assert spread([]).mean is None
