"""A run that one rank's signal stops and the same command continues; what all ZeRO stages have in common.

Killed ranks, and every combination of settings: `tests/fault/test_train_killed.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from rank_pool import run_ranks
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words

from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory) -> dict[int, RunDir]:
    """Straight runs of 20 steps, one a ZeRO stage."""
    runs = {}
    for stage in STAGES:
        runs[stage] = RunDir(tmp_path_factory.mktemp(f"straight{stage}") / "run")
        ended = run_ranks(pretrain_words(store, runs[stage].path, f"engine.zero_stage={stage}"))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    return runs


def losses(run: RunDir) -> list[float]:
    lines = [line for line in run.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    return [line["loss"] for line in lines]


def sample_ids(run: RunDir) -> dict[tuple[int, int], list[int]]:
    found = {}
    for rank in range(2):
        for text in (run.samples / f"rank{rank:05d}.jsonl").read_text().splitlines():
            line = json.loads(text)
            assert found.setdefault((rank, line["step"]), line["sample_ids"]) == line["sample_ids"]
    return found


def saved_state(run: RunDir) -> dict[str, bytes]:
    """Every file of the last checkpoint's training state: weights, both AdamW moments, the number of updates."""
    tag = run.checkpoints / "step_00000020"
    return {path.name: path.read_bytes() for path in (*sorted(tag.glob("state-rank*")), tag / "state.json")}


def test_a_run_of_which_one_rank_is_signalled_stops_as_a_whole_and_goes_on_to_the_bits_of_a_straight_one(
    store, straight, tmp_path
):
    run = RunDir(tmp_path / "run")
    words = pretrain_words(store, run.path, "engine.zero_stage=2")
    stopped = run_ranks(words, signal_rank=1, signal_step=9)  # both must leave together, with nothing lost
    assert [rank.code for rank in stopped] == [75, 75], stopped[0].err + stopped[1].err
    outcome = run.read_outcome()
    assert (outcome.outcome, outcome.exit_code, outcome.step) == ("interrupted", 75, 10)
    assert (outcome.message, outcome.stopped_by) == ("stopped by request; the same command continues", "another rank")
    continued = run_ranks(words)
    assert [rank.code for rank in continued] == [0, 0], continued[0].err + continued[1].err
    assert "continues at step 10 of 20" in continued[0].err

    reference = straight[2]
    assert losses(run) == losses(reference)
    assert sample_ids(run) == sample_ids(reference)
    weights = [r.checkpoints / "step_00000020" / "weights.safetensors" for r in (run, reference)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert list(saved_state(run)) == ["state-rank00000.safetensors", "state-rank00001.safetensors", "state.json"]
    assert saved_state(run) == saved_state(reference)


def test_zero_1_2_and_3_give_the_losses_of_stage_0(straight):
    reference = torch.tensor(losses(straight[0]))
    assert reference[-1] < reference[0]
    for stage in (1, 2, 3):
        # The stages sum gradients and norms in another order: fp32 rounding over 20 steps, nothing more.
        torch.testing.assert_close(torch.tensor(losses(straight[stage])), reference, rtol=2e-5, atol=0)


def test_every_stage_reports_the_same_gradient_norms(straight):
    norms = [
        torch.tensor([line["grad_norm"] for line in straight[stage].read_metrics() if "loss" in line])
        for stage in STAGES
    ]
    assert norms[0].min() > 0
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-4, atol=0)


def test_stage_1_with_overlapping_buckets_and_one_micro_batch_gives_the_losses_of_stage_0(store, tmp_path):
    runs = [RunDir(tmp_path / f"stage{stage}") for stage in (0, 1)]
    for stage, run in enumerate(runs):
        ended = run_ranks(pretrain_words(store, run.path, f"engine.zero_stage={stage}", "micro_batch=4"))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for name in ("loss", "grad_norm"):
        values = [torch.tensor([line[name] for line in run.read_metrics() if "loss" in line]) for run in runs]
        torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=0)


def test_the_ranks_of_a_step_read_different_samples(straight):
    ids = sample_ids(straight[1])
    for step in range(1, 21):
        assert len(set(ids[0, step]) | set(ids[1, step])) == 8


def test_recomputed_activations_change_no_loss(store, straight, tmp_path):
    run = RunDir(tmp_path / "run")
    ended = run_ranks(pretrain_words(store, run.path, "engine.zero_stage=2", "model.checkpoint_activations=true"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert losses(run) == losses(straight[2])


def test_an_augmented_run_differs_from_a_plain_one(store, straight, tmp_path):
    augmented = (
        "augment={flip_prob: [0.5, 0.5, 0.5], affine_prob: 0.7, rotate_deg: [15, 10, 10], zoom: [0.8, 1.25], "
        "scale_prob: 0.5, shift_prob: 0.5, gamma_prob: 0.5, noise_prob: 0.5}"
    )
    run = RunDir(tmp_path / "run")
    ended = run_ranks(pretrain_words(store, run.path, augmented))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert not set(losses(run)) & set(losses(straight[1]))
