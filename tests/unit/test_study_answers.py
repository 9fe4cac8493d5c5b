"""What a report says in words of a difference: no more than its seeds can carry."""

from collections.abc import Sequence

import pytest

from mimscale.study.answers import answer
from mimscale.study.comparisons import Comparison
from mimscale.study.results import Group
from mimscale.study.statistics import Interval, Ratio, RatioInterval, Time

NONE = RatioInterval(ratio=Ratio(value=None))


def _difference(
    pretrain_seeds: int,
    finetune_seeds: int,
    low: float = 0.01,
    times: tuple[Sequence[Time], Sequence[Time]] = ((), ()),
    steps: RatioInterval = NONE,
    seconds: RatioInterval = NONE,
) -> Comparison:
    ours, theirs = (Group(experiment="main", arm=arm, setting="", planned=1, results=()) for arm in ("mae", "scratch"))
    interval = Interval(
        difference=0.03, low=low, high=0.05, pretrain_seeds=pretrain_seeds, finetune_seeds=finetune_seeds, cases=10
    )
    return Comparison(
        ours=ours,
        theirs=theirs,
        dice=interval,
        steps=steps,
        seconds=seconds,
        ours_times=times[0],
        theirs_times=times[1],
    )


def _ratio(value: float, low: Ratio | None = None, high: Ratio | None = None, seeds: int = 3) -> RatioInterval:
    return RatioInterval(ratio=Ratio(value=value), low=low, high=high, pretrain_seeds=seeds, finetune_seeds=3)


@pytest.mark.parametrize(("pretrain_seeds", "finetune_seeds"), [(1, 1), (1, 3), (3, 1), (2, 3), (3, 2)])
def test_a_difference_of_one_or_two_seeds_is_not_called_one_of_the_method(pretrain_seeds, finetune_seeds):
    said = f"higher for {pretrain_seeds} x {finetune_seeds} seeds, too few to speak of others"
    assert said in answer(_difference(pretrain_seeds, finetune_seeds))


def test_a_difference_over_seeds_is_said_plainly():
    assert answer(_difference(3, 3)).endswith("higher.")
    assert "too few" not in answer(_difference(1, 1, low=-0.01))


def test_arms_without_pretraining_have_only_seeds_of_fine_tuning():
    assert answer(_difference(0, 3)).endswith("higher.")
    assert "higher for 1 fine-tuning seed, too few to speak of others" in answer(_difference(0, 1))
    assert "higher for 2 fine-tuning seeds, too few to speak of others" in answer(_difference(0, 2))


def test_how_much_sooner_the_target_is_reached_has_its_interval_beside_it():
    steps = _ratio(1.4, Ratio(value=1.1), Ratio(value=1.6, bound="at least"))
    seconds = _ratio(0.5, Ratio(value=None), Ratio(value=0.9))
    said = answer(_difference(3, 3, steps=steps, seconds=seconds))
    assert said.endswith(
        "; the target is reached 1.40 [1.10, at least 1.60] times as fast in steps, sooner, and 0.50 [unknown, 0.90] "
        "with the time of pretraining, later."
    )


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (
            _ratio(1.4, Ratio(value=0.9), Ratio(value=1.6)),
            "1.40 [0.90, 1.60] times as fast in steps, not shown to differ",
        ),
        # A low end that is at most 1.2 may be below 1.
        (_ratio(1.4, Ratio(value=1.2, bound="at most"), Ratio(value=1.6)), "in steps, not shown to differ"),
        (_ratio(0.7, Ratio(value=0.6), Ratio(value=0.9, bound="at least")), "in steps, not shown to differ"),
        (_ratio(1.4), "1.40 times as fast in steps, of unknown certainty"),
        (
            _ratio(1.4, Ratio(value=1.2), Ratio(value=1.6), seeds=1),
            "in steps, sooner for 1 x 3 seeds, too few to speak of others",
        ),
    ],
)
def test_sooner_is_said_only_where_the_interval_shows_it(ratio, words):
    said = answer(_difference(3, 3, steps=ratio))
    assert said.endswith(f"{words}.")


def test_a_target_that_neither_reaches_is_said_to_be_so_and_one_that_some_runs_reach_is_not():
    never, once = Time(value=40, censored=True), Time(value=20, censored=False)
    assert answer(_difference(3, 3, times=([never] * 2, [never]))).endswith("; neither reaches the target.")
    said = answer(_difference(3, 3, times=([once, never], [never, never, once])))
    assert said.endswith("; 1 of 2 and 1 of 3 runs reach the target, too few to say how soon.")
    assert "target" not in answer(_difference(3, 3))  # there is none, or not the same for both
