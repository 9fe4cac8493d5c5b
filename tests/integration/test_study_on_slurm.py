"""A study is submitted with the dependencies of its graph, to commands that only pretend to be Slurm."""

import os
import re
from pathlib import Path

import pytest
import yaml
from fake_slurm import SLURM_PROFILE, FakeSlurm, run_verb
from small_segmentation import make_store
from small_study import study_tree, write_study

from launch.folder import job_folders
from mimscale.train.run_dir import Outcome, RunDir


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(SLURM_PROFILE))
    return FakeSlurm(tmp_path / "slurm", monkeypatch, queues=True)


def study(capsys, *words):
    code, result, said = run_verb(capsys, "study", "recipe.yaml", "--profile", "profile.yaml", "--json", *words)
    return code, {node["label"]: node for node in result["nodes"]}, said


def script_of(node, verb):
    (folder,) = [f for f in job_folders(RunDir(node).logs) if f.read().verb == verb]
    return folder, folder.script.read_text()


def test_each_run_waits_for_the_one_that_it_reads_from(tmp_path, slurm, capsys):
    store = make_store(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(study_tree(tmp_path, data={"store": {"path": str(store)}})))
    code, nodes, said = study(capsys)
    assert code == 0, said
    assert len(slurm.calls("sbatch")) == 5
    assert {node["state"] for node in nodes.values()} == {"queued"}
    waits = {}
    for label, node in nodes.items():
        folder, script = script_of(Path(node["folder"]), node["verb"])
        waits[label] = re.findall(r"--dependency=\S*?afterok:(\d+)", script)
        waits[folder.read().job_id] = label
    assert waits["pretrain mae, seed 0"] == waits["finetune scratch, seed 0"] == []
    assert [waits[job] for job in waits["finetune mae, seeds 0, 0"]] == ["pretrain mae, seed 0"]
    assert [waits[job] for job in waits["evaluate mae, seeds 0, 0"]] == ["finetune mae, seeds 0, 0"]
    assert [waits[job] for job in waits["evaluate scratch, seed 0"]] == ["finetune scratch, seed 0"]

    code, nodes, _ = study(capsys)
    assert (code, len(slurm.calls("sbatch"))) == (0, 5)  # what is queued is not submitted again
    assert {node["state"] for node in nodes.values()} == {"queued"}


def test_nothing_trains_before_its_data_are_there_and_are_what_they_should_be(tmp_path, slurm, capsys):
    write_study(tmp_path)
    code, nodes, said = study(capsys)
    assert code == 0
    assert "2 job(s) submitted; the other 5 need what these make: give the same command again" in said
    states = {label: node["state"] for label, node in nodes.items()}
    assert states.pop("cohort phantoms") == states.pop("ingest store") == "queued"
    assert set(states.values()) == {"to do"}
    assert len(slurm.calls("sbatch")) == 2

    # Both end well, and the store is not what the study expects.
    for verb in ("cohort", "ingest"):
        (node,) = [node for node in nodes.values() if node["verb"] == verb]
        (folder,) = job_folders(RunDir(tmp_path / "study" / "nodes" / f"{node['id']}.job").logs)
        folder.settle(Outcome(outcome="finished", exit_code=0, step=-1))
    make_store(tmp_path / "data")
    place = tmp_path / "study" / "nodes" / nodes["ingest store"]["id"]
    (tmp_path / "data" / "store").rename(place)
    code, nodes, _ = study(capsys)
    assert code == 3
    assert nodes["ingest store"]["state"] == "failed"
    assert "0 volumes to train, expected 4" in nodes["ingest store"]["reason"]
    assert nodes["evaluate scratch, seed 0"]["state"] == "left out"
    assert len(slurm.calls("sbatch")) == 2


def test_a_second_way_to_score_a_run_waits_for_the_run_and_not_for_its_first_scores(tmp_path, slurm, capsys):
    store = make_store(tmp_path / "data")
    scoring = {"flips": {}, "no flips": {"evaluate.flips": ["x"]}}
    experiments = {"scoring": {"question": "?", "arms": ["scratch"], "settings": scoring}}
    tree = study_tree(tmp_path, data={"store": {"path": str(store)}}, experiments=experiments)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    code, nodes, said = study(capsys)
    assert code == 0, said
    train, first, second = nodes.values()
    job_id = script_of(Path(train["folder"]), "finetune")[0].read().job_id
    for node, place in ((first, Path(first["folder"])), (second, Path(f"{second['folder']}.job"))):
        assert f"afterok:{job_id}\n" in script_of(place, node["verb"])[1]


def test_data_that_are_made_from_two_that_are_not_there_wait_for_both(tmp_path, slurm, capsys):
    tree = study_tree(tmp_path)
    tree["data"]["others"] = tree["data"]["phantoms"] | {"config": tree["data"]["phantoms"]["config"] | {"seed": 7}}
    tree["data"]["store"]["config"]["subject_key"] = "@others/key"
    write_study(tmp_path, data=tree["data"])
    code, nodes, _ = study(capsys)
    assert code == 0
    assert [node["state"] for node in nodes.values() if node["verb"] == "cohort"] == ["queued", "queued"]
    assert nodes["ingest store"]["state"] == "to do"
