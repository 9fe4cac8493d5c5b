"""What a report says in words of a difference: no more than its seeds can carry."""

import pytest

from mimscale.study.results import Comparison, Group
from mimscale.study.statistics import Interval, Ratio
from mimscale.study.view import _answer


def _difference(pretrain_seeds: int, finetune_seeds: int, low: float = 0.01) -> Comparison:
    ours, theirs = (Group(experiment="main", arm=arm, setting="", planned=1, results=()) for arm in ("mae", "scratch"))
    interval = Interval(
        difference=0.03, low=low, high=0.05, pretrain_seeds=pretrain_seeds, finetune_seeds=finetune_seeds, cases=10
    )
    none = Ratio(value=None)
    return Comparison(ours=ours, theirs=theirs, dice=interval, target=None, steps=none, seconds=none)


@pytest.mark.parametrize(("pretrain_seeds", "finetune_seeds"), [(1, 1), (1, 3), (3, 1)])
def test_a_difference_of_a_single_seed_is_not_called_one_of_the_method(pretrain_seeds, finetune_seeds):
    said = f"higher for {pretrain_seeds} x {finetune_seeds} seeds, too few to speak of others"
    assert said in _answer(_difference(pretrain_seeds, finetune_seeds))


def test_a_difference_over_seeds_is_said_plainly():
    assert _answer(_difference(3, 3)).endswith("higher.")
    assert "too few" not in _answer(_difference(1, 1, low=-0.01))
