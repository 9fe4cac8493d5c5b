"""Blocks that are compiled give what plain ones give, and where nothing can be compiled they run as they are."""

import json
import warnings

import pytest
from rank_pool import run_ranks

SMALL = ["crop_voxels=[16,16,16]", "model={dim: 24, depth: 1, heads: 2}", "micro_batch=2", "global_batch=2"]
DECODER = "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"


def train_compiled_and_plain(words):
    """In a process of its own: losses of three steps, plain and with compiled blocks; and what was not compiled."""
    import torch

    from mimscale.bench.compiled import fallbacks
    from mimscale.bench.step import Setting, own_step
    from mimscale.bench.verbs import bench_config
    from mimscale.train.ranks import Ranks
    from mimscale.world import World

    warnings.simplefilter("default")  # the compiler warns of its own ways, and an error would be a fall back
    if words == ["without a compiler"]:
        import torch._inductor.config

        torch._inductor.config.cpp.cxx = ("no-such-compiler",)
    config = bench_config(["demo/pretrain", *SMALL, DECODER], needs_store=False)
    setting = Setting(config, 1, Ranks(World(), torch.device("cpu")))
    losses = []
    for compiled in (False, True):
        with fallbacks() as found:
            step = own_step(setting, compiled=compiled)
            losses.append([float(step()) for _ in range(3)])
    print(json.dumps({"losses": losses, "plain": found.count, "reason": found.reason}))
    return 0


@pytest.mark.parametrize("compiler", ["with a compiler", "without a compiler"])
def test_compiled_blocks_train_as_plain_ones_do_with_and_without_a_compiler(compiler):
    (ended,) = run_ranks([compiler], size=1, body=train_compiled_and_plain)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out.splitlines()[-1])
    plain, compiled = told["losses"]
    assert compiled == pytest.approx(plain, rel=1e-4)
    if compiler == "with a compiler":
        assert (told["plain"], told["reason"]) == (0, None)
    else:
        assert told["plain"] > 0
        assert "no-such-compiler" in told["reason"]


NETWORKS = {
    "nine chances to be left out": [
        *("pretrain_mae_vit_b", "crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]"),
        *("model={dim: 12, depth: 9, heads: 2, drop_path: 0.2}", "mae={decoder_dim: 12, decoder_heads: 2}"),
    ],
    "residual": [
        *("pretrain_mae_resenc_l", "crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]"),
        "model={features: [4, 6, 8, 10], blocks: [1, 2, 1, 1]}",
    ],
    "swin": [
        *("pretrain_simmim_swin_b", "crop_voxels=[16,16,16]", "patch_voxels=[2,2,2]"),
        "model={dim: 12, depths: [2, 1], heads: [2, 4], window: [2, 2, 2]}",
        "mask={ratio: 0.6, unit_voxels: [8, 8, 8]}",
    ],
}


def compile_blocks_of_all(_words):
    """In a process of its own: of each network blocks, shapes that were traced, fall backs; training and validation."""
    import torch

    from mimscale.bench.compiled import fallbacks
    from mimscale.bench.synthetic import synthetic_batch
    from mimscale.bench.verbs import bench_config
    from mimscale.train.compiled_blocks import compile_blocks

    warnings.simplefilter("default")
    seen = {}
    for name, words in NETWORKS.items():
        config = bench_config([*words, "micro_batch=2", "global_batch=2"], needs_store=False)
        objective, batch = config.network.objective(config), synthetic_batch(config, 1, torch.device("cpu"))
        model = objective.build(1)
        names = [key for key, _ in model.named_parameters()]
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with fallbacks() as found:
            compile_blocks(model, backend="eager")
            objective.loss(model, batch).backward()
            with torch.no_grad():
                objective.validation_sums(model.eval(), batch)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert [key for key, _ in model.named_parameters()] == names
        kinds = type(model.encoder).repeated
        seen[name] = [sum(isinstance(one, kinds) for one in model.modules()), graphs, found.count, found.reason]
    print(json.dumps(seen))
    return 0


def test_blocks_of_every_encoder_are_compiled_and_their_number_lets_none_fall_back():
    (ended,) = run_ranks([], size=1, body=compile_blocks_of_all)
    assert ended.code == 0, ended.err
    seen = json.loads(ended.out.splitlines()[-1])
    assert list(seen) == list(NETWORKS)
    for blocks, graphs, fallbacks, reason in seen.values():
        assert (fallbacks, reason) == (0, None)
        assert 0 < graphs <= 2 * blocks
    blocks, graphs, *_ = seen["nine chances to be left out"]
    # Encoder: the first block leaves nobody out in training, in validation none does. Decoder: all tokens, or those
    # that are asked for, in both.
    assert (blocks, graphs) == (11, 7)


def test_what_cannot_be_compiled_block_by_block_is_refused():
    from torch import nn

    from mimscale.errors import ConfigError
    from mimscale.models.encoder import Encoder
    from mimscale.train.compiled_blocks import compile_blocks

    model = nn.Module()
    model.encoder = Encoder(None, 1)
    with pytest.raises(ConfigError, match="Encoder does not say which of its modules are compiled one by one"):
        compile_blocks(model)
