"""The planner's memory of a rank and checkpoint against real ranks, by ZeRO stage: tensors counted, not resident sets.

On a CPU the resident set also holds libraries and what malloc keeps; the tensors are those that a GPU would hold.
"""

import json
from functools import partial
from typing import Any

import memory_of_ranks
import pytest
from rank_pool import start_ranks, wait_for

from mimscale.config import build_config
from mimscale.train.config import FinetuneConfig, PretrainConfig, accumulation
from mimscale.train.memory import estimate_memory
from mimscale.train.size import BYTES_OF_FP32_WEIGHTS, checkpoint_bytes, count_parameters

pytestmark = pytest.mark.two_process
TOLERANCE = 0.10


def _case(stage: int, *, accumulate: int = 1, ranks: int = 2, **more: Any) -> dict[str, Any]:
    # Enough crops that activations decide the peak, as in a real run.
    more = {"micro_batch": 12, "kind": "pretrain"} | more
    own = (
        {"mae": {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 4}}
        if more["kind"] == "pretrain"
        else {"unetr": {"num_classes": 3, "feature_size": 8}}
    )
    engine = {"zero_stage": stage, "bucket_elements": 200_000} | more.pop("engine", {})
    model = {"dim": 192, "depth": 6, "heads": 4} | more.pop("model", {})
    return {
        "store": "none",
        "run_dir": "none",
        "steps": 10,
        "global_batch": more["micro_batch"] * accumulate * ranks,
        "crop_voxels": [32, 32, 32],
        "patch_voxels": [8, 8, 8],
        "model": model,
        "engine": engine,
        **own,
        **more,
    }


ON_TWO = [
    *(_case(stage, accumulate=2) for stage in (0, 1, 2, 3)),
    *(_case(stage, engine={"precision": "bf16"}) for stage in (1, 2, 3)),
    _case(1, model={"checkpoint_activations": True}),
    # Of two crops: for one, torch's convolution on a CPU takes a workspace that a GPU's does not.
    _case(1, kind="finetune", micro_batch=2),
]
ON_ONE = [_case(stage, ranks=1) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(("cases", "size"), [(ON_TWO, 2), (ON_ONE, 1)], ids=["two ranks", "one rank"])
def test_memory_of_a_rank_and_a_checkpoint_are_within_a_tenth_of_the_estimates_at_each_stage(
    cases: list[dict[str, Any]], size: int
) -> None:
    started = start_ranks([], size=size, plant=partial(memory_of_ranks.train_and_leave, cases))
    ended = wait_for(started, timeout_s=240)
    assert [rank.code for rank in ended] == [0] * size, ended[0].err
    misses = []
    for tree, measured in zip(cases, json.loads(ended[0].out.splitlines()[-1]), strict=True):
        config = build_config({"pretrain": PretrainConfig, "finetune": FinetuneConfig}[tree["kind"]], tree, "test")
        bf16 = config.engine.precision == "bf16"
        memory = estimate_memory(config, size, bf16=bf16, accumulates=accumulation(config, size) > 1)
        exported = BYTES_OF_FP32_WEIGHTS * count_parameters(
            config
        )  # weights.safetensors, which no rank's engine writes
        ratios = {
            "memory": memory.peak / measured["peak"],
            "checkpoint": checkpoint_bytes(config) / (measured["saved"] + exported),
        }
        for name, ratio in ratios.items():
            line = (
                f"stage {config.engine.zero_stage} {config.engine.precision} {name}: {ratio:.3f} of what was measured"
            )
            print(line)
            if abs(ratio - 1) > TOLERANCE:
                misses.append(line)
    assert misses == []
