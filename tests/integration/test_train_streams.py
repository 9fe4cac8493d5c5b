"""Streams of a GPU wait for one another where DeepSpeed would have the host wait, and the order stays the same.

Watched on a CPU that says of itself, where a backward pass and a step end, what a GPU says.
"""

import json
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from rank_pool import run_ranks

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.world import World

pytestmark = pytest.mark.two_process
SMALL = [
    "crop_voxels=[16,16,16]",
    "global_batch=4",
    "micro_batch=2",
    "model={dim: 24, depth: 2, heads: 2, drop_path: 0.1}",
    "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}",
    "engine.bucket_elements=2000",
]
KINDS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@dataclass(eq=False)
class Stream:
    """Notes who waits for whom."""

    name: str
    seen: list

    def wait_stream(self, other):
        self.seen.append((self.name, other.name))

    def synchronize(self):
        self.seen.append(("host", self.name))


class Watched:
    """A stage's optimizer, which takes the machine for a GPU where a backward pass or a step ends."""

    def __init__(self, optimizer, accelerator):
        self.seen, self.accelerator = [], accelerator
        self.main, reductions, gathers = (Stream(name, self.seen) for name in ("main", "reductions", "gathers"))
        optimizer.reduction_stream = optimizer.reduce_and_partition_stream = reductions
        if hasattr(optimizer, "parameter_offload"):
            optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream = gathers
        for end in ("independent_gradient_partition_epilogue", "_post_step"):
            if hasattr(optimizer, end):
                setattr(optimizer, end, self._as_on_a_gpu(getattr(optimizer, end)))

    def _as_on_a_gpu(self, end):
        def watched(*args):
            with self._gpu():
                end(*args)

        return watched

    @contextmanager
    def _gpu(self):
        said = {
            "resolves_data_dependency": lambda: False,
            "synchronize": lambda: self.seen.append(("host", "device")),
            "current_stream": lambda: self.main,
        }
        with ExitStack() as stack:
            for name, answer in said.items():
                stack.enter_context(mock.patch.object(self.accelerator, name, answer))
            stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
            yield


def watch_ends(_words):
    """In a process of its own: who waits for whom in one step of each kind of run."""
    from deepspeed.accelerator import get_accelerator

    from mimscale.train.engine import Engine, join_ranks, leave_ranks

    ranks = join_ranks(World.from_environment(os.environ))
    seen = []
    for stage, precision in KINDS:
        words = [*SMALL, f"engine.zero_stage={stage}", f"engine.precision={precision}"]
        config = bench_config(["demo/pretrain", *words], needs_store=False)
        objective = MaskedReconstruction(config)
        engine = Engine(objective.build(1), config, ranks)
        watched = Watched(engine._deepspeed.optimizer, get_accelerator())
        engine.backward(objective.loss(engine, synthetic_batch(config, 1, ranks.device)))
        engine.step()
        seen.append(watched.seen)
    print(json.dumps(seen))
    leave_ranks()
    return 0


@pytest.fixture(scope="module")
def seen():
    ended = run_ranks([], size=2, body=watch_ends)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    return [[tuple(pair) for pair in case] for case in json.loads(ended[0].out.splitlines()[-1])]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_for_nothing_where_a_backward_pass_or_a_step_ends(kind, seen):
    case = seen[KINDS.index(kind)]
    assert [pair for pair in case if pair[0] == "host"] == []
    if kind[0] == 3:
        assert case == [("main", "reductions"), ("gathers", "main")]
    else:
        # The last bucket is reduced behind the gradients that fill it, and the step comes behind that.
        assert case == [("reductions", "main"), ("main", "reductions"), ("main", "reductions")]
