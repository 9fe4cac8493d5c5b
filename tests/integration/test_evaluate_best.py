"""The checkpoint that was best on validation: a second column, and never the headline."""

import csv
import json

import pytest
import torch
from fake_runs import write_lines
from small_segmentation import SOURCES, Threshold, make_finetune_run, make_store
from torch import nn

from mimscale.cli import main
from mimscale.evaluate import weights
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.train.config import CheckpointConfig, ValidationConfig

KEPT = {
    "checkpoint": CheckpointConfig(every_steps=1, keep_best="val_dice"),
    "validation": ValidationConfig(every_steps=1),
}


class Background(nn.Module):
    """Finds nothing."""

    def forward(self, windows):
        shape = (len(windows), 1, *windows.shape[2:])
        return torch.cat([torch.ones(shape), torch.zeros(shape), torch.zeros(shape)], dim=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


def run_with_checkpoints(folder, store, dice):
    """A run with a checkpoint at each step of `dice`, step -> val_dice; the last one is the newest."""
    for step in dice:
        make_finetune_run(folder, store, fields={**KEPT, "steps": step})
    lines = [{"step": step, "val_loss": 0.5, "val_dice": value} for step, value in dice.items()]
    write_lines(folder / "metrics.jsonl", lines)
    return folder


@pytest.fixture
def networks(monkeypatch):
    """Weights of step 2 find everything, others nothing; the tags that were loaded, in order."""
    loaded = []

    def load(config, tag, channels, device):
        loaded.append(tag.name)
        network = Threshold() if tag.name == "step_00000002" else Background()
        return network, json.loads((tag / "contract.json").read_text())

    monkeypatch.setattr(weights, "load_model", load)
    return loaded


def test_the_best_checkpoint_is_scored_beside_the_last_and_says_what_it_was_best_at(store, networks, tmp_path, capsys):
    run = run_with_checkpoints(tmp_path / "run", store, {1: 0.2, 2: 0.7, 3: 0.7, 4: 0.4})
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=1, best=True))
    assert networks == ["step_00000004", "step_00000002"]  # of equals the earlier
    assert scores["checkpoint"] == "step_00000004"
    assert scores["mean"]["without_background"]["dice"] == 0.0
    best = scores["best"]
    assert (best["checkpoint"], best["step"], best["metric"], best["value"]) == ("step_00000002", 2, "val_dice", 0.7)
    assert best["mean"]["without_background"]["dice"] == 1.0
    lines = list(csv.DictReader((run / "evaluate" / "cases.csv").read_text().splitlines()))
    greys = [(line["dice"], line["best_dice"], line["best_hd95_mm"]) for line in lines if line["class"] == "grey"]
    assert greys == [("0.0", "1.0", "0.0")] * len(SOURCES)
    # Files are of the headline alone.
    assert [case["predictions"] for case in scores["cases"]] == [[f"predictions/{name}.nii.gz"] for name in SOURCES]
    assert all("predictions" not in case for case in best["cases"])
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    text = (run / "report" / "index.html").read_text()
    assert "<th>Dice, best on validation</th>" in text
    assert "of step_00000002, which had the best val_dice (0.700)" in text


def test_a_last_checkpoint_that_is_the_best_is_scored_once(store, networks, tmp_path):
    run = run_with_checkpoints(tmp_path / "run", store, {1: 0.2, 2: 0.7})
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0, save_predictions=False, best=True))
    assert networks == ["step_00000002"]
    assert scores["best"]["checkpoint"] == scores["checkpoint"]
    assert scores["best"]["per_class"] == scores["per_class"]


def test_without_the_word_there_is_no_second_column(store, networks, tmp_path):
    run = run_with_checkpoints(tmp_path / "run", store, {1: 0.7, 2: 0.2})
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0, save_predictions=False))
    assert "best" not in scores
    assert "best_dice" not in (run / "evaluate" / "cases.csv").read_text()


def test_a_run_that_kept_no_best_checkpoint_is_refused_with_the_way_out(store, tmp_path, capsys):
    run = make_finetune_run(tmp_path / "run", store)
    assert main(["evaluate", "threads=1", f"run_dir={run}", "best=true"]) == 2
    assert "train with checkpoint.keep_best=val_dice" in capsys.readouterr().err
    run = run_with_checkpoints(tmp_path / "silent", store, {1: 0.7})
    (run / "metrics.jsonl").unlink()
    assert main(["evaluate", "threads=1", f"run_dir={run}", "best=true"]) == 4
    assert "no checkpoint has a val_dice" in capsys.readouterr().err
