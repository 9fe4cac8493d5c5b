"""The most that ranks hold while they train, and what they save: what the planner's memory is checked against.

Bytes of tensors are counted as torch's allocator hands them out and takes them back. On a CPU the resident set also
holds libraries and what malloc keeps; the tensors are those that a GPU would hold.
"""

import gc
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mimscale.bench.memory import live_tensor_bytes
from mimscale.config import build_config
from mimscale.models.config import MaskConfig
from mimscale.models.masking import draw_masks
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig, accumulation
from mimscale.train.engine import Engine
from mimscale.train.losses import dice_cross_entropy
from mimscale.train.memory import estimate_memory
from mimscale.train.ranks import Ranks
from mimscale.train.size import BYTES_OF_FP32_WEIGHTS, checkpoint_bytes, count_parameters

MOST_MISS = 0.10  # of what is measured, asked of the estimates of memory and of a checkpoint
STEPS = 3


def run_case(
    stage: int,
    *,
    kind: str = "pretrain",
    micro_batch: int = 12,
    accumulate: int = 1,
    ranks: int = 2,
    precision: str = "auto",
    checkpoint_activations: bool = False,
) -> dict[str, Any]:
    """A small run at a ZeRO stage as plain values, with enough crops that activations decide its peak."""
    own = (
        {"mae": {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 4}}
        if kind == "pretrain"
        else {"unetr": {"num_classes": 3, "feature_size": 8}}
    )
    return {
        "kind": kind,
        "store": "none",
        "run_dir": "none",
        "steps": 10,
        "micro_batch": micro_batch,
        "global_batch": micro_batch * accumulate * ranks,
        "crop_voxels": [32, 32, 32],
        "patch_voxels": [8, 8, 8],
        "model": {"dim": 192, "depth": 6, "heads": 4, "checkpoint_activations": checkpoint_activations},
        "engine": {"zero_stage": stage, "bucket_elements": 200_000, "precision": precision},
        **own,
    }


# ranks -> what it is -> the runs
CASES: dict[int, dict[str, list[dict[str, Any]]]] = {
    2: {
        "MAE, fp32, two micro-batches": [run_case(stage, accumulate=2) for stage in (0, 1, 2, 3)],
        "MAE, bf16": [run_case(stage, precision="bf16") for stage in (1, 2, 3)],
        "MAE, fp32, activations computed again": [run_case(1, checkpoint_activations=True)],
        # Of two crops: for one, torch's convolution on a CPU takes a workspace that a GPU's does not.
        "UNETR, fp32": [run_case(1, kind="finetune", micro_batch=2)],
    },
    1: {"MAE, fp32": [run_case(stage, ranks=1) for stage in (0, 1, 2, 3)]},
}


def config_of(tree: dict[str, Any]) -> RunConfig:
    """The config of a case."""
    kind = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}[tree["kind"]]
    config: RunConfig = build_config(kind, tree, "case")
    return config


def against_estimates(tree: dict[str, Any], ranks: int, measured: dict[str, int]) -> dict[str, tuple[float, float]]:
    """`peak` of a rank and `checkpoint` of all: the planner's bytes, and those that `measure` found."""
    config = config_of(tree)
    bf16 = config.engine.precision == "bf16"
    memory = estimate_memory(config, ranks, bf16=bf16, accumulates=accumulation(config, ranks) > 1)
    exported = BYTES_OF_FP32_WEIGHTS * count_parameters(config)  # weights.safetensors, which no rank's engine writes
    return {
        "peak": (memory.peak, measured["peak"]),
        "checkpoint": (checkpoint_bytes(config), measured["saved"] + exported),
    }


def measure_cases(trees: Sequence[dict[str, Any]], ranks: Ranks) -> list[dict[str, int]]:
    """`measure` of runs one after the other. A collective."""
    gc.freeze()  # what imports left behind is many objects, and none of them is counted
    return [measure(config_of(tree), ranks) for tree in trees]


def measure(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """The most that this rank holds at one moment of a step, once the optimizer has its moments; and all ranks' files.

    That is what lives between two steps, plus the highest rise of the allocator during a step. The allocator's sum
    since the start would not do: it does not see what threads of the process group give back. A collective.
    """
    before = live_tensor_bytes(ranks.device)
    starts_ns = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step, engine = _ready(config, ranks)
        for number in range(STEPS):
            starts_ns.append(time.time_ns())
            step(number)
        starts_ns.append(time.time_ns())
    gc.collect()
    between = live_tensor_bytes(ranks.device) - before
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in watched.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = np.cumsum([size for _, size in events])
    bounds = np.searchsorted([at for at, _ in events], starts_ns)[1:]  # the first step makes the moments
    rises = [int(held[first:last].max() - held[first - 1]) for first, last in itertools.pairwise(bounds)]
    saved = _saved_bytes(engine, ranks)
    engine._deepspeed.destroy()  # else DeepSpeed keeps it for ever
    del step, engine
    gc.collect()
    return {"peak": between + min(rises), "saved": saved}


def _saved_bytes(engine: Engine, ranks: Ranks) -> int:
    """Of the files that all ranks' engines write."""
    folder = Path(ranks.first_does(lambda: tempfile.mkdtemp(prefix="checkpoint-")))
    part = engine.snapshot()
    part.write(folder)
    indices = ranks.gather(part.index())  # all have written
    if ranks.is_first:
        engine.write_index(folder, indices)
    saved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ranks.gather(None)
    ranks.first_does(lambda: shutil.rmtree(folder))
    return saved


def _ready(config: RunConfig, ranks: Ranks) -> tuple[Callable[[int], None], Engine]:
    shape = (config.micro_batch, 1, *config.crop_voxels)
    image, valid = torch.randn(shape), torch.ones(shape, dtype=torch.bool)
    if isinstance(config, PretrainConfig):
        engine = Engine(build_pretrain(config, 1), config, ranks)
        seeds = range(config.micro_batch)
        hidden = torch.from_numpy(draw_masks(seeds, config.crop_voxels, config.patch_voxels, MaskConfig()))

        def loss() -> Tensor:
            found: Tensor = engine(image, hidden, valid).loss
            return found
    else:
        assert isinstance(config, FinetuneConfig)
        engine = Engine(build_segmenter(config, 1), config, ranks)
        label = torch.zeros((config.micro_batch, *config.crop_voxels), dtype=torch.int64)

        def loss() -> Tensor:
            return dice_cross_entropy(engine(image), label)

    def step(number: int) -> None:
        engine.set_learning_rate(number)
        for _ in range(accumulation(config, ranks.world.size)):
            engine.backward(loss())
            engine.step()

    return step, engine
