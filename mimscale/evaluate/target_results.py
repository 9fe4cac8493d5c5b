"""Predicted targets of volumes and of subjects, scored beside a predictor that sees no image. No torch here.

N volumes | S subjects | C classes of a target
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.evaluate.config import EvaluateTargetsConfig
from mimscale.targets import scores
from mimscale.targets.results import cells, headings
from mimscale.targets.scores import COMPARED, Drawn, drawn_scores
from mimscale.targets.table import Target
from mimscale.train.target_values import Constants

Floats = NDArray[np.float64]
NO_IMAGE = "no image"  # the shares of the classes in training, or the mean of its numbers


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What networks say of one target, and what is true."""

    target: Target  # rows are places among the N volumes
    constants: Constants
    ids: NDArray[np.str_]  # [N]
    subjects: NDArray[np.str_]  # [N]
    windows: Sequence[int]  # [N]
    predicted: Mapping[str, Floats]  # network -> [N, C] probabilities, or [N, 1] numbers; the first is the main one

    @property
    def main(self) -> Floats:
        """Of the main network."""
        return next(iter(self.predicted.values()))


@dataclass(frozen=True)
class Cases:
    """Cases of one kind: all volumes with a value, or all subjects whose volumes have one and the same."""

    subjects: list[str]  # [n]
    truth: NDArray[Any]  # [n]
    predicted: dict[str, Floats]  # [n, C] or [n, 1]


def volume_cases(scored: Scored) -> Cases:
    """Each volume that has a value."""
    rows = scored.target.rows
    return Cases(
        scored.subjects[rows].tolist(),
        scored.target.values,
        {name: answers[rows] for name, answers in scored.predicted.items()},
    )


def subject_cases(scored: Scored) -> Cases:
    """Each subject whose volumes have the same value, by the mean of what is said of all of its volumes."""
    alike = {name: value for name, _, value in _subjects(scored) if value is not None}
    volumes = [np.flatnonzero(scored.subjects == name) for name in alike]
    return Cases(
        list(alike),
        np.array(list(alike.values()), dtype=scored.target.values.dtype),
        {
            name: np.stack([answers[rows].mean(axis=0) for rows in volumes]) if volumes else answers[:0]
            for name, answers in scored.predicted.items()
        },
    )


def _subjects(scored: Scored) -> Iterator[tuple[str, int, Any]]:
    """Each subject, how many values its volumes have, and the value where that is one."""
    of_volume = dict(zip(scored.target.rows.tolist(), scored.target.values.tolist(), strict=True))
    for name in np.unique(scored.subjects).tolist():
        rows = np.flatnonzero(scored.subjects == name).tolist()
        values = {of_volume[row] for row in rows if row in of_volume}
        yield name, len(values), next(iter(values)) if len(values) == 1 else None


def entry_of(scored: Scored, config: EvaluateTargetsConfig) -> dict[str, Any]:
    """What scores.json says of a target."""
    target, constants = scored.target, scored.constants
    several = sum(count > 1 for _, count, _ in _subjects(scored))
    of_unit = {"subjects": subject_cases(scored), "volumes": volume_cases(scored)}
    rows, differences = [], []
    for unit, cases in of_unit.items():
        if not cases.subjects:
            continue
        drawn = {name: _scores(scored, config, cases, answers) for name, answers in _with_no_image(scored, cases)}
        rows += [
            {"predictor": name, "of": unit, "scores": _intervals(own, config.level)} for name, own in drawn.items()
        ]
        differences += [
            {
                "predictor": name,
                "minus": NO_IMAGE,
                "of": unit,
                # Of the same draws of subjects, so it is far surer than two intervals side by side say.
                "scores": {
                    metric: asdict(own[metric].minus(drawn[NO_IMAGE][metric], config.level))
                    for metric in COMPARED[target.kind]
                },
            }
            for name, own in drawn.items()
            if name != NO_IMAGE
        ]
    return {
        "name": target.name,
        "kind": target.kind,
        "classes": {name: int((target.values == number).sum()) for number, name in enumerate(target.classes)},
        "volumes": len(target.rows),
        "subjects": len(of_unit["subjects"].subjects),
        "several_values": several,  # subjects whose volumes differ: they are scored by volume alone
        "missing": target.missing,
        "not_listed": target.not_listed,
        "training": {
            "volumes": list(constants.training_volumes),
            "mean": constants.mean if target.kind == "regress" else None,
            "deviation": constants.deviation if target.kind == "regress" else None,
        },
        "rows": rows,
        "differences": differences,
        "auc_of_class": _auc_of_class(scored, config, of_unit["subjects"]),
    }


def _with_no_image(scored: Scored, cases: Cases) -> list[tuple[str, Floats]]:
    constants, count = scored.constants, len(cases.subjects)
    guess = constants.shares if scored.target.classes else np.array([constants.mean])
    return [*cases.predicted.items(), (NO_IMAGE, np.tile(guess, (count, 1)))]


def _scores(scored: Scored, config: EvaluateTargetsConfig, cases: Cases, answers: Floats) -> dict[str, Drawn]:
    return drawn_scores(
        scored.target.kind,
        answers if scored.target.classes else answers[:, 0],
        cases.truth,
        cases.subjects,
        bins=config.bins,
        replicates=config.replicates,
        seed=config.seed,
    )


def _intervals(drawn: Mapping[str, Drawn], level: float) -> dict[str, Any]:
    return {name: asdict(score.interval(level)) for name, score in drawn.items()}


def _auc_of_class(scored: Scored, config: EvaluateTargetsConfig, cases: Cases) -> dict[str, Any]:
    """Of more than two classes each against the rest, over subjects, of the main network."""
    classes = scored.target.classes
    if len(classes) < 3 or not cases.subjects:
        return {}
    answers = next(iter(cases.predicted.values()))
    each = {
        name: scores.drawn(
            partial(scores.auc, answers[:, number], cases.truth == number),
            cases.subjects,
            config.replicates,
            config.seed,
        )
        for number, name in enumerate(classes)
    }
    return _intervals(each, config.level)


def table_rows(entry: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one target's table."""
    if not entry["rows"]:
        return ["predictor", "over"], []
    metrics = list(entry["rows"][0]["scores"])
    rows = [[row["predictor"], row["of"], *cells(row["scores"], metrics)] for row in entry["rows"]]
    rows += [
        [f"{row['predictor']} - {row['minus']}", row["of"], *cells(row["scores"], metrics)]
        for row in entry["differences"]
    ]
    return ["predictor", "over", *headings(metrics)], rows


def volumes_csv(scored: Scored) -> str:
    """One line a volume: the truth where there is one, the prediction, and of classes the probability of each."""
    values = dict(zip(scored.target.rows.tolist(), scored.target.values.tolist(), strict=True))
    lines = [
        [
            scored.ids[row],
            scored.subjects[row],
            scored.windows[row],
            *_said(scored.target, values.get(row), scored.main[row]),
        ]
        for row in range(len(scored.ids))
    ]
    return _csv(["id", "subject", "windows"], scored.target, lines)


def subjects_csv(scored: Scored) -> str:
    """The same of subjects; the truth is empty too where volumes of a subject have different ones."""
    lines = []
    for name, _, value in _subjects(scored):
        rows = np.flatnonzero(scored.subjects == name)
        lines.append([name, len(rows), *_said(scored.target, value, scored.main[rows].mean(axis=0))])
    return _csv(["subject", "volumes"], scored.target, lines)


def _said(target: Target, value: Any, answer: Floats) -> list[Any]:
    if not target.classes:
        return ["" if value is None else value, float(answer[0])]
    truth = "" if value is None else target.classes[value]
    return [truth, target.classes[int(answer.argmax())], *answer.tolist()]


def _csv(start: list[str], target: Target, lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*start, "truth", "predicted", *(f"p:{name}" for name in target.classes)])
    writer.writerows(lines)
    return text.getvalue()
