"""A step gives its device work and does not wait for it, unless bad updates are to be left out.

Watched on a CPU, where the operations are the same.
"""

import json
import os

import pytest
import torch
from rank_pool import run_ranks
from syncs import SyncWatch

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.world import World

FIRST_STEPS = 3  # ZeRO-3 compares the order of its parameters between the ranks in the first two
CASES = [(0, "fp32"), *((stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]


def config_of(*words):
    small = ["crop_voxels=[16,16,16]", "global_batch=2", "model={dim: 48, depth: 2, heads: 4, drop_path: 0.1}"]
    decoder = "mae={decoder_dim: 48, decoder_depth: 1, decoder_heads: 4}"
    return bench_config(["demo/pretrain", "health.max_skipped=0", *small, decoder, *words], needs_store=False)


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
        with SyncWatch() as watch:
            sums = step()
        seen.append((watch.places, sums.wait()["grad_norm"]))
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
    places, grad_norm = seen[stage, precision]
    assert places == []
    assert grad_norm > 0


def test_augmentation_loss_and_gradients_bring_nothing_back_from_the_device():
    # A device that computes shapes alone: a value that had to come back would raise, a copy would be seen.
    config = config_of("augment={flip_prob: [0.5, 0.5, 0.5], scale_prob: 1.0, shift_prob: 1.0}")
    objective, device = MaskedReconstruction(config), torch.device("meta")
    model = objective.build(1).to(device)
    batch = synthetic_batch(config, 1, device)
    with SyncWatch() as watch:
        loss = objective.loss(model, batch)
        loss.backward()
    assert loss.device == device
    assert watch.places == []


def test_the_watch_sees_what_waits():
    values = torch.tensor([1.0, 0.0])
    with SyncWatch() as watch:
        values.sum().item()
        values.nonzero()
    assert [name for name, _ in watch.places] == ["_local_scalar_dense", "nonzero"]
    assert all(place.endswith("test_the_watch_sees_what_waits") for _, place in watch.places)
    with pytest.raises(NotImplementedError), SyncWatch() as watch:
        torch.ones(2, device="meta").cpu()
    assert [name for name, _ in watch.places] == ["_to_copy"]
