"""The bytes of tensors that ranks hold while they train: what torch's allocator hands out and takes back, in order."""

import gc
import itertools
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from mimscale.config import build_config
from mimscale.models.config import MaskConfig
from mimscale.models.masking import draw_masks
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig, accumulation
from mimscale.train.engine import Engine, join_ranks, leave_ranks
from mimscale.train.losses import dice_cross_entropy
from mimscale.train.ranks import Ranks
from mimscale.world import World, leave_at_once

STEPS = 3


def train_and_leave(trees: Sequence[dict[str, Any]], rank: int) -> NoReturn:
    """Train these configs one after the other and end the process; rank 0 prints peak and checkpoint of each."""
    ranks = join_ranks(World.from_environment(os.environ))
    gc.freeze()  # what imports left behind is many objects, and none of them is counted
    measured = []
    for tree in trees:
        kind = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}[tree["kind"]]
        measured.append(measure(build_config(kind, tree, "test"), ranks))
    if ranks.is_first:
        print(json.dumps(measured))
    leave_ranks()
    leave_at_once(0)


def measure(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """The most that this rank holds at one moment of a step, once the optimizer has its moments; and all ranks' files.

    That is what lives between two steps, plus the highest rise of the allocator during a step. The allocator's sum
    since the start would not do: it does not see what threads of the process group give back.
    """
    before = live_bytes()
    starts_ns = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step, engine = _ready(config, ranks)
        for number in range(STEPS):
            starts_ns.append(time.time_ns())
            step(number)
        starts_ns.append(time.time_ns())
    gc.collect()
    between = live_bytes() - before
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in watched.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = np.cumsum([size for _, size in events])
    bounds = np.searchsorted([at for at, _ in events], starts_ns)[1:]  # the first step makes the moments
    rises = [int(held[first:last].max() - held[first - 1]) for first, last in itertools.pairwise(bounds)]
    folder = ranks.first_does(lambda: tempfile.mkdtemp(prefix="checkpoint-"))
    part = engine.snapshot()
    part.write(Path(folder))
    indices = ranks.gather(part.index())  # all have written
    if ranks.is_first:
        engine.write_index(Path(folder), indices)
    saved = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    ranks.gather(None)
    ranks.first_does(lambda: shutil.rmtree(folder))
    engine._deepspeed.destroy()
    del step, engine
    gc.collect()
    return {"peak": between + min(rises), "saved": saved}


def live_bytes() -> int:
    """Bytes of all storages that a tensor of this process refers to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [item.grad for item in tensors if item.is_leaf and item.grad is not None]
    storages = [
        item.untyped_storage() for item in tensors if item.device.type == "cpu" and item.layout == torch.strided
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _ready(config: RunConfig, ranks: Ranks):
    shape = (config.micro_batch, 1, *config.crop_voxels)
    image, valid = torch.randn(shape), torch.ones(shape, dtype=torch.bool)
    if isinstance(config, PretrainConfig):
        engine = Engine(build_pretrain(config, 1), config, ranks)
        seeds = range(config.micro_batch)
        hidden = torch.from_numpy(draw_masks(seeds, config.crop_voxels, config.patch_voxels, MaskConfig()))

        def loss():
            return engine(image, hidden, valid).loss
    else:
        engine = Engine(build_segmenter(config, 1), config, ranks)
        label = torch.zeros((config.micro_batch, *config.crop_voxels), dtype=torch.int64)

        def loss():
            return dice_cross_entropy(engine(image), label)

    def step(number: int) -> None:
        engine.set_learning_rate(number)
        for _ in range(accumulation(config, ranks.world.size)):
            engine.backward(loss())
            engine.step()

    return step, engine
