"""Small models on frozen features. What they can be told is chosen on training subjects alone.

n training cases | m cases to predict | D numbers of a feature | K classes
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mimscale.features.config import ProbeConfig
from mimscale.features.folds import grouped

Floats = NDArray[np.float64]
Name = Literal["logistic", "knn", "majority", "ridge", "mean"]
OF_KIND: dict[str, tuple[Name, ...]] = {"classify": ("logistic", "knn"), "regress": ("ridge",)}
BASELINE: dict[str, Name] = {"classify": "majority", "regress": "mean"}
_MOST_STEPS = 2000  # of the solver of a logistic regression
_LEAST_PROBABILITY = 1e-7  # below it a wrong answer costs no more


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a probe says of the cases of one fold."""

    predicted: Floats  # [m, K] probabilities, or [m] numbers
    chosen: float | None  # k, C or alpha
    converged: bool = True


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The cases that a probe may learn from."""

    vectors: Floats  # [n, D]
    values: NDArray[Any]  # [n] class numbers or numbers
    subjects: NDArray[np.str_]  # [n]
    num_classes: int  # 0 for numbers


def answer(name: Name, train: Cases, vectors: Floats, config: ProbeConfig) -> Answer:
    """Train a probe and predict: features [m, D] -> probabilities [m, K] or numbers [m].

    Features are brought to mean 0 and deviation 1 by the training cases. Neighbours are near by the cosine of the
    angle between them, and all count the same. k, and the strength of the penalty, are those with the least loss on
    held-out groups of training subjects: log loss, for neighbours Brier score, for numbers squared error; of equals the
    most cautious.
    """
    if name == "majority":
        share = np.bincount(train.values, minlength=train.num_classes) / len(train.values)
        return Answer(predicted=np.tile(share, (len(vectors), 1)), chosen=None)
    if name == "mean":
        return Answer(predicted=np.full(len(vectors), train.values.mean()), chosen=None)
    make, candidates = _MAKERS[name], _candidates(name, config)
    chosen = _choose(name, make, candidates, train, config)
    predicted, converged = _fit_and_predict(make, chosen, train, vectors)
    return Answer(predicted=predicted, chosen=chosen, converged=converged)


def _logistic(value: float, num_cases: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=value, max_iter=_MOST_STEPS)


def _knn(value: float, num_cases: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors=min(int(value), num_cases), metric="cosine", algorithm="brute")


def _ridge(value: float, num_cases: int) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=value)


_MAKERS: dict[str, Callable[[float, int], Any]] = {"logistic": _logistic, "knn": _knn, "ridge": _ridge}


def _candidates(name: Name, config: ProbeConfig) -> list[float]:
    """The most cautious first."""
    if name == "logistic":
        return sorted(config.logistic_c)
    return sorted(map(float, config.neighbours) if name == "knn" else config.ridge_alpha, reverse=True)


def _choose(
    name: Name, make: Callable[[float, int], Any], candidates: Sequence[float], train: Cases, config: ProbeConfig
) -> float:
    if len(candidates) == 1:
        return candidates[0]
    of_class = [len(set(train.subjects[train.values == number])) for number in range(train.num_classes)]
    groups = min([config.inner_folds, len(set(train.subjects)), *of_class])
    folds = grouped(train.values, train.subjects, groups, config.seed, by_class=train.num_classes > 0)
    losses = []
    for value in candidates:
        total = 0.0
        for fold in folds:
            part = Cases(
                vectors=train.vectors[fold.train],
                values=train.values[fold.train],
                subjects=train.subjects[fold.train],
                num_classes=train.num_classes,
            )
            predicted, _ = _fit_and_predict(make, value, part, train.vectors[fold.test])
            total += float(_LOSSES[name](predicted, train.values[fold.test]).sum())
        losses.append(total)
    return candidates[int(np.argmin(losses))]


def _fit_and_predict(
    make: Callable[[float, int], Any], value: float, train: Cases, vectors: Floats
) -> tuple[Floats, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.vectors)
    if train.num_classes and len(present := np.unique(train.values)) == 1:
        # Groups of subjects may leave a single class to learn.
        predicted = np.zeros((len(vectors), train.num_classes))
        predicted[:, present] = 1.0
        return predicted, True
    model = make(value, len(train.values))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(scaler.transform(train.vectors), train.values)
    converged = not any(issubclass(one.category, ConvergenceWarning) for one in said)
    if not train.num_classes:
        return np.asarray(model.predict(scaler.transform(vectors)), dtype=np.float64), converged
    predicted = np.zeros((len(vectors), train.num_classes))
    predicted[:, model.classes_] = model.predict_proba(scaler.transform(vectors))
    return predicted, converged


def _log_loss(predicted: Floats, truth: NDArray[np.int64]) -> Floats:
    return -np.log(np.maximum(predicted[np.arange(len(truth)), truth], _LEAST_PROBABILITY))


def _brier_loss(predicted: Floats, truth: NDArray[np.int64]) -> Floats:
    return np.asarray(np.square(predicted - np.eye(predicted.shape[1])[truth]).sum(axis=1))


def _squared_loss(predicted: Floats, truth: Floats) -> Floats:
    return np.square(predicted - truth)


_LOSSES: dict[str, Callable[[Floats, NDArray[Any]], Floats]] = {
    "logistic": _log_loss,
    "knn": _brier_loss,
    "ridge": _squared_loss,
}
