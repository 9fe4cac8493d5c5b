"""The estimates that a login node makes without torch."""

from dataclasses import replace
from pathlib import Path

import pytest

from mimscale.config import load_config
from mimscale.models.config import MaeConfig, SimclrConfig, SimmimConfig, UnetrConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.unetr import Unetr
from mimscale.train.build import build_pretrain
from mimscale.train.config import EngineConfig, FinetuneConfig, PretrainConfig
from mimscale.train.memory import estimate_memory
from mimscale.train.size import checkpoint_bytes, count_parameters, save_seconds
from mimscale.train.verbs import check_run

VITS = [
    VitConfig(dim=48, depth=3, heads=4),
    VitConfig(dim=36, depth=2, heads=2, positions="learned", mlp_ratio=2.0, layer_scale=1e-5),
]
PLACES = {"store": Path("s"), "run_dir": Path("r"), "steps": 1, "global_batch": 4, "micro_batch": 2}


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_weights_of_an_autoencoder_are_counted_exactly(vit: VitConfig, channels: int) -> None:
    mae = MaeConfig(decoder_dim=24, decoder_depth=2, decoder_heads=2)
    config = PretrainConfig(crop_voxels=(16, 32, 32), patch_voxels=(8, 8, 16), model=vit, mae=mae, **PLACES)
    model = MaskedAutoencoder(vit, mae, crop_voxels=(16, 32, 32), patch_voxels=(8, 8, 16), channels=channels)
    assert count_parameters(config, channels) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 8, 8), (2, 8, 8), (4, 4, 4)])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_weights_of_a_unetr_are_counted_exactly(patch: tuple[int, int, int], channels: int) -> None:
    unetr = UnetrConfig(num_classes=5, feature_size=4)
    config = FinetuneConfig(crop_voxels=(32, 32, 32), patch_voxels=patch, model=VITS[0], unetr=unetr, **PLACES)
    model = Unetr(VITS[0], unetr, crop_voxels=(32, 32, 32), patch_voxels=patch, channels=channels)
    assert count_parameters(config, channels) == sum(weight.numel() for weight in model.parameters())


def _vit_b(**engine: object) -> PretrainConfig:
    return PretrainConfig(
        crop_voxels=(96, 96, 96),
        patch_voxels=(16, 16, 16),
        engine=EngineConfig(**engine),  # type: ignore[arg-type]
        **PLACES,
    )


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_sharding_takes_memory_off_a_rank_stage_by_stage(bf16: bool, accumulates: bool) -> None:
    estimates = [
        estimate_memory(_vit_b(zero_stage=stage, bucket_elements=1_000_000), 8, bf16=bf16, accumulates=accumulates)
        for stage in (0, 1, 2, 3)
    ]
    optimizer, gradients = [one.optimizer for one in estimates], [one.gradients for one in estimates]
    assert optimizer == sorted(optimizer, reverse=True)
    assert gradients[0] == 8 * gradients[1]
    # Stages 2 and 3 sum those of bf16 micro-batches in fp32.
    assert gradients[2] == gradients[3] == (2 if bf16 and accumulates else 1) * gradients[1]
    # Stage 3 holds the weights twice while it computes, its share and all of them; so it may need more than stage 2.
    peaks = [one.peak for one in estimates[:3]]
    assert peaks == sorted(peaks, reverse=True)


def test_recomputing_activations_takes_less_memory_and_a_larger_batch_takes_more() -> None:
    config = replace(_vit_b(), micro_batch=32, global_batch=32)
    thrifty = replace(config, model=replace(config.model, checkpoint_activations=True))
    larger = replace(config, micro_batch=64, global_batch=64)
    peaks = [estimate_memory(one, 8, bf16=True).peak for one in (thrifty, config, larger)]
    assert peaks == sorted(peaks)
    assert peaks[2] < 2 * peaks[1]  # weights and optimizer do not grow with the batch


def test_a_save_is_faster_on_more_nodes_but_never_faster_than_the_weights_of_the_first() -> None:
    config = _vit_b(zero_stage=1)
    one, many = save_seconds(config, 1, 500.0), save_seconds(config, 1000, 500.0)
    assert one == pytest.approx(checkpoint_bytes(config) / 1e6 * (1 / 500 + 1 / 1000))
    assert one / 4 < many < one / 3  # 4 of 16 bytes a weight


@pytest.mark.parametrize(
    "method",
    [
        {"method": "mae", "mae": MaeConfig(decoder_dim=24, decoder_depth=0, decoder_heads=2)},
        {"method": "simmim"},
        {"method": "simmim", "simmim": SimmimConfig(head="mlp")},
        {"method": "simclr", "simclr": SimclrConfig(projection_dim=6, hidden_dim=10)},
    ],
    ids=str,
)
def test_the_weights_of_every_method_are_counted_exactly(method: dict[str, object]) -> None:
    vit = VitConfig(dim=48, depth=2, heads=4, mlp="swiglu")
    config = PretrainConfig(crop_voxels=(16, 32, 32), patch_voxels=(8, 8, 16), model=vit, **method, **PLACES)
    model = build_pretrain(config, 2)
    assert count_parameters(config, 2) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("mae_vit_s", 21),
        ("mae_vit_b", 85),
        ("mae_vit_l", 302),
        ("mae_vit_h", 630),
        ("simmim_vit_b", 85),
        ("simclr_vit_b", 85),
    ],
)
def test_a_packaged_recipe_has_the_encoder_that_it_names(recipe: str, millions: int) -> None:
    config = load_config(PretrainConfig, f"pretrain_{recipe}", ["store=s", "run_dir=r"])
    check_run(config)
    blocks = config.model.depth * (12 * config.model.dim**2 + 13 * config.model.dim)
    assert round(blocks / 1e6) == millions
    assert count_parameters(config) > blocks


def test_the_three_methods_see_equally_many_crops() -> None:
    configs = [
        load_config(PretrainConfig, f"pretrain_{method}_vit_b", ["store=s", "run_dir=r"])
        for method in ("mae", "simmim", "simclr")
    ]
    assert len({(c.steps, c.global_batch, c.crop_voxels, c.stream, c.optim) for c in configs}) == 1
