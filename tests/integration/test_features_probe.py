"""Probes on features: what features can tell is found, and what they cannot is not."""

import csv
import json
import sys

import numpy as np
import pytest
from feature_samples import journal_of, make_cohort, write_csv, write_features
from small_segmentation import make_pretrain_run

from mimscale.cli import main
from mimscale.errors import ConfigError, DataError
from mimscale.features.config import ProbeConfig
from mimscale.features.probe import probe

QUICK = {"replicates": 200, "inner_folds": 3, "logistic_c": (0.01, 0.1, 1.0), "neighbours": (1, 5)}


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(results, target, probe_name, features="trained"):
    entry = next(one for one in results["targets"] if one["name"] == target)
    return next(row for row in entry["rows"] if (row["probe"], row["features"]) == (probe_name, features))


def value_of(results, target, probe_name, score, features="trained"):
    return row_of(results, target, probe_name, features)["scores"][score]["value"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Features of 120 volumes of 60 subjects; three of twelve numbers say something."""
    folder = tmp_path_factory.mktemp("probe")
    random = np.random.default_rng(0)
    subjects = [f"s{index // 2:02d}" for index in range(120)]
    splits = ["val" if int(name[1:]) % 3 == 0 else "train" for name in subjects]
    hidden = np.repeat(random.normal(size=(60, 3)), 2, axis=0)
    vectors = np.concatenate([hidden, random.normal(size=(120, 9))], axis=1) + 0.1 * random.normal(size=(120, 12))
    write_features(folder / "f", vectors, subjects=subjects, splits=splits)
    noise = random.normal(size=(120, 12))
    write_features(folder / "noise", noise, subjects=subjects, splits=splits, weights="random, seed 0")
    rows = []
    for index in range(120):
        three = "abc"[int(np.argmax(hidden[index]))]
        rows.append(
            {
                "id": f"v{index:03d}",
                "told": "yes" if hidden[index, 0] + 0.3 * hidden[index, 1] > 0 else "no",
                "three": three,
                "age": f"{50 + 10 * hidden[index, 2] + random.normal():.2f}",
                "chance": "x" if (index // 2 * 7) % 11 < 5 else "y",
                "odd/name": "" if index >= 100 else str(index // 2 % 2),
            }
        )
    return folder, write_csv(folder / "t.csv", rows)


@pytest.fixture(scope="module")
def results(drawn):
    folder, table = drawn
    config = ProbeConfig(
        features=folder / "f",
        targets=table,
        classify=("told", "three", "chance", "odd/name"),
        regress=("age",),
        controls=(folder / "noise",),
        **QUICK,
    )
    return probe(config)


def test_what_features_can_tell_is_found_and_controls_find_nothing(results):
    for name, least in (("logistic", 0.95), ("knn", 0.7)):  # nine of twelve numbers are noise, which blurs distances
        assert value_of(results, "told", name, "auc") > least
        assert value_of(results, "three", name, "auc") > least - 0.1
        assert 0.2 < value_of(results, "told", name, "auc", "random, seed 0") < 0.8
        assert 0.2 < value_of(results, "chance", name, "auc") < 0.8
    assert value_of(results, "age", "ridge", "r2") > 0.8
    assert value_of(results, "age", "ridge", "mean_absolute_error") < 4
    assert value_of(results, "age", "ridge", "r2", "random, seed 0") < 0.2


def test_the_predictor_that_sees_no_feature_is_a_row_of_its_own(results):
    row = row_of(results, "three", "majority", "none")
    assert row["scores"]["auc"]["value"] == 0.5
    assert row["scores"]["balanced_accuracy"]["value"] == pytest.approx(1 / 3)
    assert value_of(results, "age", "mean", "r2", "none") == pytest.approx(0, abs=0.2)


def test_differences_to_the_control_have_intervals_of_their_own(results):
    told = results["targets"][0]
    found = next(
        one for one in told["differences"] if one["probe"] == "logistic" and one["minus"]["probe"] == "logistic"
    )
    assert found["minus"]["features"] == "random, seed 0"
    assert found["scores"]["auc"]["low"] > 0.1
    age = results["targets"][-1]["differences"]
    assert {(one["minus"]["features"], one["minus"]["probe"]) for one in age} == {
        ("random, seed 0", "ridge"),
        ("none", "mean"),
    }
    assert all(one["scores"]["mean_absolute_error"]["high"] < 0 for one in age)


def test_every_number_has_an_interval_around_it_and_says_what_is_behind_it(results):
    for target in results["targets"]:
        for row in target["rows"]:
            for name, score in row["scores"].items():
                assert 100 < score["draws"] <= 200  # a draw may lack a class
                # Drawn cases fill bins less evenly, so that a calibration error may lie below its draws.
                assert name == "calibration_error" or score["low"] <= score["value"] <= score["high"]
    odd = next(one for one in results["targets"] if one["name"] == "odd/name")
    assert (odd["missing"], odd["not_listed"]) == (20, 0)
    assert sum(odd["classes"].values()) == odd["cases"] < 40
    assert odd["subjects"] == odd["cases"] / 2
    assert "10 equally wide bins" in results["calibration"]
    assert "200 bootstrap draws of subjects" in results["intervals"]


def test_the_files_hold_what_was_returned_and_each_cases_prediction(drawn, results):
    out = drawn[0] / "f" / "probe"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    lines = read_csv(out / "table.csv")
    auc = next(row for row in lines if (row["target"], row["probe"], row["score"]) == ("told", "logistic", "auc"))
    assert float(auc["value"]) == value_of(results, "told", "logistic", "auc")
    three = read_csv(out / "cases_three.csv")
    cases = [row for row in three if (row["features"], row["probe"]) == ("trained", "logistic")]
    assert len(cases) == 40
    recall = [
        np.mean([case["predicted"] == name for case in cases if case["truth"] == name]) for name in ("a", "b", "c")
    ]
    assert np.mean(recall) == pytest.approx(value_of(results, "three", "logistic", "balanced_accuracy"))
    assert all(abs(sum(float(case[f"p:{name}"]) for name in "abc") - 1) < 1e-6 for case in cases)
    assert (out / "cases_target_4.csv").exists()  # odd/name is no name of a file
    age = [row for row in read_csv(out / "cases_age.csv") if row["probe"] == "mean"]
    errors = [abs(float(row["truth"]) - float(row["predicted"])) for row in age]
    assert np.mean(errors) == pytest.approx(value_of(results, "age", "mean", "mean_absolute_error", "none"))


def test_two_probes_give_the_same_results(drawn, results):
    folder, table = drawn
    again = probe(ProbeConfig(features=folder / "f", targets=table, classify=("told",), out=folder / "again", **QUICK))
    assert again["targets"][0]["rows"][:2] == results["targets"][0]["rows"][:2]


def test_shuffled_labels_are_chance_in_cross_validation(drawn):
    folder, _ = drawn
    values = []
    for seed in range(4):
        kind = np.random.default_rng(seed).permutation([0, 1] * 30)
        rows = [{"id": f"v{index:03d}", "kind": str(kind[index // 2])} for index in range(120)]
        table = write_csv(folder / f"shuffled{seed}.csv", rows)
        config = ProbeConfig(
            features=folder / "f", targets=table, classify=("kind",), folds=5, out=folder / "shuffled", **QUICK
        )
        values.append(value_of(probe(config), "kind", "logistic", "auc"))
    # 60 subjects: one AUC has a standard deviation of about 0.08, the mean of four of 0.04.
    assert abs(np.mean(values) - 0.5) < 0.15


def test_the_penalty_is_chosen_without_a_look_at_the_test_cases(drawn, tmp_path):
    """Other truths of tested cases change no prediction."""
    folder, table = drawn
    rows = read_csv(table)
    flipped = [
        {**row, "told": {"yes": "no", "no": "yes"}[row["told"]]} if int(row["id"][1:]) // 2 % 3 == 0 else row
        for row in rows
    ]
    config = {"features": folder / "f", "classify": ("told",), **QUICK}
    probe(ProbeConfig(targets=table, out=tmp_path / "a", **config))
    probe(ProbeConfig(targets=write_csv(tmp_path / "t.csv", flipped), out=tmp_path / "b", **config))
    a, b = (read_csv(tmp_path / name / "cases_told.csv") for name in "ab")
    assert [row["p:yes"] for row in a] == [row["p:yes"] for row in b]
    assert all(first["truth"] != second["truth"] for first, second in zip(a, b, strict=True))


def test_targets_that_cannot_be_probed_are_all_named_at_once(drawn, tmp_path):
    rows = [{"id": f"v{index:03d}", "one": "x", "rare": "y" if index == 1 else "x"} for index in range(120)]
    table = write_csv(tmp_path / "t.csv", rows)
    config = ProbeConfig(features=drawn[0] / "f", targets=table, classify=("one", "rare"), **QUICK)
    with pytest.raises(DataError) as caught:
        probe(config)
    assert "2 target(s) cannot be probed" in str(caught.value)
    assert "target one: all 120 cases are of class 'x'" in str(caught.value)
    assert "target rare: class 'y' has 0 subject(s) in train and 1 in val" in str(caught.value)


def test_without_scikit_learn_it_says_what_to_install(drawn, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'mimscale\[probe\]'"):
        probe(ProbeConfig(features=drawn[0] / "f", targets=drawn[1], classify=("told",), **QUICK))


def test_controls_of_other_volumes_or_the_same_weights_are_refused(drawn, tmp_path):
    folder, table = drawn
    config = {"features": folder / "f", "targets": table, "classify": ("told",), **QUICK}
    write_features(tmp_path / "other", np.ones((120, 12)), weights="random, seed 0", store_sha256="1")
    with pytest.raises(
        ConfigError, match=r"differs from .* in store_sha256, so a difference would not be the weights'"
    ):
        probe(ProbeConfig(controls=(tmp_path / "other",), **config))
    with pytest.raises(ConfigError, match="holds the features of the same weights"):
        probe(ProbeConfig(controls=(folder / "f",), **config))


def test_the_verb_tells_two_anatomies_apart_and_reads_the_table_of_the_ingest(tmp_path, capsys):
    store = make_cohort(tmp_path / "cohort", subjects=6)
    run = make_pretrain_run(tmp_path / "run", store)
    words = [f"run_dir={run}", "threads=1", "device=cpu"]
    assert main(["extract", *words, f"out={tmp_path / 'f'}"]) == 0
    assert main(["extract", *words, f"out={tmp_path / 'r'}", "weights=random", "seed=3"]) == 0
    capsys.readouterr()
    probing = [
        "probe",
        f"features={tmp_path / 'f'}",
        f"targets={tmp_path / 'cohort' / 'scans.csv'}",
        "classify=[kind]",
        "key=image",
        f"journal={store.with_name('store.sources.jsonl')}",
        f"controls=[{tmp_path / 'r'}]",
        "folds=3",
        "replicates=100",
    ]
    assert main([*probing, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(journal_of(store)) == results["targets"][0]["cases"] == 16
    assert results["targets"][0]["subjects"] == 12
    assert value_of(results, "kind", "logistic", "auc") > 0.95
    assert value_of(results, "kind", "knn", "auc") > 0.9
    assert row_of(results, "kind", "logistic", "random, seed 3")["scores"]["auc"]["value"] > 0.5
    assert main([*probing, "classify=[kidn]"]) == 3
    assert "has no column kidn; it has image, subject, split, kind" in capsys.readouterr().err
