"""The estimates that a login node makes without torch."""

from pathlib import Path

import pytest

from mimscale.models.config import MaeConfig, UnetrConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.unetr import Unetr
from mimscale.train.config import EngineConfig, FinetuneConfig, PretrainConfig
from mimscale.train.size import checkpoint_bytes, count_parameters, memory_bytes, save_seconds

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


def test_sharding_takes_memory_off_a_rank_stage_by_stage() -> None:
    needs = [memory_bytes(_vit_b(zero_stage=stage), 8, bf16=True) for stage in (0, 1, 2, 3)]
    assert needs == sorted(needs, reverse=True)
    weights = count_parameters(_vit_b())
    assert needs[0] > 16 * weights  # 2 + 2 bytes of weight and gradient, 12 of the optimizer


def test_a_save_is_faster_on_more_nodes_but_never_faster_than_the_weights_of_the_first() -> None:
    config = _vit_b(zero_stage=1)
    one, many = save_seconds(config, 1, 500.0), save_seconds(config, 1000, 500.0)
    assert one == pytest.approx(checkpoint_bytes(config) / 1e6 * (1 / 500 + 1 / 1000))
    assert one / 4 < many < one / 3  # 4 of 16 bytes a weight
