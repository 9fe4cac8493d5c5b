"""Which checkpoints stay: a table of cases, then properties that hold for every history."""

import json

import pytest
from fakes import FileEngine, checkpoints_of
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_stores import write_store

from mimscale.config import build_config
from mimscale.errors import ConfigError, DataError
from mimscale.train import committed
from mimscale.train.config import CheckpointConfig, PretrainConfig
from mimscale.train.retention import higher_is_better, read_scores, why_kept
from mimscale.train.run_dir import RunDir

STEPS = [100, 200, 300, 400, 500]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 2}, {500: ["newest"], 400: ["one of the last 2"]}),
        ({"keep": 1, "keep_every_steps": 200}, {500: ["newest"], 200: ["every 200 steps"], 400: ["every 200 steps"]}),
        (
            {"keep": 1, "keep_best": "val_loss", "scores": {100: 0.3, 200: 0.1, 300: 0.2, 500: 0.4}},
            {500: ["newest"], 200: ["best val_loss (0.1)"]},
        ),
        (
            {"keep": 1, "keep_best": "val_dice", "scores": {100: 0.3, 200: 0.1, 300: 0.2}},
            {500: ["newest"], 100: ["best val_dice (0.3)"]},
        ),
        ({"keep": 1, "keep_best": "val_dice", "scores": {}}, {500: ["newest"]}),
        ({"keep": 1, "keep_best": "val_loss", "scores": {999: 0.0}}, {500: ["newest"]}),
        ({"keep": 9, "newest_good": 200}, {200: ["newest"], 100: ["one of the last 9"]}),
        (
            {"keep": 1, "keep_every_steps": 500, "keep_best": "val_loss", "scores": {500: 1.0}},
            {500: ["newest", "every 500 steps", "best val_loss (1)"]},
        ),
    ],
)
def test_what_is_kept_and_why(options, kept):
    assert why_kept(STEPS, **{"newest_good": 500, **options}) == kept


def test_of_equal_scores_the_earliest_stays():
    kept = why_kept(STEPS, newest_good=500, keep=1, keep_best="val_loss", scores=dict.fromkeys(STEPS, 0.5))
    assert kept.keys() == {500, 100}


@settings(max_examples=200, deadline=None)
@given(
    steps=st.sets(st.integers(1, 1000), min_size=1, max_size=30),
    broken=st.integers(0, 5),
    keep=st.integers(1, 6),
    every=st.none() | st.integers(1, 50),
    scores=st.dictionaries(st.integers(1, 1000), st.floats(-1e9, 1e9)),
)
def test_the_newest_good_one_stays_and_a_second_look_deletes_nothing_more(steps, broken, keep, every, scores):
    newest_good = sorted(steps)[max(0, len(steps) - 1 - broken)]
    options = {"newest_good": newest_good, "keep": keep, "keep_every_steps": every, "keep_best": "val_loss"}
    kept = why_kept(list(steps), scores=scores, **options)
    assert newest_good in kept
    assert kept.keys() <= {step for step in steps if step <= newest_good}
    assert why_kept(list(kept), scores=scores, **options) == kept


@pytest.mark.parametrize(("metric", "higher"), [("val_loss", False), ("val_dice", True), ("val_dice_2", True)])
def test_the_direction_of_a_metric_is_known_by_its_name(metric, higher):
    assert higher_is_better(metric) is higher


@pytest.mark.parametrize("metric", ["val_speed", "loss_dice", ""])
def test_a_metric_without_a_direction_is_refused(metric):
    with pytest.raises(ConfigError, match="nobody knows whether more is better"):
        build_config(CheckpointConfig, {"keep_best": metric}, "recipe")


RECIPE = {
    "store": "/none",
    "run_dir": "/none",
    "steps": 10,
    "global_batch": 2,
    "micro_batch": 1,
    "crop_voxels": [16, 16, 16],
    "patch_voxels": [8, 8, 8],
}


@pytest.mark.parametrize(
    ("checkpoint_keys", "validation", "text"),
    [
        ({"every_steps": 100, "keep_every_steps": 150}, {}, "must be a multiple of checkpoint.every_steps=100"),
        ({"keep_every_steps": 0}, {}, "keep_every_steps"),
        ({"every_steps": 100, "keep_best": "val_loss"}, {"every_steps": 0}, "needs a validation at every checkpoint"),
        ({"every_steps": 100, "keep_best": "val_loss"}, {"every_steps": 30}, "needs a validation at every checkpoint"),
    ],
)
def test_keys_that_could_not_do_what_they_say_are_refused(checkpoint_keys, validation, text):
    with pytest.raises(ConfigError, match=text):
        build_config(PretrainConfig, {**RECIPE, "checkpoint": checkpoint_keys, "validation": validation}, "recipe")


def test_a_store_without_validation_volumes_has_no_best_checkpoint(tmp_path):
    from mimscale.train.training_data import TrainingData

    write_store(tmp_path / "store", [(20, 20, 20)])  # all for training
    keys = {"store": str(tmp_path / "store"), "checkpoint": {"every_steps": 500, "keep_best": "val_loss"}}
    with pytest.raises(DataError, match=r"no validation volume, so checkpoint\.keep_best=val_loss would keep nothing"):
        TrainingData(build_config(PretrainConfig, RECIPE | keys, "recipe"), None)


def test_scores_are_read_out_of_a_log_that_a_kill_cut_short(tmp_path):
    run = RunDir(tmp_path)
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "val_loss": 0.5, "val_loss_ct": 9.0}, {"step": 4, "val_loss": 0.25}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "val_loss": 0.1')
    assert read_scores(run, "val_loss") == {2: 0.5, 4: 0.25}
    assert read_scores(run, None) == {}
    assert read_scores(RunDir(tmp_path / "nothing"), "val_loss") == {}


def saved(run, *steps, broken=(), **options):
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, **options)
    for step in steps:
        engine.state = step
        checkpoints.save(step, {"samples_done": step})
        if step in broken:
            (run.checkpoints / committed.tag_name(step) / "weights.safetensors").write_text("")
    return [committed.step_of(tag) for tag in committed.tags(run)]


def test_a_run_keeps_the_last_the_regular_and_the_best(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    values = [0.9, 0.5, 0.1, 0.4, 0.6, 0.7, 0.8]
    lines = [{"step": step, "val_loss": value} for step, value in enumerate(values, 1)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saved(run, *range(1, 8), keep=2, keep_every_steps=4, keep_best="val_loss") == [7, 6, 4, 3]
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_a_broken_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    assert saved(RunDir(tmp_path / "run"), 1, 2, 3, 4, broken=[2, 3], keep=2) == [4, 1]


def test_a_checkpoint_that_is_newer_than_the_newest_whole_one_goes_with_the_next_save(tmp_path):
    run = RunDir(tmp_path / "run")
    saved(run, 10, 20, broken=[20])
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine)
    assert checkpoints.restore().step == 10
    checkpoints.save(15, {"samples_done": 15})
    assert [committed.step_of(tag) for tag in committed.tags(run)] == [15, 10]
