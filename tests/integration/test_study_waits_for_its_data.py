"""No pretraining of a study starts before it is known whether it reads what others are tested on."""

import json
import subprocess
import sys

from small_study import study_tree, write_study
from study_fake_verbs import install, starts

ONLY_MAE = {
    "arms": {"mae": {"pretrain": {}}},
    "experiments": {"main": {"question": "What does it reach?", "arms": ["mae"]}},
    "target": {"dice": 0.3},
    "workers": 2,
}


def run_study(folder, seed_of_the_test_volumes, *words):
    """A study whose first node trains, and whose test volumes are a store that only its last node reads."""
    variables = install(folder)
    data = study_tree(folder)["data"]
    config = data["phantoms"]["config"]
    data["test_phantoms"] = {**data["phantoms"], "config": {**config, "seed": seed_of_the_test_volumes}}
    data["test"] = {"verb": "ingest", "config": {**data["store"]["config"], "sources": "@test_phantoms/dataset.json"}}
    data["test"]["config"]["parts"] = 2
    evaluate = {**study_tree(folder)["evaluate"], "store": "@test", "split": "train"}
    recipe = write_study(folder, data=data, evaluate=evaluate, **ONLY_MAE)
    command = [sys.executable, "-m", "mimscale.cli", "study", str(recipe), "--json", *words]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, {node["verb"]: node for node in json.loads(ended.stdout)["nodes"]}


def test_a_study_of_pretrained_arms_alone_runs_to_its_end(tmp_path):
    code, nodes = run_study(tmp_path, 9)
    assert code == 0
    assert {node["state"] for node in nodes.values()} == {"done"}


def test_a_pretraining_that_would_read_the_test_volumes_never_starts_whichever_store_is_made_first(tmp_path):
    code, nodes = run_study(tmp_path, 0)
    assert code == 3
    assert nodes["pretrain"]["state"] == "failed"
    assert "would read" in nodes["pretrain"]["reason"]
    assert starts(tmp_path) == {}


def test_a_pretraining_whose_test_volumes_cannot_be_made_is_left_out(tmp_path):
    code, nodes = run_study(tmp_path, 9, "data.test.config.parts=-1")
    assert code == 2
    assert nodes["pretrain"]["state"] == "left out"
    assert starts(tmp_path) == {}
