"""Fine-tuning on a table of targets through the whole machine: ZeRO stages, a stop and a restart, scores, a report."""

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from feature_samples import make_cohort
from rank_pool import run_ranks
from target_samples import ENCODERS, bright_store, target_words, targets_table

from mimscale.cli import main
from mimscale.config import load_config
from mimscale.train.config import FinetuneConfig
from mimscale.train.run_dir import RunDir
from mimscale.train.training_data import TrainingData
from mimscale.world import World

pytestmark = pytest.mark.two_process
FOLDS = "stream={workers: 1, crops_per_volume: 2, fold: 0/4}"  # two volumes validate
NOTHING = dict.fromkeys(range(8), "")
MISSING = {"site": {3: ""}, "age": {1: "", 2: "NA"}}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return bright_store(tmp_path_factory.mktemp("bright") / "store")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Partly labelled."""
    return targets_table(tmp_path_factory.mktemp("table"), **MISSING)


def at_every_stage(words):
    """In processes of their own: the losses of the first steps of each encoder at each ZeRO stage."""
    from mimscale.train.engine import Engine, join_ranks, leave_ranks

    store, table = map(Path, words)
    ranks = join_ranks(World.from_environment(os.environ))
    seen = {}
    for name in ENCODERS:
        more = ("targets.pool=attention", "optim.warmup_steps=0", "global_batch=4", "model.drop_path=0")
        line = target_words(store, Path("none"), table, *more, head=name)
        config = load_config(FinetuneConfig, line[1], line[2:])
        config = config.network.resolved(config)
        for stage in (0, 1, 2, 3):
            config = replace(config, engine=replace(config.engine, zero_stage=stage))
            objective = config.network.objective(config)
            data = TrainingData(config, objective.overlay, objective.usable)
            objective.begin(data)
            torch.manual_seed(0)
            engine = Engine(objective.build(1), config, ranks)
            losses = []
            with data.loader(ranks.world, 0) as loader:
                for step in range(2):
                    engine.set_learning_rate(step)
                    loss = objective.loss(engine, next(loader))
                    engine.backward(loss)
                    engine.step()
                    losses.append(ranks.sum({"loss": loss.detach().double()}).wait()["loss"])
            seen[f"{name} {stage}"] = losses
    if ranks.is_first:
        print(json.dumps(seen))
    leave_ranks()
    return 0


def test_every_zero_stage_takes_the_same_steps_with_each_encoder(store, table):
    ended = run_ranks([str(store), str(table)], body=at_every_stage)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    seen = {name: torch.tensor(losses) for name, losses in json.loads(ended[0].out.splitlines()[-1]).items()}
    for name in ENCODERS:
        for stage in (1, 2, 3):  # sums in another order: fp32 rounding
            torch.testing.assert_close(seen[f"{name} {stage}"], seen[f"{name} 0"], rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def runs(store, table, tmp_path_factory) -> list[RunDir]:
    """A straight run on two ranks, and one that was stopped on the way."""
    found = []
    for name in ("straight", "stopped"):
        folder = tmp_path_factory.mktemp(name) / "run"
        words = target_words(store, folder, table, FOLDS, "steps=30", "checkpoint.keep_best=val_loss")
        words += ["checkpoint.every_steps=10"]
        if name == "stopped":
            assert [rank.code for rank in run_ranks(words, signal_rank=1, signal_step=13)] == [75, 75]
        ended = run_ranks(words)
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        assert "target age: 4 of 6 training volumes have a value" in ended[0].err or name == "stopped"
        found.append(RunDir(folder))
    return found


def test_a_stopped_run_goes_on_to_the_bits_of_a_straight_one(runs):
    losses = [[line["loss"] for line in run.read_metrics() if "loss" in line] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30
    files = [run.checkpoints / "step_00000030" / "weights.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    contracts = [json.loads((run.checkpoints / "step_00000030" / "contract.json").read_text()) for run in runs]
    assert contracts[0]["targets"] == contracts[1]["targets"]


def test_the_loss_falls_to_its_floor_and_validation_is_in_the_units_of_the_table(runs):
    lines = runs[0].read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 0.5
    assert max(losses[-5:]) < 0.08
    validation = [line for line in lines if "val_loss" in line][-1]
    assert {"val_accuracy_tone", "val_accuracy_site", "val_error_age"} <= validation.keys()
    assert 0 <= validation["val_accuracy_tone"] <= 1
    assert 0 < validation["val_error_age"] < 40


def test_the_contract_says_what_the_outputs_mean_and_no_place(runs, table):
    contract = (runs[0].checkpoints / "step_00000030" / "contract.json").read_text()
    assert str(table) not in contract
    tone, site, age = json.loads(contract)["targets"]["outputs"]
    assert (tone["classes"], site["classes"]) == (["bright", "dark"], ["A", "B", "C"])
    assert sum(tone["training_volumes"]) == 6
    assert age["training_volumes"] == [4]
    assert age["deviation"] > 1
    config = yaml.safe_load(runs[0].config.read_text())
    assert config["targets"]["classes"]["tone"] == ["bright", "dark"]


@pytest.fixture(scope="module")
def scores(runs, store):
    """On the volumes that it was trained on, which it must know."""
    words = [f"store={store}", "split=train", "best=true", "overlap=0", "threads=1", "targets.replicates=100"]
    assert main(["evaluate", f"run_dir={runs[0].path}", *words]) == 0
    return json.loads((runs[0].evaluation / "scores.json").read_text())


def row_of(target, predictor, unit="subjects"):
    return next(row["scores"] for row in target["rows"] if (row["predictor"], row["of"]) == (predictor, unit))


def test_whole_volumes_are_scored_beside_a_predictor_that_sees_no_image(runs, scores):
    targets = {target["name"]: target for target in scores["targets"]}
    assert list(targets) == ["tone", "site", "age"]
    assert row_of(targets["tone"], "network")["auc"]["value"] == 1.0
    assert row_of(targets["tone"], "no image")["auc"]["value"] == 0.5
    age, guess = row_of(targets["age"], "network"), row_of(targets["age"], "no image")
    assert age["mean_absolute_error"]["value"] < 0.5 * guess["mean_absolute_error"]["value"]
    assert age["mean_absolute_error"]["low"] <= age["mean_absolute_error"]["value"]
    assert row_of(targets["age"], "network, best on validation")["r2"]["value"] <= 1
    assert (targets["age"]["volumes"], targets["age"]["missing"]) == (4, 2)
    with (runs[0].evaluation / "targets" / "volumes_age.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    errors = [abs(float(line["truth"]) - float(line["predicted"])) for line in lines if line["truth"]]
    volumes = row_of(targets["age"], "network", "volumes")["mean_absolute_error"]["value"]
    assert sum(errors) / len(errors) == pytest.approx(volumes)
    assert all(int(line["windows"]) > 1 for line in lines)


def test_the_report_and_the_model_card_show_the_tables(runs, scores, tmp_path, table):
    assert main(["report", str(runs[0].path), f"out={tmp_path / 'report'}"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Targets of whole volumes" in page
    assert "no image" in page
    assert "Segmentation" not in page
    assert main(["export", str(runs[0].path), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# 3D vision transformer for targets of whole volumes" in card
    assert "| target age | a number, output x " in card
    assert "| tone | network | subjects | AUC | 1.000" in card
    contract = (tmp_path / "out" / "contract.json").read_text()
    assert str(table) not in contract
    assert "sha256-" not in contract


def test_its_encoder_gives_features_and_it_predicts_no_masks(runs, store, tmp_path, capsys):
    assert main(["extract", f"run_dir={runs[0].path}", f"store={store}", f"out={tmp_path / 'f'}", "threads=1"]) == 0
    assert main(["predict", str(runs[0].path), str(tmp_path / "scan.nii.gz"), f"out={tmp_path / 'masks'}"]) == 2
    assert "predicts targets of whole volumes (head=targets) and no masks" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "cells", "said"),
    [
        ([], {"age": None}, "has no column age; it has id, tone, site"),
        ([], {"site": {0: "Z", 1: "Y"}}, "column site holds 2 class(es) that were never trained, first 'Z' in line 2"),
        ([], {"age": {0: "old"}}, "no finite number, first 'old' in line 2"),
        (["targets.key=subject"], {}, "has no column subject"),
        (["split=test"], {}, "no volume with"),
        (
            [],
            {name: dict.fromkeys(range(8), "") for name in ("tone", "site", "age")},
            "says nothing of the 8 train vol",
        ),
    ],
)
def test_a_table_without_what_the_run_predicts_is_refused(runs, store, tmp_path, words, cells, said, capsys):
    dropped = [name for name, values in cells.items() if values is None]
    table = targets_table(tmp_path, **{name: values for name, values in cells.items() if values is not None})
    if dropped:
        rows = list(csv.DictReader(io.StringIO(table.read_text())))
        lines = [",".join(name for name in rows[0] if name not in dropped)]
        lines += [",".join(text for name, text in row.items() if name not in dropped) for row in rows]
        table.write_text("\n".join(lines) + "\n")
    # A copy under another path is another store, on which a fold of the run's own means nothing.
    other = tmp_path / "store"
    other.symlink_to(store)
    command = ["evaluate", f"run_dir={runs[1].path}", f"store={other}", f"targets.table={table}", "split=train"]
    assert main([*command, *words]) == 3
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_table_of_files_names_the_volumes_of_an_ingested_store_and_scans_of_a_subject_are_one_case(tmp_path):
    store = make_cohort(tmp_path / "cohort", subjects=3)
    more = ["targets.classify=[kind]", "targets.regress=[]", "targets.key=image", "patch_voxels=[8, 8, 8]"]
    journal = store.with_name("store.sources.jsonl")
    words = target_words(
        store, tmp_path / "run", tmp_path / "cohort" / "scans.csv", f"targets.journal={journal}", *more
    )
    words += ["crop_voxels=[16, 16, 16]", "steps=2", "global_batch=4", "stream.workers=0", "micro_batch=4"]
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    assert "target kind: 6 of 6 training volumes have a value" in ended.err
    assert main(["evaluate", f"run_dir={tmp_path / 'run'}", "threads=1", "targets.replicates=20", "flips=[z, x]"]) == 0
    (kind,) = json.loads((tmp_path / "run" / "evaluate" / "scores.json").read_text())["targets"]
    assert (kind["volumes"], kind["subjects"], kind["several_values"]) == (4, 2, 0)
    assert kind["classes"] == {"ball": 2, "shell": 2}
    with (tmp_path / "run" / "evaluate" / kind["subjects_file"]).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["volumes"] for line in lines] == ["2", "2"]
    assert all(float(line["p:ball"]) + float(line["p:shell"]) == pytest.approx(1) for line in lines)


def test_a_run_does_not_go_on_with_a_table_that_has_changed(runs, store, table, tmp_path, capsys):
    changed = targets_table(tmp_path, **{**MISSING, "age": {1: "", 2: "NA", 5: "46"}})
    words = target_words(store, runs[1].path, changed, FOLDS, "steps=31", "checkpoint.keep_best=val_loss")
    (ended,) = run_ranks([*words, "checkpoint.every_steps=10", "micro_batch=4"], size=1)
    assert ended.code == 2
    said = " ".join(ended.err.split())
    assert "holds a run with another config" in said
    assert "targets.table_hash: 'sha256-" in said
    assert "targets.classes" not in said
    # The same of a config that a run has resolved: of `resume`, and of a job that waited.
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(runs[1].config.read_text().replace(str(table), str(changed)))
    assert main(["finetune", str(frozen)]) == 3
    assert "what it says in tone, site, age has changed since this run began" in " ".join(
        capsys.readouterr().err.split()
    )
