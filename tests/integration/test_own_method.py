"""A method that stands in no file of the package goes through the whole machine: train, stop, go on, score, report."""

import json
from pathlib import Path

import pytest
from rank_pool import run_ranks
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words, run_of

from mimscale.cli import main
from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process
OWN = ("method=fill_method:METHOD", "model={width: 8}", "fill={loss: l2}", "engine.zero_stage=2")
FOLD = "stream.fold=0/4"  # its volumes are those of validation


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory) -> RunDir:
    words = pretrain_words(store, tmp_path_factory.mktemp("own") / "run", *OWN, FOLD)
    ended = run_ranks(words)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return run_of(words)


def losses(run: RunDir) -> list[float]:
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def weights(run: RunDir) -> bytes:
    return (run.checkpoints / "step_00000020" / "weights.safetensors").read_bytes()


def test_it_trains_and_a_stopped_run_goes_on_to_the_same_bits(store, straight, tmp_path):
    words = pretrain_words(store, tmp_path / "run", *OWN, FOLD)
    assert [rank.code for rank in run_ranks(words, signal_rank=1, signal_step=9)] == [75, 75]
    assert [rank.code for rank in run_ranks(words)] == [0, 0]
    assert losses(run_of(words)) == losses(straight)
    assert weights(run_of(words)) == weights(straight)
    assert losses(straight)[-1] < losses(straight)[0]


def test_it_is_validated_beside_the_trivial_predictors(straight):
    last = next(line for line in reversed(straight.read_metrics()) if "val_loss" in line)
    assert last["val_loss_vs_mean_voxel"] > 0
    assert last["val_feature_rank"] >= 1


def test_it_is_scored_reported_and_exported(straight, tmp_path, capsys):
    assert main(["evaluate", f"run_dir={straight.path}", "crops=1", "pictures=1"]) == 0
    assert main(["report", str(straight.path)]) == 0
    page = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert "Reconstruction" in page.read_text()
    assert main(["export", str(straight.path), str(tmp_path / "out")]) == 0
    assert "3D CNN that fills in hidden voxels" in (tmp_path / "out" / "README.md").read_text()
    contract = json.loads((tmp_path / "out" / "contract.json").read_text())
    assert contract["fill"]["loss"] == "l2"
    assert contract["model"]["width"] == 8


def test_it_is_planned(capsys):
    words = ["plan", "demo/pretrain", *OWN, "--nodes", "1", "--gpu", "h100", "--gpus-per-node", "1", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 8 * 125 + 8 + 8 + 1
    assert plan["flops_per_sample"]["total"]["training"] > 0
    assert all(stage["peak"] > 0 for stage in plan["memory"]["stages"])
