"""An update whose gradient is not finite on one of two ranks leaves no trace, at any stage, precision, accumulation."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from rank_pool import run_ranks

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.train.state import KINDS
from mimscale.train.zero import adam_steps, set_adam_steps, spread_weights
from mimscale.world import World

pytestmark = pytest.mark.two_process

SMALL = ["crop_voxels=[16,16,16]", "micro_batch=2", "model={dim: 24, depth: 2, heads: 2, drop_path: 0.1}"]
DECODER = "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"
KINDS_OF_RUN = [(0, "fp32"), *((stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]
# Micro-batches a step, and the norm that gradients are clipped to: 0 is not at all.
CASES = [(*kind, count, 1.0) for kind in KINDS_OF_RUN for count in (1, 2)] + [(1, "bf16", 1, 0.0), (3, "fp32", 2, 0.0)]


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a case."""

    norms: list[float]  # of the first step, of a bad one, and of the step after it
    first: bool  # whether a bad step before all others changed nothing
    later: bool  # whether one between others did not
    goes_on: bool  # whether the step after it gave the bits that it gives without it
    updates: list[int]  # that the optimizer counts: after a bad first step, a good one, a bad one, and a good one
    weights: str  # hash of what this rank computes with at the end; of its share under ZeRO-3


class Rank:
    """One rank with an engine of its own, and a batch that no other has."""

    def __init__(self, ranks, stage, precision, accumulation, clip):
        from mimscale.train.engine import Engine

        words = [f"global_batch={2 * 2 * accumulation}", "engine.bucket_elements=2000", f"engine.zero_stage={stage}"]
        words += [f"engine.precision={precision}", f"engine.clip_grad_norm={clip}"]
        config = bench_config(["demo/pretrain", *SMALL, DECODER, *words], needs_store=False)
        self.objective, self.ranks, self.accumulation = MaskedReconstruction(config), ranks, accumulation
        torch.manual_seed(config.seed)
        self.engine = Engine(self.objective.build(1), config, ranks)
        self.batch = synthetic_batch(replace(config, seed=ranks.world.rank), 1, ranks.device)

    def step(self, number, *, bad=False):
        """The norm of one step; where it is bad, the first loss of rank 1 is infinite."""
        self.engine.set_learning_rate(number)
        for index in range(self.accumulation):
            self.engine.seed_micro_batch(number, index)
            loss = self.objective.loss(self.engine, self.batch)
            if bad and index == 0 and self.ranks.world.rank == 1:
                loss = loss + float("inf")
            self.engine.backward(loss)
            self.engine.step()
        return float(self.engine.grad_norm())

    def computed_with(self):
        return [
            getattr(parameter, "ds_tensor", parameter).detach().clone() for parameter in self.engine.module.parameters()
        ]

    def state(self):
        held = [piece.tensors[kind].clone() for piece in self.engine.pieces() for kind in KINDS]
        return [*held, *self.computed_with(), *self.engine.full_weights().values()]

    def updates(self):
        return adam_steps(self.engine._deepspeed, self.engine.zero_stage)

    def take_back(self, state, updates):
        """Go back to an earlier state, as a rollback does."""
        values = iter(state)
        for piece in self.engine.pieces():
            for kind in KINDS:
                piece.tensors[kind].copy_(next(values))
        set_adam_steps(self.engine._deepspeed, self.engine.zero_stage, updates)
        spread_weights(self.engine._deepspeed, self.engine.zero_stage)


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def left_out(rank):
    weights = rank.computed_with()
    first_norm = rank.step(0, bad=True)  # before the optimizer has any moments
    first = equal(weights, rank.computed_with()) and all(
        not piece.tensors[kind].any() for piece in rank.engine.pieces() for kind in KINDS[1:]
    )
    updates = [rank.updates()]
    rank.step(1)
    updates.append(rank.updates())
    before = rank.state()
    rank.step(2)
    expected = rank.state()
    rank.take_back(before, 1)
    bad_norm = rank.step(2, bad=True)
    later = equal(before, rank.state())
    updates.append(rank.updates())
    good_norm = rank.step(2)
    after = rank.state()
    updates.append(rank.updates())
    last = b"".join(tensor.float().numpy().tobytes() for tensor in rank.computed_with())
    return Seen(
        norms=[first_norm, bad_norm, good_norm],
        first=first,
        later=later,
        goes_on=equal(expected, after) and not equal(before, after),
        updates=updates,
        weights=hashlib.sha256(last).hexdigest(),
    )


def leave_out_in_all_cases(_words):
    """In a process of each rank."""
    from mimscale.train.engine import join_ranks, leave_ranks

    ranks = join_ranks(World.from_environment(os.environ))
    print(json.dumps([asdict(left_out(Rank(ranks, *case))) for case in CASES]))
    leave_ranks()
    return 0


@pytest.fixture(scope="module")
def seen():
    ended = run_ranks([], body=leave_out_in_all_cases)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    told = [[Seen(**case) for case in json.loads(rank.out.splitlines()[-1])] for rank in ended]
    return dict(zip(CASES, zip(*told, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_is_not_finite_on_one_rank_changes_no_bit_on_any_and_the_next_one_goes_on(case, seen):
    for rank in seen[case]:
        *bad, good = (torch.tensor(rank.norms).isfinite()).tolist()
        assert (bad, good) == ([False, False], True)
        assert rank.first
        assert rank.later
        assert rank.goes_on
        assert rank.updates == [0, 1, 1, 2]
    stage = case[0]
    if stage < 3:
        assert seen[case][0].weights == seen[case][1].weights
