"""Each encoder with its method through the whole machine: ZeRO stages, a stop and a restart, fine-tuning, scores."""

import json
import os
from pathlib import Path

import pytest
import torch
from rank_pool import run_ranks
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words, run_of

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.cli import main
from mimscale.world import World

pytestmark = pytest.mark.two_process
VIT = "model={dim: 24, depth: 2, heads: 2, positions: rope_learned, mlp: swiglu, layer_scale: 0.1, drop_path: 0.2}"
RESENC = "model={features: [4, 8, 8], blocks: [1, 2, 1], strides: [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}"
SWIN = "model={dim: 12, depths: [2, 1], heads: [2, 4], window: [2, 3, 3], drop_path: 0.2}"
SWIN_SHAPE = ("patch_voxels=[1, 2, 2]", "mask={ratio: 0.6, unit_voxels: [4, 8, 8]}")
PRETRAINING = {
    "primus": ("method=mae", VIT),
    "resenc": ("method=resenc_mae", RESENC, "resenc_mae={loss: l2}"),
    "swin": ("method=swin_simmim", SWIN, *SWIN_SHAPE),
}
HEADS = {"primus": "primus", "resenc": "resenc", "swin": "swin_unetr"}
STEPS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


def at_every_stage(_words):
    """In processes of their own: the losses of the first steps at each ZeRO stage."""
    from mimscale.train.engine import Engine, join_ranks, leave_ranks

    ranks = join_ranks(World.from_environment(os.environ))
    seen = {}
    for name, words in PRETRAINING.items():
        for stage in (0, 1, 2, 3):
            shape = ["crop_voxels=[16,24,32]", "patch_voxels=[4,8,8]", "global_batch=4", "micro_batch=2"]
            decoder = "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"
            more = [f"engine.zero_stage={stage}", "engine.bucket_elements=2000", "optim.warmup_steps=0"]
            words = [word.replace(", drop_path: 0.2", "") for word in words]  # its draws differ between ranks
            config = bench_config(["demo/pretrain", *shape, decoder, *words, *more], needs_store=False)
            torch.manual_seed(0)
            objective = config.network.objective(config)
            engine = Engine(objective.build(1), config, ranks)
            batch = synthetic_batch(config, 1, ranks.device)
            losses = []
            for step in range(STEPS):
                engine.set_learning_rate(step)
                loss = objective.loss(engine, batch)
                engine.backward(loss)
                engine.step()
                losses.append(float(loss.detach()))
            seen[f"{name} {stage}"] = losses
    if ranks.is_first:
        print(json.dumps(seen))
    leave_ranks()
    return 0


def test_every_zero_stage_takes_the_same_steps():
    ended = run_ranks([], body=at_every_stage)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    seen = {name: torch.tensor(losses) for name, losses in json.loads(ended[0].out.splitlines()[-1]).items()}
    for name in PRETRAINING:
        assert seen[f"{name} 0"][-1] < seen[f"{name} 0"][0]
        for stage in (1, 2, 3):  # sums in another order: fp32 rounding
            torch.testing.assert_close(seen[f"{name} {stage}"], seen[f"{name} 0"], rtol=1e-4, atol=0)


@pytest.fixture(scope="module", params=PRETRAINING)
def run(request, store, tmp_path_factory):
    """A straight run on two ranks at stage 2, and one that was stopped on the way."""
    runs = []
    for name in ("straight", "stopped"):
        words = pretrain_words(
            store, tmp_path_factory.mktemp(name) / "run", *PRETRAINING[request.param], "engine.zero_stage=2"
        )
        if name == "stopped":
            assert [rank.code for rank in run_ranks(words, signal_rank=1, signal_step=9)] == [75, 75]
        ended = run_ranks(words)
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        runs.append(run_of(words))
    return request.param, *runs


def test_a_stopped_run_goes_on_to_the_bits_of_a_straight_one(run):
    _, straight, stopped = run
    losses = [[line["loss"] for line in one.read_metrics() if "loss" in line] for one in (straight, stopped)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20
    files = [one.checkpoints / "step_00000020" / "weights.safetensors" for one in (straight, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_is_scored_and_fine_tuned_with_all_that_should_come_over(run, store, tmp_path, capsys):
    name, straight, _ = run
    assert main(["evaluate", f"run_dir={straight.path}", "crops=1", "pictures=1", "split=train"]) == 0
    words = [
        "finetune",
        "demo/finetune",
        f"store={store}",
        f"run_dir={tmp_path / 'finetune'}",
        f"init_from={straight.path}",
        f"head={HEADS[name]}",
        "unetr={num_classes: 3}",
        *(word for word in PRETRAINING[name] if word.startswith(("model=", "patch_voxels="))),
        "steps=2",
        "global_batch=4",
        "micro_batch=2",
        "crop_voxels=[16, 24, 32]",
        *(() if name == "swin" else ("patch_voxels=[4, 8, 8]",)),
        "stream={workers: 0, crops_per_volume: 2, fold: 0/8}",  # one volume is for validation and scores
        "meter={tensorboard: false}",
        "engine.zero_stage=1",
    ]
    ended = run_ranks(words)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert "missing" not in ended[0].err
    assert "loaded" in ended[0].err
    assert main(["evaluate", f"run_dir={tmp_path / 'finetune'}", "save_predictions=false", "pictures=0"]) == 0
    assert main(["report", str(straight.path), str(tmp_path / "finetune")]) == 0
    if name == "resenc":
        assert main(["export", str(straight.path), str(tmp_path / "nnunet"), "--to-nnunet"]) == 0
        card = (tmp_path / "nnunet" / "README.md").read_text()
        assert 'load_state_dict(load_file("weights.safetensors"), strict=False)' in card
