"""A study from data to tables by one command, with runs that only pretend to train."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from devcluster import DevCluster, Site
from small_study import study_tree
from store_samples import write_pairs
from study_fake_verbs import install, starts

ARMS = {"scratch": {}, "mae": {"pretrain": {}}, "diverges": {"pretrain": {"optim": {"lr": 9.0}}}}
FAILED = "pretrain diverges, seed 0"
pytestmark = pytest.mark.timeout(600)


def test_one_command_goes_from_data_to_tables_past_a_failed_run_and_a_controller_that_is_restarted(
    cluster: DevCluster, site: Site
) -> None:
    site.profile(processes_per_node=1, slurm={"cpus_per_task": 1})
    ingest = {
        "sources": write_pairs(site.folder / "sources", 4),
        "class_names": ["air", "dark", "bright"],
        "val_fraction": 0.3,
        "modality": "mr",
        "parts": 1,
        "workers": 1,
    }
    data = {"store": {"verb": "ingest", "config": ingest, "expect": {"volumes": 4, "channels": 1}}}
    experiments = {"main": {"question": "Which?", "arms": list(ARMS)}}
    tree = study_tree(site.folder, data=data, arms=ARMS, experiments=experiments)
    (site.folder / "study.yaml").write_text(yaml.safe_dump(tree))
    fakes = {name: value for name, value in install(site.folder).items() if name != "PATH"}
    words = [sys.executable, "-m", "mimscale.cli", "study", "study.yaml", "--profile", "profile.yaml"]
    with (site.folder / "said.txt").open("w") as said:
        study = subprocess.Popen(
            [*words, "--wait", "--json"],
            env=cluster.environment() | fakes,
            cwd=site.folder,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )

    def has_said(text: str) -> bool:
        assert study.poll() is None, (site.folder / "said.txt").read_text()
        return text in (site.folder / "said.txt").read_text()

    try:
        nodes_folder = site.folder / "study" / "nodes"
        cluster.wait_for("the ingest to start", lambda: list(nodes_folder.glob("*.job/logs/001/attempts.jsonl")))
        cluster.stop("slurmctld")
        cluster.wait_for("it to miss the controller", lambda: has_said("Slurm does not answer"))
        cluster.up()
        out, _ = study.communicate(timeout=300)
    finally:
        study.kill()
    text = (site.folder / "said.txt").read_text()
    assert "Slurm answers again" in text
    assert study.returncode == 3, text  # of the run that failed
    result = json.loads(out)
    nodes = {node["label"]: node for node in result["nodes"]}
    of_failed = {f"{verb} diverges, seeds 0, 0" for verb in ("finetune", "evaluate")}
    assert nodes[FAILED]["state"] == "failed"
    assert "loss is not finite at step 3" in nodes[FAILED]["reason"]
    assert {label for label, node in nodes.items() if node["state"] == "left out"} == of_failed
    assert [node["state"] for node in nodes.values()].count("done") == len(nodes) - 3
    assert all("loss is not finite" in nodes[label]["reason"] for label in of_failed)
    assert set(starts(site.folder).values()) == {1}
    assert len(starts(site.folder)) == len(nodes) - 3  # all but the ingest, and what is left out
    scores = {row[0]: row[2:4] for row in result["tables"][0]["rows"]}
    assert scores == {"scratch": ["1 of 1", "0.500"], "mae": ["1 of 1", "0.750"], "diverges": ["0 of 1", "n/a"]}
    page = (site.folder / "study" / "report" / "index.html").read_text()
    assert "6 done, 1 failed, 2 left out" in page
    # They wait there for the new job of the run that failed.
    waiting = {re.search(r"job (\d+) stays in the queue for --retry", nodes[label]["reason"])[1] for label in of_failed}
    assert len(waiting) == len(of_failed)
    assert waiting <= set(cluster.command("squeue", "--noheader", "--format=%i").split())
    cluster.command("scancel", *waiting)
