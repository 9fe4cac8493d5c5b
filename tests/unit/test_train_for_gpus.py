"""What makes a step fast on a GPU, as far as a machine without one can tell: see benchmarks/README.md."""

import importlib.util
import inspect
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.nn import functional

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.verbs import bench_config
from mimscale.config import load_config, recipe_text
from mimscale.models.config import VitConfig
from mimscale.models.masking import draw_masks
from mimscale.train import engine
from mimscale.train.compiled_blocks import compiles_blocks
from mimscale.train.config import EngineConfig, FinetuneConfig, PretrainConfig
from mimscale.train.deepspeed_config import deepspeed_config
from mimscale.train.optim import adamw
from mimscale.train.ranks import Ranks
from mimscale.train.size import count_parameters
from mimscale.world import World

RECIPES = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "mimscale" / "recipes").glob("*.yaml")
    if not path.stem.startswith("ingest")
)
BY_FORMULA = [name for name in RECIPES if not any(word in name for word in ("resenc", "swin", "primus"))]
SMALL = ["crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]", "model={dim: 32, depth: 2, heads: 4}", "micro_batch=2"]
METHODS = {
    "mae": ["demo/pretrain", "mae={decoder_dim: 32, decoder_depth: 2, decoder_heads: 4}"],
    "simmim": ["pretrain_simmim_vit_b"],
    "simclr": ["pretrain_simclr_vit_b"],
}


def config_of(recipe):
    kind = FinetuneConfig if recipe.startswith("finetune") else PretrainConfig
    table = ["targets.table=none", "targets.classify=[class]"] if "targets" in recipe else []
    return load_config(kind, recipe, ["store=none", "run_dir=none", *table])


@pytest.mark.parametrize("method", METHODS)
def test_attention_is_asked_for_in_the_way_that_the_flash_kernel_can_give(method, monkeypatch):
    config = bench_config([*METHODS[method], *SMALL, "global_batch=2"], needs_store=False)
    asked, attention = [], functional.scaled_dot_product_attention
    known = inspect.signature(lambda query, key, value: None)

    def watched(*args, **kwargs):
        asked.append(known.bind(*args, **kwargs).arguments)  # no mask, no dropout, no scale: another argument raises
        return attention(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    objective = config.network.objective(config)
    objective.loss(objective.build(1), synthetic_batch(config, 1, torch.device("cpu"))).backward()
    assert len(asked) == (4 if method == "mae" else 2)
    for tensors in asked:
        assert {tensor.shape[-1] for tensor in tensors.values()} == {8}
        assert all(tensor.stride(-1) == 1 for tensor in tensors.values())  # no copy before the kernel


@pytest.mark.parametrize("recipe", RECIPES)
def test_heads_of_every_recipe_are_a_multiple_of_8_numbers_wide(recipe):
    config = config_of(recipe)
    if isinstance(config.model, VitConfig):
        assert config.model.dim // config.model.heads % 8 == 0
    if getattr(config, "method", None) == "mae":
        assert config.mae.decoder_dim // config.mae.decoder_heads % 8 == 0


@pytest.mark.parametrize("recipe", BY_FORMULA)
def test_a_bucket_holds_a_part_of_the_gradients_so_that_it_travels_behind_the_backward_pass(recipe):
    config = config_of(recipe)
    assert count_parameters(config) > 1.5 * config.engine.bucket_elements
    tree = deepspeed_config(config.engine, precision="bf16", micro_batch=1, accumulation=1, world_size=8)
    assert tree["zero_optimization"]["overlap_comm"]
    assert tree["zero_optimization"]["reduce_bucket_size"] == config.engine.bucket_elements


def test_swin_has_a_bucket_of_its_own_size():  # its 33 million weights are counted, which takes a while
    assert "bucket_elements: 10_000_000" in recipe_text("pretrain_simmim_swin_b")
    assert config_of("pretrain_simmim_swin_b").engine.bucket_elements == 10_000_000


def test_adamw_is_torchs_fused_one_and_gradients_of_bf16_weights_are_summed_in_fp32_unchecked():
    config = bench_config([*METHODS["mae"], *SMALL, "global_batch=2"], needs_store=False)
    optimizer = adamw(config.network.objective(config).build(1), config.optim, config.model.layers)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["fused"] for group in optimizer.param_groups)
    tree = deepspeed_config(EngineConfig(), precision="bf16", micro_batch=1, accumulation=1, world_size=8)
    assert tree["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert tree["communication_data_type"] == "fp32"


@pytest.mark.parametrize("style", ["random", "block", "grid"])
def test_as_many_patches_are_hidden_in_every_step(style):
    config = bench_config([*METHODS["mae"], *SMALL, "global_batch=2", f"mask.style={style}"], needs_store=False)
    counts = {
        int(row.sum())
        for seed in range(50)
        for row in draw_masks([seed, seed + 7], (64, 64, 64), (8, 8, 8), config.mask, ratio_seed=seed)
    }
    assert len(counts) == 1


def test_a_range_of_mask_ratios_is_no_static_shape_and_refused_with_compiled_blocks():
    words = [*METHODS["mae"], *SMALL, "global_batch=2", "mask={ratio_range: [0.5, 0.7]}"]
    assert bench_config(words, needs_store=False).network.problems(bench_config(words, needs_store=False)) == []
    config = bench_config([*words, "engine.compile_blocks=true"], needs_store=False)
    (problem,) = config.network.problems(config)
    assert "engine.compile_blocks=true with mask.ratio_range=[0.5, 0.7]" in problem
    assert "give mask.ratio" in problem


def compiles(words, monkeypatch, *, device="cuda", triton=True, compilers=("gcc",)):
    """Whether a run on a machine with such a device and such programs compiles its blocks."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (object() if triton else None) if name == "triton" else found(name)
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)
    config = bench_config([*METHODS["mae"], *SMALL, "global_batch=2", *words], needs_store=False)
    with torch.device("meta"):
        model = config.network.objective(config).build(1)
    return compiles_blocks(model, config, SimpleNamespace(device=torch.device(device), is_first=True))


def test_blocks_are_compiled_on_cuda_and_not_on_a_cpu_unless_a_recipe_says_otherwise(monkeypatch, capsys):
    assert EngineConfig().compile_blocks is None
    assert all(config_of(recipe).engine.compile_blocks is None for recipe in RECIPES)
    assert compiles([], monkeypatch)
    assert compiles(["engine.zero_stage=2", "mask.ratio=0.6"], monkeypatch)
    assert not compiles([], monkeypatch, device="cpu")
    assert compiles(["engine.compile_blocks=true"], monkeypatch, device="cpu")
    assert not compiles(["engine.compile_blocks=false"], monkeypatch)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "machine", "reason"),
    [
        (
            ["mask={ratio_range: [0.5, 0.7]}"],
            {},
            r"mask.ratio_range=\[0.5, 0.7\], so that each number of visible patches",
        ),
        (["engine.zero_stage=3"], {}, "engine.zero_stage=3 gathers weights inside of a block"),
        ([], {"triton": False}, "Triton is not installed"),
        ([], {"compilers": ()}, r"no C compiler is found here \(cc, gcc, clang\); CC names one"),
    ],
)
def test_what_is_in_the_way_of_compiling_is_said_in_one_line_and_blocks_run_as_they_are(
    words, machine, reason, monkeypatch, capsys
):
    assert not compiles(words, monkeypatch, **machine)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"blocks are not compiled: {reason}", line)
    assert not compiles(words, monkeypatch, device="cpu", **machine)
    assert capsys.readouterr().err == ""


def test_ranks_of_gpus_agree_over_a_group_with_the_runs_own_time_limit(monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "new_group", lambda **words: asked.append(words))
    Ranks(World(), torch.device("cpu"), collective_timeout_min=3)
    Ranks(World(), torch.device("cuda", 0), collective_timeout_min=3)
    assert asked == [{"backend": "gloo", "timeout": timedelta(minutes=3)}]


def test_ranks_that_join_on_gpus_pass_the_time_limit_on(monkeypatch):
    asked = []
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    for name, answer in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda **words: asked.append(words["timeout"]))
    monkeypatch.setattr(distributed, "new_group", lambda **words: asked.append(words["timeout"]))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    engine.join_ranks(World(), collective_timeout_min=3)
    assert asked == [timedelta(minutes=3)] * 2


class Chosen(Exception):
    """The engine has come as far as it has to."""


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_takes_the_fastest_convolution_unless_bits_have_to_repeat(deterministic, monkeypatch):
    def chosen(*_):
        raise Chosen

    asked = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(engine, "compiles_blocks", chosen)
    words = [*METHODS["mae"], *SMALL, "global_batch=2", f"engine.deterministic={str(deterministic).lower()}"]
    ranks = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(Chosen):
        engine.Engine(torch.nn.Linear(1, 1), bench_config(words, needs_store=False), ranks)
    assert torch.backends.cudnn.benchmark is not deterministic
    assert asked == [True] * deterministic
