"""Predicted targets by volume and by subject, beside a predictor that sees no image."""

import csv
import io

import numpy as np
import pytest
from sklearn import metrics

from mimscale.evaluate.config import EvaluateTargetsConfig
from mimscale.evaluate.target_results import (
    NO_IMAGE,
    Scored,
    entry_of,
    subject_cases,
    subjects_csv,
    table_rows,
    volumes_csv,
)
from mimscale.targets.table import Target
from mimscale.train.target_values import Constants

CONFIG = EvaluateTargetsConfig(replicates=50, bins=5)
SUBJECTS = np.array(["a", "a", "b", "c", "c", "d"])
IDS = np.array([f"v{number}" for number in range(6)])


def scored(values, predicted, classes=(), rows=range(6), missing=0, **more) -> Scored:
    kind = "classify" if classes else "regress"
    constants = Constants(name="t", kind=kind, classes=tuple(classes), training_volumes=(3, 1)[: len(classes)] or (4,))
    if not classes:
        constants = Constants(name="t", kind=kind, training_volumes=(4,), mean=50.0, deviation=10.0)
    target = Target(
        name="t",
        kind=kind,
        rows=np.array(list(rows), dtype=np.int64),
        values=np.array(values),
        classes=tuple(classes),
        missing=missing,
        not_listed=0,
    )
    answers = {"network": np.array(predicted, dtype=float)}
    return Scored(
        target=target, constants=constants, ids=IDS, subjects=SUBJECTS, windows=[2] * 6, predicted=answers | more
    )


def value(entry, predictor, unit, score):
    (row,) = (row for row in entry["rows"] if (row["predictor"], row["of"]) == (predictor, unit))
    return row["scores"][score]["value"]


def test_a_subject_is_the_mean_of_its_volumes_and_counts_once():
    high = [0.9, 0.5, 0.2, 0.3, 0.5, 0.6]
    one = scored([1, 1, 0, 0, 0, 1], [[1 - p, p] for p in high], ("no", "yes"))
    cases = subject_cases(one)
    assert cases.subjects == ["a", "b", "c", "d"]
    assert cases.truth.tolist() == [1, 0, 0, 1]
    np.testing.assert_allclose(cases.predicted["network"][:, 1], [0.7, 0.2, 0.4, 0.6])
    entry = entry_of(one, CONFIG)
    assert value(entry, "network", "subjects", "auc") == 1.0
    expected = metrics.roc_auc_score([1, 1, 0, 0, 0, 1], high)
    assert value(entry, "network", "volumes", "auc") == pytest.approx(expected)
    assert value(entry, "network", "subjects", "brier") == pytest.approx(np.mean([0.09, 0.04, 0.16, 0.16]))
    # Nobody who knows the shares alone (3 to 1) can tell cases apart.
    assert value(entry, NO_IMAGE, "subjects", "auc") == 0.5
    assert value(entry, NO_IMAGE, "volumes", "brier") == pytest.approx((3 * 0.25**2 + 3 * 0.75**2) / 6)
    (difference,) = (row for row in entry["differences"] if row["of"] == "subjects")
    assert difference["scores"]["auc"]["value"] == 0.5
    assert difference["scores"]["auc"]["low"] <= 0.5


def test_numbers_are_scored_in_their_unit():
    one = scored([40.0, 40.0, 60.0, 50.0, 50.0, 70.0], [[42.0], [46.0], [61.0], [47.0], [49.0], [60.0]])
    entry = entry_of(one, CONFIG)
    assert value(entry, "network", "subjects", "mean_absolute_error") == pytest.approx((4 + 1 + 2 + 10) / 4)
    assert value(entry, NO_IMAGE, "subjects", "mean_absolute_error") == pytest.approx((10 + 10 + 0 + 20) / 4)
    truth, said = [40, 40, 60, 50, 50, 70], [42, 46, 61, 47, 49, 60]
    assert value(entry, "network", "volumes", "r2") == pytest.approx(metrics.r2_score(truth, said))
    assert entry["training"] == {"volumes": [4], "mean": 50.0, "deviation": 10.0}


def test_subjects_whose_volumes_differ_or_have_no_value_are_counted_and_not_scored_as_one():
    # a: 40 and 45; c: one volume without a value; d: none.
    one = scored([40.0, 45.0, 60.0, 50.0], [[41.0], [43.0], [61.0], [47.0], [49.0], [60.0]], rows=range(4), missing=2)
    entry = entry_of(one, CONFIG)
    assert (entry["volumes"], entry["subjects"], entry["several_values"], entry["missing"]) == (4, 2, 1, 2)
    assert value(entry, "network", "subjects", "mean_absolute_error") == pytest.approx((1 + 2) / 2)
    lines = list(csv.DictReader(io.StringIO(subjects_csv(one))))
    assert [(line["subject"], line["volumes"], line["truth"]) for line in lines] == [
        ("a", "2", ""),
        ("b", "1", "60.0"),
        ("c", "2", "50.0"),
        ("d", "1", ""),
    ]
    assert [float(line["predicted"]) for line in lines] == [42.0, 61.0, 48.0, 60.0]
    lines = list(csv.DictReader(io.StringIO(volumes_csv(one))))
    assert [line["truth"] for line in lines] == ["40.0", "45.0", "60.0", "50.0", "", ""]
    assert lines[5] == {"id": "v5", "subject": "d", "windows": "2", "truth": "", "predicted": "60.0"}


def test_a_score_that_the_cases_do_not_define_is_a_dash_and_a_target_without_cases_has_no_rows():
    one = scored([1, 1], [[0.4, 0.6]] * 6, ("no", "yes"), rows=[0, 2], missing=4)
    columns, rows = table_rows(entry_of(one, CONFIG))
    assert columns == ["predictor", "over", "AUC", "balanced accuracy", "Brier", "ECE"]
    assert rows[0][:3] == ["network", "subjects", "-"]
    nobody = entry_of(scored(np.zeros(0, int), [[0.4, 0.6]] * 6, ("no", "yes"), rows=[], missing=6), CONFIG)
    assert nobody["rows"] == []
    assert table_rows(nobody)[1] == []


def test_of_more_than_two_classes_each_has_an_auc_and_a_second_network_its_own_rows():
    random = np.random.default_rng(0)
    answers = random.dirichlet(np.ones(3), 6)
    best = random.dirichlet(np.ones(3), 6)
    one = scored([0, 0, 1, 2, 2, 1], answers, "ABC", best=best)
    one = Scored(**{**vars(one), "constants": Constants(name="t", kind="classify", training_volumes=(1, 1, 2))})
    entry = entry_of(one, CONFIG)
    means = subject_cases(one).predicted["network"]
    for number, name in enumerate("ABC"):
        truth = np.array([0, 1, 2, 1]) == number
        expected = metrics.roc_auc_score(truth, means[:, number])
        assert entry["auc_of_class"][name]["value"] == pytest.approx(expected)
    assert [row["predictor"] for row in entry["rows"]] == ["network", "best", NO_IMAGE] * 2
