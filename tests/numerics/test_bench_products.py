"""The recorded products of a step: their FLOPs against torch's counter and against the formula of a MAE."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimscale.bench.products import Attention, Replay, record
from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.training import Bench
from mimscale.bench.verbs import bench_config
from mimscale.errors import ConfigError
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.train.size import run_flops

CPU = torch.device("cpu")
WORDS = ["demo/pretrain", "crop_voxels=[32,32,32]", "model={dim: 48, depth: 2, heads: 4}", "mae={decoder_dim: 24, "]
WORDS[-1] += "decoder_depth: 1, decoder_heads: 2}"


def step_of(*words, device=CPU):
    config = bench_config([*WORDS, *words], needs_store=False)
    objective = MaskedReconstruction(config)
    model, batch = objective.build(1).to(device), synthetic_batch(config, 1, device)
    return config, lambda: objective.loss(model, batch).backward()


def test_recorded_flops_are_those_of_the_formula():
    config, step = step_of()
    B, L, K, M, P, D, E = config.micro_batch, 64, 16, 48, 512, 48, 24

    def block(tokens, dim, answered):
        return tokens * 3 * dim * dim + answered * 9 * dim * dim + 2 * answered * tokens * dim

    # The decoder's only block sees all tokens and answers for the hidden ones.
    forward = K * D * E + 2 * block(K, D, K) + block(L, E, M) + M * E * P
    # The image needs no gradient, so its projection has one product less in the backward pass.
    assert record(step).flops == 2 * B * (3 * forward + 2 * K * P * D)


def test_recorded_flops_are_those_that_torch_counts_and_fused_attention_needs_as_many():
    _, step = step_of()
    fused, counter = record(step), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter does not know the CPU's fused kernel
        with counter:
            step()
        plain = record(step)
    assert plain.flops == plain.hardware_flops == counter.get_total_flops()
    assert fused.flops == plain.flops
    assert fused.hardware_flops > fused.flops  # it computes the scores again


def test_checkpointing_recomputes_and_a_device_without_memory_counts_the_same():
    plain = record(step_of()[1])
    assert record(step_of(device=torch.device("meta"))[1]).flops == plain.flops
    recomputed = record(step_of("model={dim: 48, depth: 2, heads: 4, checkpoint_activations: true}")[1])
    assert plain.flops < recomputed.flops < 4 / 3 * plain.flops


def test_products_alone_are_as_many_and_of_the_same_shapes_as_in_the_step():
    _, step = step_of()
    recorded = record(step)
    shapes = []
    multiply, batched, fused = torch.mm, torch.bmm, torch.nn.functional.scaled_dot_product_attention

    def noting(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            shapes.append(tuple(out.shape))
            return out

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", noting(multiply))
        patch.setattr(torch, "bmm", noting(batched))
        replay = Replay(recorded, CPU)
        shapes.clear()
        replay()
    assert fused is torch.nn.functional.scaled_dot_product_attention
    products = [product for product in recorded.products if not isinstance(product, Attention)]
    assert [shape for shape in shapes if len(shape) == 2] == [
        (product.left.size[0], product.right.size[1]) for product in products
    ]
    assert math.isfinite(recorded.flops)


def test_a_step_with_convolutions_is_refused_with_what_measures_it():
    convolution, image = torch.nn.Conv3d(1, 2, 3), torch.randn(1, 1, 4, 4, 4)
    with pytest.raises(ConfigError, match="mimscale bench train` measures any network"):
        record(lambda: convolution(image))


def test_the_flops_of_a_network_with_convolutions_are_counted_all_the_same():
    words = ["demo/pretrain", "method=resenc_mae", "model={features: [4, 8], blocks: [1, 1]}", "crop_voxels=[16,16,16]"]
    bench = object.__new__(Bench)  # without an engine, which counting does not need
    bench.config, bench.channels = bench_config(words, needs_store=False), 1
    training = sum(part.training for part in run_flops(bench.config).values())
    assert bench.flops() == (training, training)
    assert training > 2 * 16**3 * 27 * 4 * 3
