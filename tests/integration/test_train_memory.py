"""The planner's memory of a rank and checkpoint against real ranks, by ZeRO stage: tensors counted."""

import json
import os
from functools import partial
from typing import Any, NoReturn

import pytest
from rank_pool import start_ranks, wait_for

from mimscale.bench.peak import CASES, against_estimates, measure_cases, run_case
from mimscale.train.engine import join_ranks, leave_ranks
from mimscale.world import World, leave_at_once

pytestmark = pytest.mark.two_process
TOLERANCE = 0.10


def measure_and_leave(trees: list[dict[str, Any]], rank: int) -> NoReturn:
    """What each rank does: train these one after the other and end the process; rank 0 prints what it found."""
    ranks = join_ranks(World.from_environment(os.environ))
    measured = measure_cases(trees, ranks)
    if ranks.is_first:
        print(json.dumps(measured))
    leave_ranks()
    leave_at_once(0)


@pytest.mark.parametrize("size", CASES, ids=lambda size: f"{size} rank(s)")
def test_memory_of_a_rank_and_a_checkpoint_are_within_a_tenth_of_the_estimates_at_each_stage(size: int) -> None:
    trees = [tree for trees in CASES[size].values() for tree in trees]
    if size == 2:  # gradients of micro-batches, summed in fp32
        trees += [run_case(stage, precision="bf16", accumulate=2) for stage in (2, 3)]
    started = start_ranks([], size=size, plant=partial(measure_and_leave, trees))
    ended = wait_for(started, timeout_s=240)
    assert [rank.code for rank in ended] == [0] * size, ended[0].err
    misses = []
    for tree, measured in zip(trees, json.loads(ended[0].out.splitlines()[-1]), strict=True):
        for name, (estimate, found) in against_estimates(tree, size, measured).items():
            engine = tree["engine"]
            line = f"stage {engine['zero_stage']} {engine['precision']} {name}: {estimate / found:.3f}"
            if abs(estimate / found - 1) > TOLERANCE:
                misses.append(f"{line} of what was measured")
    assert misses == []
