"""Blocks that are compiled give what plain ones give, and where nothing can be compiled they run as they are."""

import json
import warnings

import pytest
from rank_pool import run_ranks


def train_compiled_and_plain(words):
    """In a process of its own: losses of three steps, plain and with compiled blocks; and how much was compiled."""
    import torch

    from mimscale.bench.step import Setting, own_step, plain_functions
    from mimscale.bench.verbs import bench_config
    from mimscale.train.ranks import Ranks
    from mimscale.world import World

    warnings.simplefilter("default")  # the compiler warns of its own ways, and an error would be a fall back
    if "without a compiler" in words:
        import torch._inductor.config

        torch._inductor.config.cpp.cxx = ("no-such-compiler",)
    small = ["crop_voxels=[16,16,16]", "micro_batch=2", "global_batch=2"]
    if "residual encoder" in words:
        small += ["method=resenc_mae", "model={features: [4, 8], blocks: [1, 1]}"]
    else:
        small += ["model={dim: 24, depth: 1, heads: 2}"]
    decoder = "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"
    config = bench_config(["demo/pretrain", *small, decoder], needs_store=False)
    setting = Setting(config, 1, Ranks(World(), torch.device("cpu")))
    losses = []
    for compiled in (False, True):
        step = own_step(setting, compiled=compiled)
        losses.append([float(step()) for _ in range(3)])
    print(json.dumps({"losses": losses, "plain": plain_functions()}))
    return 0


@pytest.mark.parametrize(
    ("encoder", "compiler"),
    [("vit", "with a compiler"), ("vit", "without a compiler"), ("residual encoder", "with a compiler")],
)
def test_compiled_blocks_train_as_plain_ones_do_with_and_without_a_compiler(encoder, compiler):
    (ended,) = run_ranks([encoder, compiler], size=1, body=train_compiled_and_plain)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out.splitlines()[-1])
    plain, compiled = told["losses"]
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert (told["plain"] > 0) == (compiler == "without a compiler")
