"""One rank of two goes wrong: what both do, what they say, and how long it takes."""

import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import planted_faults
import pytest
import torch
from rank_pool import run_ranks
from safetensors.torch import load_file
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words

from mimscale.store.manifest import write_manifest
from mimscale.train import committed
from mimscale.train.health_log import HealthLog
from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process

# Of a wait: the start of two ranks on a busy machine.
START_S = 100


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    bare = write_store(folder, SHAPES)
    rows = [replace(bare.row(number), split="val" if number == 7 else "train") for number in range(len(SHAPES))]
    write_manifest(folder, rows)
    return folder


def optimizer_state(run: RunDir, step: int) -> list[torch.Tensor]:
    """Every tensor of the training state, on all ranks."""
    files = sorted((run.checkpoints / committed.tag_name(step)).glob("state-rank*.safetensors"))
    return [tensor for file in files for tensor in load_file(file).values()]


@pytest.mark.parametrize(
    ("stage", "precision", "fault"),
    [
        (0, "fp32", planted_faults.infinite_loss),
        (1, "bf16", planted_faults.infinite_loss),
        (2, "fp32", planted_faults.nan_voxel),
        (3, "fp32", planted_faults.infinite_loss),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_neither_weights_nor_optimizer_on_any(
    stage, precision, fault, store, tmp_path
):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "steps=4", "checkpoint={every_steps: 1, keep: 9}")
    words += [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    ended = run_ranks(words, plant=partial(fault, 1, 2))  # the global batch of step 3, on rank 1
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    weights = {
        step: load_file(run.checkpoints / committed.tag_name(step) / "weights.safetensors") for step in (2, 3, 4)
    }
    assert all(torch.equal(weights[2][name], weights[3][name]) for name in weights[2])
    assert not any(
        torch.equal(weights[3][name], weights[4][name]) for name in weights[2] if name.endswith("qkv.weight")
    )
    assert all(value.isfinite().all() for value in weights[4].values())
    states = {step: optimizer_state(run, step) for step in (2, 3, 4)}
    assert len(states[2]) > 2
    assert all(map(torch.equal, states[2], states[3]))
    assert not all(map(torch.equal, states[3], states[4]))

    (event,) = HealthLog(run.health).read()
    assert (event["step"], event["event"]) == (3, "skipped")
    assert "\n  rank 1 on " in event["message"]
    assert "rank 0 on " not in event["message"]
    (folder,) = run.diagnostics.iterdir()
    assert folder.name == "step_00000003-rank00001"
    facts = json.loads((folder / "facts.json").read_text())
    batches = facts["micro_batches"]
    assert [batch["batch_index"] for batch in batches] == [2, 2]
    assert set(batches[0]["volume_ids"]) <= set(event["volume_ids"])
    assert load_file(folder / "batch-0.safetensors")["volume"].shape == (2, 1, 16, 24, 32)
    recorded = [json.loads(line) for line in (run.samples / "rank00001.jsonl").read_text().splitlines()]
    assert [number for batch in batches for number in batch["sample_ids"]] == recorded[2]["sample_ids"]
    metrics = run.read_metrics()
    lines = [line for line in metrics if "lr" in line]
    (validation,) = [line for line in metrics if "val_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["loss" in line for line in lines] == [True, True, False, True]
    assert all("loss_vs_mean_voxel" in line for line in lines if "loss" in line)
    for name in ("val_loss", "val_loss_vs_mean_voxel", "val_loss_vs_interpolated"):
        assert {name, f"{name}/ct", f"{name}/foreground"} <= validation.keys()
        assert validation[f"{name}/ct"] == pytest.approx(validation[name]), "all crops are of one modality"
    assert 1 < validation["val_feature_rank"] <= 24


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (2, 2), (3, 2)])
def test_a_rollback_brings_back_weights_and_optimizer_and_training_goes_on(stage, size, store, tmp_path):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "steps=6", "checkpoint={every_steps: 1, keep: 9}")
    words += [f"engine.zero_stage={stage}", "health={on_spike: rollback, spike_window: 4, spike_steps: 1}"]
    ended = run_ranks(words, size=size, plant=partial(planted_faults.large_loss, 0, 4))
    assert [rank.code for rank in ended] == [0] * size, ended[0].err
    spike, back = HealthLog(run.health).read()
    assert (spike["event"], spike["step"]) == ("spike", 5)
    # A save reads the loss of its step first, so what a spike has done is never saved.
    assert (back["event"], back["step"], back["to_step"], back["steps_undone"]) == ("rolled_back", 5, 4, 1)
    weights = {
        step: load_file(run.checkpoints / committed.tag_name(step) / "weights.safetensors") for step in (4, 5, 6)
    }
    assert all(torch.equal(weights[4][name], weights[5][name]) for name in weights[4])
    assert not all(torch.equal(weights[5][name], weights[6][name]) for name in weights[4])
    assert all(map(torch.equal, optimizer_state(run, 4), optimizer_state(run, 5)))
    assert not all(map(torch.equal, optimizer_state(run, 5), optimizer_state(run, 6)))
    assert [line["step"] for line in run.read_metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("most", "stage"), [(0, 1), (1, 2)])
def test_one_step_too_many_that_is_not_finite_ends_all_ranks_with_exit_code_3(most, stage, store, tmp_path):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "steps=6", f"health.max_skipped={most}", f"engine.zero_stage={stage}")

    ended = run_ranks(words, plant=partial(nan_voxels, range(1, 2 + most)))
    assert [rank.code for rank in ended] == [3, 3]
    for rank in ended:
        assert f"step {2 + most}: the loss or its gradient (norm inf) is not finite" in rank.err
        assert "rank 1 on " in rank.err
        assert f"These were {most + 1} such steps, more than health.max_skipped={most}" in rank.err
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 3)
    assert not committed.tags(run)
    assert [line["event"] for line in HealthLog(run.health).read()] == ["skipped"] * most + ["stopped"]


def nan_voxels(batches, rank):
    """On rank 1, in several global batches."""
    for batch_index in batches:
        planted_faults.nan_voxel(1, batch_index, rank)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_run_that_is_stopped_between_updates_that_are_left_out_ends_as_one_that_is_not(
    stage, precision, store, tmp_path
):
    plant = partial(nan_voxels, [1, 2, 4])
    runs = [RunDir(tmp_path / name) for name in ("straight", "stopped")]
    for run in runs:
        words = pretrain_words(store, run.path, "steps=6", f"engine.zero_stage={stage}")
        words += [f"engine.precision={precision}", "validation.every_steps=0"]
        if run is runs[1]:
            # The stop is seen in step 3, which is bad itself and whose norm is read for the save.
            first = run_ranks(words, plant=plant, signal_rank=0, signal_step=2)
            assert [rank.code for rank in first] == [75, 75], first[0].err
            assert committed.step_of(committed.newest(run)) == 3
        ended = run_ranks(words, plant=plant)
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
    straight, stopped = (optimizer_state(run, 6) for run in runs)
    assert len(straight) == len(stopped) > 2
    assert all(map(torch.equal, straight, stopped))
    told = [
        [(line["step"], line.get("loss"), line.get("skipped_steps")) for line in run.read_metrics() if "lr" in line]
        for run in runs
    ]
    assert told[0] == told[1]
    assert [(step, count) for step, _, count in told[0] if count is not None] == [(2, 1.0), (3, 2.0), (5, 3.0)]
    assert [[line["step"] for line in HealthLog(run.health).read()] for run in runs] == [[2, 3, 5]] * 2
    costs = [line for line in runs[1].read_metrics() if "wall_s" in line]
    assert [line["step"] for line in costs] == [3, 3, 6, 6], "each save and each end"
    assert costs[1]["wall_s"] < costs[2]["wall_s"], "the second job goes on from the time of the first"
    assert all(line["peak_memory_bytes"] > 1e8 for line in costs)


def test_a_rank_that_hangs_ends_all_ranks_with_their_stacks_and_exit_code_6(store, tmp_path):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "health.hang_timeout_s=5")
    start = time.monotonic()
    ended = run_ranks(words, plant=partial(planted_faults.hang_in_step, 1, 2))
    assert time.monotonic() - start < START_S
    assert [rank.code for rank in ended] == [6, 6]
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 6)
    assert "step 3 was not done within 5 s (health.hang_timeout_s); rank 1 on " in outcome.message
    assert "in tests/fault_injector.py:" in outcome.message
    stacks = [(run.logs / f"stacks-rank{rank:05d}.txt").read_text() for rank in range(2)]
    assert "fault_injector.py" in stacks[1]
    assert "fault_injector.py" not in stacks[0]
    assert "mimscale/train/loop.py" in stacks[0]


def test_a_rank_that_hangs_in_c_with_the_interpreter_lock_does_not_keep_the_job_alive(store, tmp_path):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "health.hang_timeout_s=4")
    start = time.monotonic()
    ended = run_ranks(words, plant=partial(planted_faults.hang_with_the_interpreter_lock, 1, 2, 4.0))
    assert time.monotonic() - start < START_S
    assert [rank.code for rank in ended] == [6, 6]  # its own threads cannot run any more, timers end it
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 6)
    assert "rank 1 did not answer" in outcome.message
    assert "planted_faults.py" in (run.logs / "stacks-rank00001.txt").read_text()


def test_a_loader_that_hangs_on_one_rank_ends_both_and_names_its_worker(store, tmp_path):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "stream.timeout_s=4")
    start = time.monotonic()
    ended = run_ranks(words, plant=partial(planted_faults.hang_in_loader_worker, 1, 3))
    assert time.monotonic() - start < START_S
    assert [rank.code for rank in ended] == [6, 6]
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 6)
    assert re.match(r"loader worker 0 of rank 1 on \S+ \(pid \d+\) has delivered nothing", outcome.message)
    assert "stream.timeout_s=4" in outcome.message
    assert outcome.message in ended[1].err
    assert "another rank is gone or hangs" in ended[0].err


@pytest.mark.parametrize(("mode", "disk"), [("background", "checkpoints"), ("sync", "checkpoints"), ("sync", "")])
def test_a_rank_whose_disk_hangs_in_a_save_ends_both_and_the_checkpoint_before_stays(
    mode, disk, store, tmp_path, survived
):
    run = RunDir(tmp_path / "run")
    # In the background mode steps go on, and no later save is due: nobody would ever wait for the write.
    words = pretrain_words(store, run.path, "steps=100000", f"checkpoint={{every_steps: 1000, mode: {mode}}}")
    words += ["health.hang_timeout_s=5", "validation.every_steps=0"]
    stopped = run_ranks(words, signal_rank=0, signal_step=1)
    assert [rank.code for rank in stopped] == [75, 75], stopped[0].err
    (good,) = committed.tags(run)
    last = committed.step_of(good) + 2
    words.append(f"checkpoint.every_steps={last}")
    tag = run.checkpoints / f".tmp-{committed.tag_name(last)}"
    start = time.monotonic()
    ended = run_ranks(words, plant=partial(planted_faults.hang_in_write, 1, tag, run.path / disk, 2.0))
    assert time.monotonic() - start < START_S
    assert [rank.code for rank in ended] == [6, 6], ended[0].err
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code) == ("failed", 6)
    if disk == "":  # rank 1 cannot write down where it stands: timers write its stacks and end it
        assert "rank 1 did not answer" in outcome.message
    else:
        assert re.search(r"rank 1 on \S+ stood at models/tensor_file\.py:\d+ write", outcome.message)
        assert "was not written within 5 s (health.hang_timeout_s)" in ended[1].err
    if mode == "background":
        assert f"{committed.tag_name(last)} was not written within 5 s" in outcome.message
        assert max(line["step"] for line in run.read_metrics()) > last + 1, "training stood still for the write"
    assert "in write" in (run.logs / "stacks-rank00001.txt").read_text()
    assert committed.newest(run) == good
    survived["disk of a rank that hangs in a save"] += 1
