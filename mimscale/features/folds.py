"""Who trains a probe and who tests it. A subject is never on both sides.

n cases with a target
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import DataError
from mimscale.targets.table import Target

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Cases that train and cases that are then predicted: indices into the cases of a target."""

    train: Indices
    test: Indices


def split_folds(target: Target, splits: Sequence[str], subjects: Sequence[str], train: str, test: str) -> list[Fold]:
    """One fold: cases of split `train` against those of split `test`.

    Raises:
        DataError: a split has no cases, a class has too few subjects, or a subject is in both.
    """
    names, who = np.asarray(splits), np.asarray(subjects)
    fold = Fold(np.flatnonzero(names == train), np.flatnonzero(names == test))
    for name, cases in (("train_split", fold.train), ("test_split", fold.test)):
        if not len(cases):
            there = ", ".join(f"{one}: {int((names == one).sum())}" for one in np.unique(names))
            raise DataError(
                f"target {target.name}: no case in {name}={train if name == 'train_split' else test} (there are "
                f"{there}); choose others, or cross-validate with folds=5"
            )
    if both := sorted(set(who[fold.train]) & set(who[fold.test])):
        raise DataError(
            f"target {target.name}: subject {both[0]} has volumes in {train} and in {test}; all volumes of a subject "
            "must be in one split"
        )
    for number, name in enumerate(target.classes):
        counts = [len(set(who[cases][target.values[cases] == number])) for cases in (fold.train, fold.test)]
        if counts[0] < 2 or counts[1] < 1:
            raise DataError(
                f"target {target.name}: class {name!r} has {counts[0]} subject(s) in {train} and {counts[1]} in "
                f"{test}, but needs 2 and 1; cross-validate (folds=), merge classes, or leave its cells empty"
            )
    if not target.classes and len(set(who[fold.train])) < 2:
        raise DataError(f"target {target.name}: one subject in {train}; a probe needs at least 2 to train on")
    return [fold]


def cross_folds(target: Target, subjects: Sequence[str], folds: int, seed: int) -> list[Fold]:
    """Groups of subjects, each predicted by a probe of the others; classes are spread over them.

    Raises:
        DataError: fewer subjects than folds, in all or of a class.
    """
    who = np.asarray(subjects)
    counts = {name: len(set(who[target.values == number])) for number, name in enumerate(target.classes)}
    for name, count in counts.items():
        if count < folds:
            raise DataError(
                f"target {target.name}: class {name!r} has {count} subject(s), folds={folds} needs as many; give fewer "
                "folds, merge classes, or leave its cells empty"
            )
    if len(set(who)) < folds:
        raise DataError(f"target {target.name}: {len(set(who))} subject(s) for folds={folds}; give fewer folds")
    found = grouped(target.values, who, folds, seed, by_class=bool(target.classes))
    for number, name in enumerate(target.classes):
        if any(len(set(who[fold.train][target.values[fold.train] == number])) < 2 for fold in found):
            raise DataError(
                f"target {target.name}: class {name!r} has so few subjects, or so many volumes of one, that a fold has "
                f"fewer than 2 to train on; give other folds than {folds}, or merge classes"
            )
    return found


def grouped(
    values: NDArray[np.int64] | NDArray[np.float64],
    subjects: NDArray[np.str_],
    folds: int,
    seed: int,
    *,
    by_class: bool,
) -> list[Fold]:
    """Deal subjects out to `folds` groups, those of a class one after the other: [n], [n] -> folds.

    A subject counts for the class that most of its cases have. Subjects are spread, and not cases: one who has very
    many would otherwise fill a group alone.
    """
    unique, number = np.unique(subjects, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    if by_class:
        counts = np.zeros((len(unique), int(values.max()) + 1), dtype=np.int64)
        np.add.at(counts, (number, values.astype(np.int64)), 1)
        order = order[np.argsort(counts.argmax(axis=1)[order], kind="stable")]
    group = np.empty(len(unique), dtype=np.int64)
    group[order] = np.arange(len(unique)) % folds
    return [Fold(np.flatnonzero(group[number] != one), np.flatnonzero(group[number] == one)) for one in range(folds)]
