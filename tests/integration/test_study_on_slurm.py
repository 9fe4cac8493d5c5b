"""A study is submitted with the dependencies of its graph, to commands that only pretend to be Slurm."""

import os
import re
from pathlib import Path

import pytest
import yaml
from fake_slurm import FakeSlurm, run_verb
from small_segmentation import make_store
from small_study import study_tree, write_study

from launch.folder import job_folders
from mimscale.train.run_dir import Outcome, RunDir

PROFILE = {
    "executor": "slurm",
    "processes_per_node": 1,
    "accelerator": "cpu",
    "timeout_min": 30,
    "slurm": {"partition": "main", "cpus_per_task": 1},
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    sbatch = fake.folder / "bin" / "sbatch"  # what is submitted is in the queue from then on
    line = 'echo "$count|$count|somebody|PENDING|Dependency||9:00|a job" >> queue'
    sbatch.write_text(sbatch.read_text().replace("echo $count\n", f"{line}; echo $count\n"))
    return fake


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
    code, nodes, _ = study(capsys)
    assert code == 0
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
