"""Every packaged study is one that its verbs take, once its data are there."""

import json

import pytest

from mimscale.cli import main
from mimscale.config import recipe_names
from mimscale.study.config import load_study

STUDIES = [
    name
    for name, line in recipe_names().items()
    if name.startswith("studies/") and "a part of studies/small" not in line
]
DATA = {
    "btcv": ["data.btcv.config.sources=dataset_0.json"],
    "brats": [f"data.{name}.config.sources=scans.csv" for name in ("t1", "t1ce", "t2", "flair", "all")],
}


def data_of(study):
    extends = load_study([study, "run_dir=x"]).data
    return DATA["btcv"] if "btcv" in extends else DATA["brats"] if "t1ce" in extends else []


def test_there_is_a_study_for_each_experiment_of_the_paper():
    wanted = {f"e{number:02d}" for number in range(1, 12)} | {
        "small",
        "small_quick",
        "small_lr_grid",
        "paper_btcv",
        "paper_brats",
    }
    assert {name.removeprefix("studies/").split("_", 1)[0] if "/e" in name else name[8:] for name in STUDIES} == wanted


@pytest.mark.parametrize("study", STUDIES)
def test_a_packaged_study_has_no_node_that_cannot_be(study, tmp_path, capsys):
    assert main(["study", study, f"run_dir={tmp_path}", *data_of(study), "--dry-run", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {node["state"] for node in nodes} == {"to do"}, [node for node in nodes if node["state"] == "failed"][:3]


@pytest.mark.parametrize("study", ["studies/paper_btcv", "studies/paper_brats"])
def test_a_study_without_its_data_says_what_is_needed_and_how_to_give_it(study, tmp_path, capsys):
    assert main(["study", study, f"run_dir={tmp_path}", "--dry-run", "--json"]) == 2
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    failed = [node for node in nodes if node["state"] == "failed"]
    assert failed
    assert all("sources: missing" in node["reason"] and ".config.sources=" in node["reason"] for node in failed)
    assert not any(node["state"] == "to do" for node in nodes)


def test_the_paper_s_own_numbers_are_not_invented():
    for study in STUDIES:
        for experiment in load_study([study, "run_dir=x"]).experiments.values():
            assert experiment.paper_value is None
