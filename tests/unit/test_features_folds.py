"""A subject never trains a probe that is tested on it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.errors import DataError
from mimscale.features.folds import cross_folds, split_folds
from mimscale.targets.table import Target


def target(values, classes=("a", "b")):
    kind = "classify" if classes else "regress"
    rows = np.arange(len(values))
    return Target(name="t", kind=kind, rows=rows, values=np.array(values), classes=classes, missing=0, not_listed=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=30, max_size=60), st.integers(2, 4), st.integers(0, 3), st.booleans())
def test_no_fold_separates_a_subject_and_every_case_is_tested_once(who, folds, seed, is_number):
    who = [*range(10), *range(10), *who]  # each subject at least twice
    subjects = [f"s{number}" for number in who]
    one = target([float(w) for w in who], ()) if is_number else target([w % 2 for w in who])
    found = cross_folds(one, subjects, folds, seed)
    assert len(found) == folds
    for fold in found:
        assert not {subjects[i] for i in fold.train} & {subjects[i] for i in fold.test}
        assert sorted([*fold.train, *fold.test]) == list(range(len(who)))
    assert sorted(np.concatenate([fold.test for fold in found])) == list(range(len(who)))


def test_classes_are_spread_over_folds_by_their_subjects():
    subjects = ["heavy"] * 50 + [f"s{index:02d}" for index in range(30)]
    values = [1] * 50 + [1] * 9 + [0] * 20 + [2]
    one = target(values, ("a", "b", "c"))
    with pytest.raises(DataError, match=r"class 'c' has 1 subject\(s\), folds=5"):
        cross_folds(one, subjects, 5, 0)
    found = cross_folds(target(values[:-1]), subjects[:-1], 5, 0)
    spread = [[len({subjects[i] for i in fold.test if values[i] == kind}) for kind in (0, 1)] for fold in found]
    assert spread == [[4, 2]] * 5


def test_folds_are_the_same_for_the_same_seed():
    values, subjects = [0, 1] * 20, [f"s{index}" for index in range(40)]
    first, again = (cross_folds(target(values), subjects, 5, 1) for _ in range(2))
    assert all(np.array_equal(a.test, b.test) for a, b in zip(first, again, strict=True))
    other = cross_folds(target(values), subjects, 5, 2)
    assert any(not np.array_equal(a.test, b.test) for a, b in zip(first, other, strict=True))


def test_the_stores_split_is_one_fold():
    splits = ["train"] * 4 + ["val", "val", "test"]
    (fold,) = split_folds(target([0, 0, 1, 1, 0, 1, 1]), splits, list("abcdefg"), "train", "val")
    assert fold.train.tolist() == [0, 1, 2, 3]
    assert fold.test.tolist() == [4, 5]


def test_a_subject_in_both_splits_is_refused():
    with pytest.raises(DataError, match="subject b has volumes in train and in val"):
        split_folds(target([0, 0, 1, 1, 1]), ["train"] * 3 + ["val"] * 2, list("abcbd"), "train", "val")


def test_a_split_without_cases_is_refused_with_those_that_there_are():
    with pytest.raises(DataError, match=r"no case in test_split=test \(there are train: 2, val: 1\)"):
        split_folds(target([0, 1, 0]), ["train", "train", "val"], list("abc"), "train", "test")


def test_a_class_of_one_subject_is_refused():
    splits = ["train"] * 4 + ["val"] * 2
    with pytest.raises(DataError, match=r"class 'b' has 1 subject\(s\) in train and 1 in val, but needs 2 and 1"):
        split_folds(target([0, 0, 1, 1, 0, 1]), splits, ["a", "b", "c", "c", "d", "e"], "train", "val")
    with pytest.raises(DataError, match=r"class 'b' has 1 subject\(s\), folds=3 needs as many"):
        cross_folds(target([0, 0, 0, 1, 1]), ["a", "b", "c", "d", "d"], 3, 0)


def test_fewer_subjects_than_folds_are_refused():
    with pytest.raises(DataError, match=r"2 subject\(s\) for folds=3"):
        cross_folds(target([1.0, 2.0, 3.0], ()), ["a", "b", "b"], 3, 0)
    with pytest.raises(DataError, match="one subject in train"):
        split_folds(target([1.0, 2.0, 3.0], ()), ["train", "train", "val"], ["a", "a", "b"], "train", "val")
