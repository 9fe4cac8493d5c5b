"""Tables that a run on targets cannot use: each is refused before training, with what is wrong and what to do."""

import re
from pathlib import Path

import pytest
from feature_samples import write_csv
from target_samples import bright_rows, bright_store, target_words, targets_table

from mimscale.cli import main
from mimscale.config import load_config
from mimscale.errors import ConfigError, DataError
from mimscale.train.config import FinetuneConfig
from mimscale.train.training_data import TrainingData
from mimscale.train.verbs import check_run


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return bright_store(tmp_path_factory.mktemp("bright") / "store")


def config_of(store: Path, folder: Path, *more: str, table: Path | None = None, **cells) -> FinetuneConfig:
    words = target_words(store, folder / "run", table or targets_table(folder, **cells), *more)
    return load_config(FinetuneConfig, words[1], words[2:])


def begin(config: FinetuneConfig) -> TrainingData:
    """What happens before the first step: the table is read, then met with the store."""
    config = config.network.resolved(config)
    objective = config.network.objective(config)
    data = TrainingData(config, objective.overlay, objective.usable)
    objective.begin(data)
    return data


def everyone(text: str) -> dict[int, str]:
    return dict.fromkeys(range(8), text)


@pytest.mark.parametrize(
    ("more", "cells", "said"),
    [
        (("targets.classify=[sx]",), {}, r"targets\.csv: has no column sx; it has id, tone, site, age"),
        (("targets.key=subject",), {}, r"has no column subject; .*; targets\.key= says which one names the cases"),
        ((), {"id": {3: "vol_900"}}, r"1 of 8 lines name no volume of .*store \(vol_900; there are vol_000"),
        (("targets.unmatched=skip",), {"id": everyone("x")}, r"8 case\(s\)|1 case\(s\) stand in more than one"),
        (
            (),
            {"age": {2: "old"}},
            r"1 value\(s\) that are no finite number, first 'old' in line 4; .* targets\.classify",
        ),
        ((), {"tone": everyone("dark")}, r"target tone: all 8 cases are of class 'dark'; nothing can be told apart"),
        ((), {"site": everyone("")}, r"column site has no value in any of its 8 lines"),
        ((), {"age": everyone("7")}, r"target age: all 8 training volumes have the value 7; nothing can be told apart"),
        (
            (),
            {name: {4: "", 5: "NA"} for name in ("tone", "site", "age")},
            r"2 of 8 volumes have no value in any of tone, site, age \(subject subject_4, subject_5\); add them, leave "
            r"them out with targets\.unlabelled=skip",
        ),
        (
            ("stream.fold=2/8",),  # which validates on vol_002 alone
            {"site": {2: "Z"}},
            r"target site: class 'Z' has no training volume, 1 in validation and 1 in the store; leave its cells empty",
        ),
        (
            ("stream.filter=subject != 'subject_7'",),
            {"site": {7: "Z"}},
            r"class 'Z' has no training volume, 0 in validation and 1 in the store",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(store, tmp_path, more, cells, said):
    with pytest.raises(DataError, match=said):
        begin(config_of(store, tmp_path, *more, **cells))


def test_a_key_that_matches_nothing_is_refused_even_where_strangers_may_be(store, tmp_path):
    rows = [{**row, "id": f"x{number}"} for number, row in enumerate(bright_rows())]
    table = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(DataError, match=r"8 of 8 lines name no volume of .*x0, x1, x2, \.\.\."):
        begin(config_of(store, tmp_path, "targets.unmatched=skip", table=table))


def test_a_target_without_any_training_volume_is_refused(store, tmp_path):
    ages = {number: "" for number in range(8) if number != 2}
    with pytest.raises(DataError, match=r"target age: no training volume has a value \(of 1 volumes that have one\)"):
        begin(config_of(store, tmp_path, "stream.fold=2/8", age=ages))


def test_volumes_without_any_value_are_left_out_if_asked(store, tmp_path):
    cells = {name: {4: "", 5: "NA"} for name in ("tone", "site", "age")}
    data = begin(config_of(store, tmp_path, "targets.unlabelled=skip", "stream.fold=2/8", **cells))
    assert data.train.tolist() == [0, 1, 3, 6, 7]
    assert data.validation.tolist() == [2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["targets.classify=[]", "targets.regress=[]"], "targets.classify=[COLUMN, ...] or targets.regress="),
        (["targets.task_weights={agee: 2}"], "targets.task_weights: agee is no column of classify or regress"),
        (["targets.task_weights={age: 0}"], "task_weights.age=0.0: must be above 0"),
        (["targets.pool=max"], "targets.pool: Input should be 'mean' or 'attention'"),
        (["unetr={num_classes: 3}"], "unetr: Input should be None"),
        (["regions={a: [b]}"], "regions: Input should be None"),
        (["stream.origins=labelled"], "stream.origins=labelled: only a run that segments reads labels"),
        (["targets.key=image"], "targets.key=image: needs targets.journal="),
        (["targets.tabel=x"], "did you mean targets.table?"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_check(store, tmp_path, words, said, capsys):
    assert main([*target_words(store, tmp_path / "run", tmp_path / "none.csv"), *words, "--check"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_recipe_for_targets_needs_a_table(capsys):
    assert main(["finetune", "finetune_targets", "store=s", "run_dir=r", "targets.classify=[a]", "--check"]) == 2
    assert "targets.table: missing; write it into the recipe, or give targets.table=VALUE" in capsys.readouterr().err


def test_a_run_is_begun_with_the_classes_of_its_table_and_a_hash_of_what_it_says(store, tmp_path):
    config = config_of(store, tmp_path)
    check_run(config)
    first = config.network.resolved(config)
    assert first.targets.classes == {"tone": ("bright", "dark"), "site": ("A", "B", "C")}
    assert first.network.resolved(first) == first
    # Other columns, another order of lines and lines that say nothing change nothing.
    rows = [{**row, "weight": "80"} for row in reversed(bright_rows())] + [
        {"id": "vol_900", "tone": "", "site": "NA", "age": "", "weight": "70"}
    ]
    write_csv(first.targets.table, rows)
    assert first.network.resolved(first) == first
    targets_table(tmp_path, age={3: "36"})
    with pytest.raises(DataError, match=r"what it says in tone, site, age has changed since this run began"):
        first.network.resolved(first)
    first.targets.table.unlink()
    with pytest.raises(DataError, match=re.escape(str(first.targets.table))):
        first.network.resolved(first)


def test_a_config_of_classes_that_are_not_its_columns_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"targets\.classes: is of tone, classify of tone, site"):
        config_of(store, tmp_path, "targets.classes={tone: [dark, bright]}")
