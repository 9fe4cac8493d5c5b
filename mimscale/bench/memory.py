"""What weights, gradients and optimizer take on a rank, by ZeRO stage: the bytes of all tensors that are alive.

Theory (Rajbhandari et al. 2020, arXiv:1910.02054, sec. 5): 16 bytes a parameter with AdamW, of which each stage shards
more. With bf16: 2 weights + 2 gradients + 4 weights in fp32 + 4 + 4 moments. In fp32 weights and gradients are 4 + 4,
and ZeRO keeps its own copy of the weights beside them: 20.
"""

import argparse
import gc
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mimscale import durable
from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.config import verb_parser
from mimscale.train.config import PretrainConfig
from mimscale.train.engine import Engine, joined_ranks
from mimscale.train.pretrain import pretrain_objective
from mimscale.train.ranks import Ranks
from mimscale.world import World

# A thread of gloo keeps the tensors of a collective for a moment after everybody has its result.
_LETS_GO_S = 0.5
OPTIMIZER_BYTES = 12  # a parameter: weights in fp32 and two moments


def theory_bytes(parameters: int, zero_stage: int, ranks: int, *, bf16: bool) -> float:
    """Of one rank, between the backward pass and the step of the optimizer.

    Stage 0 in fp32 needs no second copy of the weights.
    """
    width = 2 if bf16 else 4
    optimizer = 8 if zero_stage == 0 and not bf16 else OPTIMIZER_BYTES
    shares = (zero_stage >= 3, zero_stage >= 2, zero_stage >= 1)
    parts = (width, width, optimizer)
    return parameters * sum(part / (ranks if shared else 1) for part, shared in zip(parts, shares, strict=True))


def live_tensor_bytes(device: torch.device) -> int:
    """Bytes of all storages on a device that a tensor of this process refers to, gradients too."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> None:
        if tensor.device.type == device.type and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    for tensor in tensors:
        note(tensor)
        if tensor.is_leaf and tensor.grad is not None:
            note(tensor.grad)
    return sum(sizes.values())


def states_of(config: PretrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Bytes that each rank holds after the backward pass of its second step, against theory. A collective."""
    gc.collect()
    before = live_tensor_bytes(ranks.device)
    objective = pretrain_objective(config)
    model = objective.build(1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    engine = Engine(model, config, ranks)
    batch = synthetic_batch(config, 1, ranks.device)
    held = sum(tensor.untyped_storage().nbytes() for tensor in batch.tensors().values())
    loss = None
    for _ in range(2):  # the first step makes the moments
        if loss is not None:
            engine.step()
        loss = objective.loss(engine, batch)
        engine.backward(loss)
    del loss
    time.sleep(_LETS_GO_S)
    gc.collect()
    own = live_tensor_bytes(ranks.device) - before - tables - held
    bf16 = engine.precision == "bf16"
    expected = theory_bytes(parameters, config.engine.zero_stage, ranks.world.size, bf16=bf16)
    of_rank = ranks.gather(own)
    return {
        "zero_stage": config.engine.zero_stage,
        "ranks": ranks.world.size,
        "precision": engine.precision,
        "parameters": parameters,
        "bytes_of_rank": of_rank,
        "theory_bytes": round(expected),
        "bucket_bytes": config.engine.bucket_elements * (2 if bf16 else 4),
        "of_theory": round(max(of_rank) / expected, 3),
    }


def main(argv: list[str]) -> int:
    """`mimscale bench memory RECIPE --stages 0 1 2 3 --out FILE`: what `bench scaling` starts on each rank."""
    parser = verb_parser(
        "bench memory", "Bytes of a rank by ZeRO stage, against 16 bytes a parameter; see bench scaling."
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    config = bench_config(arguments.words, needs_store=False)
    world = World.from_environment(os.environ)
    with joined_ranks(world) as ranks:
        rows = []
        for stage in arguments.stages:
            precision = "fp32" if stage == 0 else config.engine.precision
            engine = replace(config.engine, zero_stage=stage, precision=precision)
            batch = config.micro_batch * world.size
            rows.append(states_of(replace(config, engine=engine, global_batch=batch), ranks))
    if world.is_first:
        durable.write_json(arguments.out, rows)
    return 0
