"""Tables of targets: who is meant, what is missing, and mistakes in words."""

import json

import numpy as np
import pytest
from feature_samples import write_csv, write_features

from mimscale.errors import ConfigError, DataError
from mimscale.features.config import ProbeConfig
from mimscale.features.layout import read_features
from mimscale.targets.table import TargetTable, Volumes


@pytest.fixture
def features(tmp_path):
    return write_features(tmp_path / "f", np.eye(6), subjects=["p", "p", "q", "r", "s", "t"])


def targets_of(features, tmp_path, rows, **options):
    table = write_csv(tmp_path / "t.csv", rows)
    config = ProbeConfig(features=features.folder, targets=table, **options)
    volumes = Volumes(ids=features.ids, subjects=features.subjects, where=str(features.folder))
    return TargetTable(table, config).match(volumes)


def test_classes_and_numbers_are_read_and_missing_values_counted_for_each_target(features, tmp_path):
    rows = [
        {"id": "v003", "sex": "m", "age": "61.5"},
        {"id": "v000", "sex": "f", "age": ""},
        {"id": "v001", "sex": "NA", "age": "7"},
        {"id": "v005", "sex": "m", "age": "nan"},
    ]
    sex, age = targets_of(features, tmp_path, rows, classify=("sex",), regress=("age",))
    assert (sex.classes, sex.rows.tolist(), sex.values.tolist()) == (("f", "m"), [0, 3, 5], [0, 1, 1])
    assert (sex.missing, sex.not_listed) == (3, 2)
    assert (age.rows.tolist(), age.values.tolist(), age.missing) == ([1, 3], [7.0, 61.5], 4)


def test_a_line_may_stand_for_all_volumes_of_a_subject(features, tmp_path):
    rows = [{"subject": "p", "age": "1"}, {"subject": "t", "age": "2"}]
    (age,) = targets_of(features, tmp_path, rows, regress=("age",), key="subject")
    assert (age.rows.tolist(), age.values.tolist()) == ([0, 1, 5], [1.0, 1.0, 2.0])


def test_the_journal_names_files_and_subjects_as_the_sources_do(features, tmp_path):
    lines = [
        {"source": str(tmp_path / "scans" / "a.nii"), "subject": "Ada", "outcome": "stored", "id": "v002"},
        {
            "source": str(tmp_path / "scans" / "b.nii"),
            "subject": "Bob",
            "outcome": "duplicate",
            "id": "x",
            "of": "v004",
        },
        {"source": str(tmp_path / "scans" / "c.nii"), "subject": "Cyd", "outcome": "quarantined", "reason": "empty"},
    ]
    journal = tmp_path / "store.sources.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"image": "scans/b.nii", "age": "2"}, {"image": "scans/a.nii;scans/a2.nii", "age": "1"}]
    (age,) = targets_of(features, tmp_path, rows, regress=("age",), key="image", journal=journal)
    assert (age.rows.tolist(), age.values.tolist()) == ([2, 4], [1.0, 2.0])
    rows = [{"subject": "Bob", "age": "2"}]
    (age,) = targets_of(features, tmp_path, rows, regress=("age",), key="subject", journal=journal)
    assert age.rows.tolist() == [4]
    journal.write_text("no journal")
    with pytest.raises(DataError, match="no journal of an ingest"):
        targets_of(features, tmp_path, rows, regress=("age",), key="subject", journal=journal)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(features, tmp_path):
    with pytest.raises(DataError, match="has no column sx, weight; it has id, sex"):
        targets_of(features, tmp_path, [{"id": "v000", "sex": "m"}], classify=("sx",), regress=("weight",))
    with pytest.raises(DataError, match="has no column id; it has name, sex; key= says"):
        targets_of(features, tmp_path, [{"name": "v000", "sex": "m"}], classify=("sex",))


def test_lines_that_name_nobody_are_counted_and_the_first_three_named(features, tmp_path):
    rows = [{"id": name, "sex": "m"} for name in ("v000", "x1", "x2", "x3", "x4")]
    with pytest.raises(DataError, match=r"4 of 5 lines name no volume of .*\(x1, x2, x3, \.\.\.; there are v000, v001"):
        targets_of(features, tmp_path, rows, classify=("sex",))
    (sex,) = targets_of(features, tmp_path, rows, classify=("sex",), unmatched="skip")
    assert sex.rows.tolist() == [0]
    with pytest.raises(DataError, match="4 of 4 lines"):
        targets_of(features, tmp_path, rows[1:], classify=("sex",), unmatched="skip")


def test_a_case_that_is_listed_twice_is_refused(features, tmp_path):
    rows = [{"id": "v000", "sex": "m"}, {"id": "v000", "sex": "f"}]
    with pytest.raises(DataError, match=r"1 case\(s\) stand in more than one line \(v000\)"):
        targets_of(features, tmp_path, rows, classify=("sex",))


@pytest.mark.parametrize("text", ["old", "inf", "1,5"])
def test_what_is_no_number_is_refused_with_its_line(features, tmp_path, text):
    rows = [{"id": "v000", "age": "1"}, {"id": "v001", "age": text}]
    with pytest.raises(DataError, match=rf"1 value\(s\) that are no finite number, first '{text}' in line 3"):
        targets_of(features, tmp_path, rows, regress=("age",))


def test_a_column_without_any_value_is_refused(features, tmp_path):
    with pytest.raises(DataError, match="column age has no value for any of the 6 volumes"):
        targets_of(features, tmp_path, [{"id": "v000", "age": "NA"}], regress=("age",))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_and_their_volumes_named(tmp_path, value):
    vectors = np.ones((6, 2))
    vectors[[1, 2, 4, 5], 1] = value
    write_features(tmp_path / "f", vectors)
    with pytest.raises(
        DataError, match=r"4 of 6 volumes have features that are not finite \(v001, v002, v004, \.\.\.\)"
    ):
        read_features(tmp_path / "f")


def test_features_that_are_missing_damaged_or_of_another_version_are_refused(tmp_path):
    with pytest.raises(DataError, match="give the folder of an extraction that has ended"):
        read_features(tmp_path)
    folder = write_features(tmp_path / "f", np.ones((3, 2))).folder
    with (folder / "features.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"other bytes than features\.json says"):
        read_features(folder)
    (folder / "features.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99"):
        read_features(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "say which columns"),
        ({"classify": ("a", "a")}, "a is listed twice"),
        ({"classify": ("id",)}, "key=id: is what names the cases"),
        ({"classify": ("a",), "key": "image"}, "needs journal="),
        ({"classify": ("a",), "folds": 1}, "folds=1: must be at least 2"),
        ({"classify": ("a",), "test_split": "train"}, "both are train"),
        ({"classify": ("a",), "level": 1.0}, "level=1.0"),
        ({"classify": ("a",), "neighbours": ()}, r"neighbours=\[\]"),
        ({"regress": ("a",), "ridge_alpha": (0.0,)}, "must be above 0"),
    ],
)
def test_a_probe_that_cannot_be_is_refused(tmp_path, options, said):
    from mimscale.config import build_config

    with pytest.raises(ConfigError, match=said):
        build_config(ProbeConfig, {"features": "f", "targets": "t.csv", **options}, "test")
