"""Scores of predicted targets, each for many draws of the cases at once, and intervals from these draws.

    N cases | K classes | R draws

Every score is a function of weights [R, N]: how often each case stands in a draw. A draw takes subjects with
replacement, and with a subject all of its cases: volumes of one person are no independent cases, and an interval that
counts them as such is too narrow. A score that a draw does not define (a class is missing in it) is NaN there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.targets.table import Kind

Floats = NDArray[np.float64]
Score = Callable[[Floats], Floats]  # weights [R, N] -> [R]
_MOST_WEIGHTS = 20_000_000  # held at once


# Of these the difference to another predictor is given.
COMPARED: dict[Kind, tuple[str, ...]] = {
    "classify": ("auc", "balanced_accuracy"),
    "regress": ("mean_absolute_error", "r2"),
}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A score with its percentile interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    draws: int  # that define the score; the others lack a class


def auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats, fold: NDArray[np.int64] | None = None) -> Floats:
    """Chance that a positive case scores higher than a negative one, ties counted half: [N], [N], [R, N] -> [R].

    Only cases of the same fold [N] are compared. Folds have probes of their own, whose scores differ by more than the
    cases say: a predictor that sees nothing scores lower where a class is frequent among the cases it is tested on, so
    over all pairs it would seem worse than chance.
    """
    fold = np.zeros(len(scores), dtype=np.int64) if fold is None else fold
    order = np.lexsort((scores, fold))
    ordered, fold, is_positive, weights = scores[order], fold[order], positive[order], weights[:, order]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]) | (fold[1:] != fold[:-1])])
    starts = np.flatnonzero(begins)  # of groups of equal scores
    above = np.add.reduceat(weights * is_positive, starts, axis=1)  # [R, groups]
    below = np.add.reduceat(weights * ~is_positive, starts, axis=1)
    _, firsts, number = np.unique(fold[starts], return_index=True, return_inverse=True)  # first group of each fold
    lower = below.cumsum(axis=1) - below
    lower -= lower[:, firsts][:, number]
    pairs = np.add.reduceat(above, firsts, axis=1) * np.add.reduceat(below, firsts, axis=1)  # [R, folds]
    return _divided((above * (lower + 0.5 * below)).sum(axis=1), pairs.sum(axis=1))


def classes_auc(
    probabilities: Floats, truth: NDArray[np.int64], weights: Floats, fold: NDArray[np.int64] | None = None
) -> Floats:
    """Of two classes the AUC of the second, of more the mean over classes of each against the rest: [N, K] -> [R]."""
    if probabilities.shape[1] == 2:
        return auc(probabilities[:, 1], truth == 1, weights, fold)
    each = [auc(column, truth == number, weights, fold) for number, column in enumerate(probabilities.T)]
    return np.asarray(np.mean(each, axis=0))


def balanced_accuracy(probabilities: Floats, truth: NDArray[np.int64], weights: Floats) -> Floats:
    """Mean over classes of the share of its cases for which it is the likeliest: [N, K], [N], [R, N] -> [R]."""
    right = probabilities.argmax(axis=1) == truth
    recalls = []
    for number in range(probabilities.shape[1]):
        of_class = truth == number
        recalls.append(_divided(weights @ (right & of_class).astype(np.float64), weights @ of_class.astype(np.float64)))
    return np.asarray(np.mean(recalls, axis=0))


def brier(probabilities: Floats, truth: NDArray[np.int64], weights: Floats) -> Floats:
    """Mean squared error of the probabilities (Brier 1950): of two classes of the second, of more summed over them."""
    error = np.square(probabilities - np.eye(probabilities.shape[1])[truth])  # [N, K]
    return _mean(error[:, 1] if error.shape[1] == 2 else error.sum(axis=1), weights)


def calibration_error(probabilities: Floats, truth: NDArray[np.int64], weights: Floats, bins: int) -> Floats:
    """Expected calibration error of the likeliest class, in `bins` equally wide bins of its probability.

    The mean over cases of |share of right answers - mean probability| of the case's bin (Guo et al. 2017,
    arXiv:1706.04599, equation 3). It is above 0 by chance alone when bins hold few cases.
    """
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == truth) - confidence
    number = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    total = sum(np.abs(weights[:, number == one] @ gap[number == one]) for one in np.unique(number))
    return _divided(np.asarray(total, dtype=np.float64), weights.sum(axis=1))


def mean_absolute_error(predicted: Floats, truth: Floats, weights: Floats) -> Floats:
    """[N], [N], [R, N] -> [R], in the unit of the target."""
    return _mean(np.abs(predicted - truth), weights)


def r2(predicted: Floats, truth: Floats, weights: Floats) -> Floats:
    """Share of the variance of the truth that is explained; below 0 where its mean would be a better answer."""
    centred = truth - truth.mean()  # or a small variance would drown in the square of a large mean
    spread = _mean(np.square(centred), weights) - np.square(_mean(centred, weights))
    spread[spread <= 1e-12 * np.square(centred).max(initial=0.0)] = 0.0  # of a constant: what rounding has left
    return 1 - _divided(_mean(np.square(predicted - truth), weights), spread)


def drawn_scores(
    kind: Kind,
    predicted: Floats,
    truth: NDArray[Any],
    subjects: Sequence[str],
    *,
    bins: int,
    replicates: int,
    seed: int,
    fold: NDArray[np.int64] | None = None,
) -> dict[str, "Drawn"]:
    """All scores of a kind of target, all of the same draws of subjects.

    Args:
        kind: of the target.
        predicted: [N, K] probabilities, or [N] numbers.
        truth: [N] class numbers, or numbers.
        subjects: [N].
        bins: of the expected calibration error.
        replicates: draws of subjects.
        seed: of the draws.
        fold: [N], where there were several predictors; see `auc`.
    """
    functions: dict[str, Any] = {"mean_absolute_error": mean_absolute_error, "r2": r2}
    if kind == "classify":
        functions = {
            "auc": partial(classes_auc, fold=fold),
            "balanced_accuracy": balanced_accuracy,
            "brier": brier,
            "calibration_error": partial(calibration_error, bins=bins),
        }
    return {
        name: drawn(partial(function, predicted, truth), subjects, replicates, seed)
        for name, function in functions.items()
    }


def draw_weights(subjects: Sequence[str], replicates: int, seed: int) -> Iterator[Floats]:
    """Weights [r, N] of draws of subjects with replacement, block after block until there are `replicates`."""
    unique, number = np.unique(np.asarray(subjects), return_inverse=True)
    random = np.random.default_rng(seed)
    chances = np.full(len(unique), 1 / len(unique))
    block = max(1, _MOST_WEIGHTS // max(1, len(number)))
    for first in range(0, replicates, block):
        counts = random.multinomial(len(unique), chances, size=min(block, replicates - first))
        yield counts[:, number].astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A score of the cases as they are, and of each draw of them."""

    value: float
    draws: Floats  # [R]

    def interval(self, level: float) -> Interval:
        """The middle `level` of the draws."""
        return _interval(self.value, self.draws, level)

    def minus(self, other: "Drawn", level: float) -> Interval:
        """The difference to another score of the same cases, draw by draw."""
        return _interval(self.value - other.value, self.draws - other.draws, level)


def drawn(score: Score, subjects: Sequence[str], replicates: int, seed: int) -> Drawn:
    """Compute a score of the cases of these subjects [N], and of `replicates` draws of the subjects."""
    value = float(score(np.ones((1, len(subjects))))[0])
    return Drawn(value=value, draws=np.concatenate([score(each) for each in draw_weights(subjects, replicates, seed)]))


def _interval(value: float, draws: Floats, level: float) -> Interval:
    defined = draws[np.isfinite(draws)]
    if not math.isfinite(value) or not len(defined):
        return Interval(value=value if math.isfinite(value) else None, low=None, high=None, draws=len(defined))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high), draws=len(defined))


def _mean(values: Floats, weights: Floats) -> Floats:
    return _divided(weights @ values, weights.sum(axis=1))


def _divided(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    out: Floats = np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)
    return out
