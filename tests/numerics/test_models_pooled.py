"""Pooled encoders: what they are, how large they are, and that each of them learns a few volumes by heart."""

from functools import partial

import pytest
import torch
from target_samples import target_words

from mimscale.config import load_config
from mimscale.models.config import ResencConfig, SwinConfig, VitConfig
from mimscale.models.encoder import tokens_and_grid
from mimscale.models.pooled import AttentionPool, PooledPredictor
from mimscale.models.resenc import ResidualEncoder
from mimscale.models.swin import Swin
from mimscale.models.vit import Vit
from mimscale.train.config import FinetuneConfig
from mimscale.train.counted import counted
from mimscale.train.memory import run_activations
from mimscale.train.size import count_parameters, run_flops
from mimscale.train.target_losses import target_losses, tasks_of

CROP = (8, 16, 16)
SWIN = SwinConfig(dim=12, depths=(1, 1), heads=(2, 4), window=(4, 4, 4))
ENCODERS = {
    "vit": (partial(Vit, VitConfig(dim=24, depth=1, heads=2), crop_voxels=CROP, patch_voxels=(4, 8, 8)), 24),
    "swin": (partial(Swin, SWIN, crop_voxels=CROP, patch_voxels=(2, 2, 2)), 48),
    "resenc": (partial(ResidualEncoder, ResencConfig(features=(8, 16, 32), blocks=(1, 1, 1))), 32),
}


def network(name: str, pool: str, outputs: int = 6) -> PooledPredictor:
    torch.manual_seed(0)
    build, dim = ENCODERS[name]
    return PooledPredictor(build(channels=1), dim=dim, outputs=outputs, pool=pool)


@pytest.mark.parametrize("pool", ["mean", "attention"])
@pytest.mark.parametrize("name", ENCODERS)
def test_classes_and_numbers_of_a_few_volumes_are_learned_by_heart(name, pool):
    image = torch.randn(4, 1, *CROP, generator=torch.Generator().manual_seed(1))
    model, tasks = network(name, pool), tasks_of([("sex", ("f", "m")), ("site", ("A", "B", "C")), ("age", ())])
    values = torch.tensor([[0.0, 2.0, -1.3], [1.0, 0.0, 0.2], [0.0, 1.0, 1.4], [1.0, 1.0, -0.3]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def loss() -> torch.Tensor:
        return target_losses(model(image), values, tasks, "smooth_l1").mean()

    with torch.no_grad():
        assert loss() > 0.4
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert loss() < 0.01  # its floor is 0


@pytest.mark.parametrize("name", ENCODERS)
def test_both_poolings_begin_as_the_mean_of_the_tokens(name):
    image = torch.randn(2, 1, *CROP)
    outputs = []
    for pool in ("mean", "attention"):
        model = network(name, pool)
        tokens, _ = tokens_and_grid(model.encoder(image), getattr(model.encoder, "grid", None))
        # The weights of attention pooling were drawn before those of the linear layer.
        expected = tokens.mean(dim=1) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(image), expected)
        outputs.append(tokens)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("pool", ["mean", "attention"])
@pytest.mark.parametrize(
    "name", ["vit", "swin"]
)  # torch's CPU has no average of bf16 volumes, as a residual block takes
def test_weights_in_bf16_answer_in_fp32_what_those_in_fp32_do(name, pool):
    model, image = network(name, pool), torch.randn(2, 1, *CROP, generator=torch.Generator().manual_seed(1))
    expected = model(image)
    answer = model.to(torch.bfloat16)(image)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, expected, rtol=0.1, atol=0.1)  # 8 bits of mantissa through a few layers


def test_attention_pooling_is_a_softmax_over_tokens():
    pool = AttentionPool(5)
    torch.nn.init.normal_(pool.weigh.weight)
    tokens = torch.randn(2, 7, 5)
    for i in range(2):
        scores = torch.stack([pool.weigh.weight[0] @ torch.tanh(pool.view(token)) for token in tokens[i]])
        shares = scores.exp() / scores.exp().sum()
        expected = sum(share * token for share, token in zip(shares, tokens[i], strict=True))
        torch.testing.assert_close(pool(tokens)[i], expected)


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_the_formulas_are_what_a_step_without_numbers_counts(tmp_path, pool):
    words = target_words(tmp_path, tmp_path, tmp_path / "t.csv", f"targets.pool={pool}")
    config = load_config(FinetuneConfig, words[1], words[2:])
    real = counted(config, 2)
    assert count_parameters(config, 2) == sum(real.parameter_sizes)
    flops = sum(run_flops(config, 2).values(), start=real.flops.__class__(forward=0, backward=0))
    assert flops.forward == pytest.approx(real.flops.forward, rel=0.02)
    for width in (2, 4):
        assert run_activations(config, width, 2).kept == pytest.approx(real.activations(width).kept, rel=0.05)
