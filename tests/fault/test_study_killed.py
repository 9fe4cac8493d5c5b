"""A study goes on after any end, shows what failed with its reason, and repeats nothing that is finished."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_fake_verb import wait_until
from processes import kill_all
from small_segmentation import make_store
from small_study import study_tree
from study_fake_verbs import install, starts

from launch.folder import job_folders
from mimscale.train.run_dir import RunDir


class Place:
    """A study of fakes in a folder."""

    def __init__(self, folder, **changes):
        self.folder = folder
        self.variables = install(folder)
        store = make_store(folder / "data")
        tree = study_tree(folder, **{"data": {"store": {"path": str(store)}}, "workers": 2, **changes})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))

    def start(self, *words, **variables):
        command = [sys.executable, "-m", "mimscale.cli", "study", str(self.folder / "recipe.yaml"), "--json", *words]
        return subprocess.Popen(
            command,
            env={**self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words, **variables):
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=120)
        assert process.returncode != 1 or "Traceback" not in err, err
        return process.returncode, json.loads(out), err

    def submission(self, verb):
        """The newest submission of a verb that is alive."""
        folders = [
            folder
            for run in (self.folder / "study" / "nodes").glob("*")
            for folder in job_folders(RunDir(run).logs)
            if folder.read().verb == verb and len(folder.living()) == 2
        ]
        return folders[0] if folders else None

    def wait_for_finetune(self):
        """The submission of a fine-tuning that is at work."""
        wait_until(lambda: any(node.startswith("finetune") for node in starts(self.folder)), timeout_s=60)
        return self.submission("finetune")


def states(result):
    return {node["label"]: node["state"] for node in result["nodes"]}


def test_a_study_of_which_everything_was_killed_goes_on_and_repeats_only_what_was_cut_off(tmp_path):
    place = Place(tmp_path, workers=1)
    study = place.start(FAKE_WAIT=str(tmp_path / "go"))
    job = place.wait_for_finetune()
    study.kill()  # as when the machine loses power: first the study, then the node at work
    study.communicate()
    kill_all(process.pid for process in job.living())
    wait_until(lambda: not job.living())
    before = starts(tmp_path)

    code, result, _ = place.run()
    assert code == 0
    assert set(states(result).values()) == {"done"}
    after = starts(tmp_path)
    cut_off = f"finetune {job.path.parents[1].name}"
    assert {node for node, count in after.items() if count > 1} == {cut_off}
    assert all(after[node] == count for node, count in before.items() if node != cut_off)
    assert (tmp_path / "study" / "report" / "index.html").exists()

    code, again, _ = place.run()
    assert code == 0
    assert starts(tmp_path) == after
    assert again["tables"] == result["tables"]


def test_nodes_that_outlive_their_study_are_waited_for_and_not_started_twice(tmp_path):
    place = Place(tmp_path)
    study = place.start(FAKE_WAIT=str(tmp_path / "go"))
    place.wait_for_finetune()
    study.kill()
    study.communicate()
    second = place.start(FAKE_WAIT=str(tmp_path / "go"))
    (tmp_path / "go").touch()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert set(states(json.loads(out)).values()) == {"done"}
    assert set(starts(tmp_path).values()) == {1}


def test_a_study_that_is_asked_to_stop_lets_its_nodes_save_and_leaves_with_75(tmp_path):
    place = Place(tmp_path)
    study = place.start(FAKE_WAIT=str(tmp_path / "never"))
    place.wait_for_finetune()
    study.send_signal(signal.SIGINT)
    out, err = study.communicate(timeout=60)
    assert study.returncode == 75, err
    assert "to do" in states(json.loads(out)).values()
    assert place.submission("finetune") is None
    code, result, _ = place.run()
    assert code == 0
    assert set(states(result).values()) == {"done"}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A study with an arm that cannot be, one that diverges, and one that gets another's time, run to its end."""
    folder = tmp_path_factory.mktemp("failing")
    arms = {
        "scratch": {},
        "mae": {"pretrain": {}},
        "bad recipe": {"pretrain": {"mask": {"ratio": 1.5}}},
        "diverges": {"pretrain": {"optim": {"lr": 9.0}}},
        "slow, same time": {"pretrain": {"mask": {"ratio": 0.5}}, "same_time_as": "mae"},
    }
    experiments = {"main": {"question": "Which?", "arms": list(arms)}}
    place = Place(folder, arms=arms, experiments=experiments)
    return place, *place.run()


def test_a_failed_node_is_shown_with_its_reason_and_only_what_depends_on_it_is_left_out(failing):
    _, code, result, _ = failing
    assert code == 2  # of the first node that failed
    nodes = {node["label"]: node for node in result["nodes"]}
    for label, reason in (
        ("pretrain bad recipe, seed 0", "mask.ratio=1.5"),
        ("pretrain diverges, seed 0", "not finite"),
    ):
        assert nodes[label]["state"] == "failed"
        assert reason in nodes[label]["reason"]
    left_out = {label for label, node in nodes.items() if node["state"] == "left out"}
    assert left_out == {
        f"{verb} {arm}, seeds 0, 0" for verb in ("finetune", "evaluate") for arm in ("bad recipe", "diverges")
    }
    others = ("scratch, seed 0", "mae, seeds 0, 0", "slow, same time, seeds 0, 0")
    assert all(nodes[f"evaluate {arm}"]["state"] == "done" for arm in others)


def test_the_report_of_a_study_with_failures_has_the_others_numbers_and_says_what_is_missing(failing):
    place, _, result, _ = failing
    text = (place.folder / "study" / "report" / "index.html").read_text()
    assert "loss is not finite at step 3" in text
    assert "9 done, 2 failed, 4 left out" in text
    scores = {row[0]: row for row in result["tables"][0]["rows"]}
    assert scores["mae"][2:4] == ["1 of 1", "0.750"]
    assert scores["diverges"][2:4] == ["0 of 1", "n/a"]
    (difference,) = [row for row in result["tables"][1]["rows"] if row[0] == "mae"]
    assert difference[2] == "+0.250"


def test_an_arm_that_gets_the_time_of_another_has_the_steps_that_fit_into_it_and_the_report_says_how(failing):
    place, _, result, _ = failing
    nodes = {node["label"]: node for node in result["nodes"]}
    node = nodes["pretrain slow, same time, seed 0"]
    assert json.loads((Path(node["folder"]) / "outcome.json").read_text())["step"] == 2  # of 0.2 s; of mae 4 of 0.1 s
    assert json.loads((Path(nodes[RATE]["folder"]) / "outcome.json").read_text())["step"] == 4
    text = (place.folder / "study" / "report" / "index.html").read_text()
    assert "2 steps instead of 4, as many as fit into the 0.4 s of pretrain mae, seed 0 at 0.2 s a step" in text


RATE = "pretrain slow, same time (its rate), seed 0"


def test_what_failed_is_tried_again_only_when_asked(failing):
    place, *_ = failing
    before = starts(place.folder)
    code, _, _ = place.run()
    assert (code, starts(place.folder)) == (2, before)
    place.run("--retry")
    again = {node for node, count in starts(place.folder).items() if count > before[node]}
    assert {node.split()[0] for node in again} == {"pretrain"}
    assert len(again) == 1
