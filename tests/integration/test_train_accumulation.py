"""Gradients of many micro-batches in bf16 lose no digits where they are summed."""

import os

import torch
from rank_pool import run_ranks

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.world import World

SMALL = [
    "crop_voxels=[16,16,16]",
    "micro_batch=2",
    "model={dim: 24, depth: 2, heads: 2, drop_path: 0.0}",
    "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}",
    "engine={precision: bf16, clip_grad_norm: 0, bucket_elements: 2000}",
]


def step_gradients(ranks, stage, micro_batches):
    """What AdamW is given after one step on a batch that comes again in each micro-batch."""
    from mimscale.train.engine import Engine

    words = [*SMALL, f"engine.zero_stage={stage}", f"global_batch={2 * micro_batches}"]
    config = bench_config(["demo/pretrain", *words], needs_store=False)
    torch.manual_seed(0)
    objective, seen = MaskedReconstruction(config), []
    engine = Engine(objective.build(1), config, ranks)
    batch = synthetic_batch(config, 1, ranks.device)

    def note(optimizer, *_):
        seen.extend(value.grad.clone() for group in optimizer.param_groups for value in group["params"])

    engine._deepspeed.optimizer.optimizer.register_step_pre_hook(note)
    for _ in range(micro_batches):
        engine.backward(objective.loss(engine, batch))
        engine.step()
    return torch.cat([gradient.flatten() for gradient in seen])


def compare(_words):
    """In a process of its own: a sixteenth of a gradient, summed 16 times, is the gradient, unless digits are lost."""
    from mimscale.train.engine import join_ranks, leave_ranks

    ranks = join_ranks(World.from_environment(os.environ))
    for stage in (1, 2, 3):
        once, often = (step_gradients(ranks, stage, count) for count in (1, 16))
        assert once.dtype == often.dtype == torch.float32
        assert once.count_nonzero() > 0.9 * once.numel()
        print(stage, torch.equal(once, often))
    leave_ranks()
    return 0


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32_at_stages_2_and_3_and_stage_1_says_that_it_does_not():
    (ended,) = run_ranks([], size=1, body=compare)
    assert ended.code == 0, ended.err
    assert ended.out.split() == ["1", "False", "2", "True", "3", "True"]
    (line,) = [line for line in ended.err.splitlines() if "micro-batches" in line]
    assert "16 micro-batches a step: engine.zero_stage=1 sums their gradients in bf16" in line
    assert "engine.zero_stage=2" in line
