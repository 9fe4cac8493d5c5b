"""A step gives its device work and does not wait for it, unless bad updates are to be left out.

Watched on a CPU, where the operations are the same.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from rank_pool import run_ranks
from syncs import SyncWatch, waiting_events

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.config import load_config, split_arguments
from mimscale.stream.device import to_device
from mimscale.train.config import FinetuneConfig, PretrainConfig
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.world import World

FIRST_STEPS = 3  # ZeRO-3 compares the order of its parameters between the ranks in the first two
CASES = [(0, "fp32"), *((stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]


def config_of(*words):
    small = ["crop_voxels=[16,16,16]", "global_batch=2", "model={dim: 48, depth: 2, heads: 4, drop_path: 0.1}"]
    decoder = "mae={decoder_dim: 48, decoder_depth: 1, decoder_heads: 4}"
    return bench_config(["demo/pretrain", "health.max_skipped=0", *small, decoder, *words], needs_store=False)


def run_config(words):
    """Of pretraining or fine-tuning, by its recipe's name."""
    kind = FinetuneConfig if words[0].startswith("finetune") else PretrainConfig
    (recipe,), overrides = split_arguments([*words, "store=none", "run_dir=none"])
    return load_config(kind, recipe, overrides)


def watch_steps(_words):
    """In a process of its own: what waits in a step of each case, and the step's gradient norm."""
    from mimscale.train.engine import Engine, join_ranks, leave_ranks

    ranks = join_ranks(World.from_environment(os.environ))
    seen = []
    for stage, precision in CASES:
        config = config_of(f"engine.zero_stage={stage}", f"engine.precision={precision}")
        objective = MaskedReconstruction(config)
        engine = Engine(objective.build(1), config, ranks)
        batch = synthetic_batch(config, 1, ranks.device)

        def step(engine=engine, objective=objective, batch=batch):
            engine.set_learning_rate(0)
            engine.seed_micro_batch(0, 0)
            loss = objective.loss(engine, batch)
            engine.backward(loss)
            engine.step()
            return ranks.sum({"loss": loss.detach().double(), "grad_norm": engine.grad_norm(), "step_s": 1.0})

        for _ in range(FIRST_STEPS):
            step().wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        profiled = waiting_events(profile)
        with SyncWatch() as watch:
            sums = step()
        seen.append((watch.places, profiled, sums.wait()["grad_norm"]))
    print(json.dumps(seen))
    leave_ranks()
    return 0


@pytest.fixture(scope="module")
def seen():
    (ended,) = run_ranks([], size=1, body=watch_steps)
    assert ended.code == 0, ended.err
    return dict(zip(CASES, json.loads(ended.out.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_no_stage_makes_the_host_wait(stage, precision, seen):
    places, profiled, grad_norm = seen[stage, precision]
    assert places == []
    assert profiled == []
    assert grad_norm > 0


CROP = ["crop_voxels=[16,32,32]", "patch_voxels=[4,8,8]"]
VIT = [*CROP, "model={dim: 48, depth: 2, heads: 4, drop_path: 0.1}"]
RESENC = [*CROP, "model={features: [4, 8, 8], blocks: [1, 2, 1], strides: [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}"]
SWIN = [*CROP[:1], "patch_voxels=[1,2,2]", "model={dim: 12, depths: [2, 2], heads: [2, 4], window: [2, 3, 3]}"]
WARPED = (
    "augment={flip_prob: [0.5, 0.5, 0.5], affine_prob: 1.0, rotate_deg: [9, 9, 9], scale_prob: 1.0, gamma_prob: 1.0}"
)
DECODER = "mae={decoder_dim: 48, decoder_depth: 2, decoder_heads: 4}"
NETWORKS = {
    "mae": ["demo/pretrain", *VIT, DECODER],
    "mae, less work": ["demo/pretrain", *VIT, DECODER, "mask={predicted_share: 0.5, repeats: 2}"],
    "simmim": ["pretrain_simmim_vit_b", *VIT],
    "simclr": ["pretrain_simclr_vit_b", *VIT],
    "resenc_mae": ["pretrain_mae_resenc_l", *RESENC],
    "swin_simmim": ["pretrain_simmim_swin_b", *SWIN, "mask={ratio: 0.6, unit_voxels: [4, 8, 8]}"],
    "unetr": ["finetune_unetr", *VIT, "patch_voxels=[8,8,8]"],
    "primus": ["finetune_primus", *VIT, "patch_voxels=[8,8,8]"],
    "linear": ["finetune_linear_probe", *VIT, "model.drop_path=0"],
    "resenc": ["finetune_resenc", *RESENC, "resenc={deep_supervision: true}"],
    "swin_unetr": ["finetune_swin_unetr", *SWIN],
    "swin_upernet": ["finetune_swin_unetr", "head=swin_upernet", "swin_upernet={width: 8}", *SWIN],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_augmentation_loss_and_gradients_of_every_network_wait_for_no_copy(name):
    # A device that computes shapes alone: a value that had to come back would raise, a copy is seen.
    config = run_config([*NETWORKS[name], WARPED, "micro_batch=2", "global_batch=2"])
    objective, device = config.network.objective(config), torch.device("meta")
    model = objective.build(1).to(device)
    batch = synthetic_batch(config, 1, device)
    if config.kind == "finetune":
        batch = replace(batch, label=torch.zeros(2, *config.crop_voxels, dtype=torch.uint8, device=device))
    with SyncWatch(host_works=True) as watch:
        loss = objective.loss(model, batch)
        loss.backward()
    assert loss.device == device
    assert watch.places == []
    assert watch.copies == {"device.py:to_device"}  # which has the memory page-locked


def test_what_the_host_made_goes_to_a_gpu_from_page_locked_memory(monkeypatch):
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor) or tensor)
    indices = torch.arange(3)
    assert to_device(indices, torch.device("meta")).is_meta
    assert locked == []
    with pytest.raises((RuntimeError, AssertionError)):  # there is none here
        to_device(indices, torch.device("cuda", 0))
    assert len(locked) == 1


def test_the_watch_sees_what_waits():
    values = torch.tensor([1.0, 0.0])
    with SyncWatch() as watch:
        values.sum().item()
        values.nonzero()
    assert [name for name, _ in watch.places] == ["_local_scalar_dense", "nonzero"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        values[values > 0].sum().item()
    assert {name for name, _ in waiting_events(profile)} == {"_local_scalar_dense", "item", "nonzero"}
    assert all(place.endswith("test_the_watch_sees_what_waits") for _, place in watch.places)
    with pytest.raises(NotImplementedError), SyncWatch() as watch:
        torch.ones(2, device="meta").cpu()
    assert [name for name, _ in watch.places] == ["_to_copy"]
    with SyncWatch(host_works=True) as watch:
        values.to("meta")
        values.to("meta", non_blocking=True)
        values.sum().item()
    assert [name for name, _ in watch.places] == ["_to_copy"]
    assert watch.copies == {"test_train_step_never_waits.py:test_the_watch_sees_what_waits"}
