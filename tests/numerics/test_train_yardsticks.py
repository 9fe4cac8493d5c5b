"""Losses beside their yardsticks: by modality and on foreground, over any cut of the crops, against plain loops."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mimscale.models.config import MaeConfig, MaskConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.masking import draw_masks
from mimscale.models.patches import hidden_voxels
from mimscale.models.trivial import effective_rank, interpolated, mean_voxel
from mimscale.store.intensity import ChannelStats, IntensityContract
from mimscale.train.volume_facts import foreground_threshold
from mimscale.train.yardsticks import yardstick_metrics, yardstick_sums

CROP, PATCH = (8, 12, 16), (4, 4, 8)
MODALITIES = ("ct", "mr", "ct", "mr")


@pytest.fixture
def mae() -> MaskedAutoencoder:
    torch.manual_seed(1)
    vit = VitConfig(dim=24, depth=1, heads=2)
    config = MaeConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    return MaskedAutoencoder(vit, config, crop_voxels=CROP, patch_voxels=PATCH, channels=2).eval()


@pytest.fixture
def crops() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn((4, 2, *CROP), generator=generator)
    valid = torch.ones((4, 1, *CROP), dtype=torch.bool)
    valid[1, :, :3] = False
    image[3] = -5  # air and nothing else
    return SimpleNamespace(
        image=image,
        valid=valid,
        hidden=torch.from_numpy(draw_masks([1, 2, 3, 4], CROP, PATCH, MaskConfig(ratio=0.5))),
        counted=torch.ones(4, dtype=torch.bool),
        modalities=MODALITIES,
        foreground_above=torch.tensor([[0.0, 0.5]] * 4),
    )


def metrics_of(mae, crops, *parts):
    total = {}
    for part in parts:
        batch = SimpleNamespace(
            counted=crops.counted[part],
            modalities=crops.modalities[part],
            foreground_above=crops.foreground_above[part],
        )
        image, hidden, valid = crops.image[part], crops.hidden[part], crops.valid[part]
        with torch.no_grad():
            output = mae(image, hidden, valid)
        for name, value in yardstick_sums(mae.config, PATCH, output, batch, image, hidden, valid).items():
            total[name] = total.get(name, 0.0) + value
    return yardstick_metrics({name: value if value.dim() else float(value) for name, value in total.items()})


def mean_error(guess, crops, samples, voxels):
    """The mean over samples of the mean L1 error over the voxels of hidden patches, one sample after the other."""
    grid = tuple(edge // patch for edge, patch in zip(CROP, PATCH, strict=True))
    errors = []
    for sample in samples:
        counted = hidden_voxels(crops.hidden, PATCH, grid)[sample] & crops.valid[sample] & voxels[sample]
        if counted.any():
            errors.append((guess - crops.image)[sample].double().abs()[counted].mean())
    return float(torch.stack(errors).mean())


def test_each_loss_is_the_mean_error_of_its_predictor_over_its_crops_and_voxels(mae, crops):
    metrics = metrics_of(mae, crops, slice(0, 4))
    grid = mae.grid
    shown = crops.valid & ~hidden_voxels(crops.hidden, PATCH, grid)
    everywhere = torch.ones_like(crops.image, dtype=torch.bool)
    foreground = crops.image > crops.foreground_above[:, :, None, None, None]
    with torch.no_grad():
        guesses = {
            "": mae.reconstruct(crops.image, crops.hidden).predicted,
            "_mean_voxel": mean_voxel(crops.image, shown),
            "_interpolated": interpolated(crops.image, shown, PATCH),
        }
    groups = {"": (range(4), everywhere), "/ct": ((0, 2), everywhere), "/mr": ((1, 3), everywhere)}
    groups["/foreground"] = (range(4), foreground)
    for group, (samples, voxels) in groups.items():
        for name, guess in guesses.items():
            # fp32 means over some hundred voxels.
            expected = mean_error(guess, crops, samples, voxels)
            assert metrics[f"val_loss{name}{group}"] == pytest.approx(expected, rel=1e-5), (name, group)
        for name in ("mean_voxel", "interpolated"):
            ratio = metrics[f"val_loss{group}"] / metrics[f"val_loss_{name}{group}"]
            assert metrics[f"val_loss_vs_{name}{group}"] == pytest.approx(ratio)


def test_how_crops_are_cut_into_batches_and_padded_changes_nothing(mae, crops):
    whole = metrics_of(mae, crops, slice(0, 4))
    assert metrics_of(mae, crops, slice(0, 1), slice(1, 4)) == pytest.approx(whole)
    crops.counted[2] = False
    without = metrics_of(mae, crops, slice(0, 4))
    assert without == pytest.approx(metrics_of(mae, crops, slice(0, 2), slice(3, 4)))
    assert without["val_loss/ct"] != pytest.approx(whole["val_loss/ct"])


def test_a_modality_or_foreground_that_no_crop_has_gives_no_number(mae, crops):
    metrics = metrics_of(mae, crops, slice(3, 4))  # one crop of air
    assert not any(name.endswith(("/ct", "/foreground")) for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    # The mean voxel is right everywhere, so there is nothing to divide by.
    assert metrics["val_loss_mean_voxel"] == 0
    assert "val_loss_vs_mean_voxel" not in metrics


def test_the_feature_rank_is_that_of_all_counted_tokens(mae, crops):
    crops.counted[1] = False
    with torch.no_grad():
        tokens = mae(crops.image, crops.hidden, crops.valid).tokens[crops.counted].double().flatten(0, 1)
    rank = metrics_of(mae, crops, slice(0, 4))["val_feature_rank"]
    assert rank == pytest.approx(effective_rank(tokens.T @ tokens), rel=1e-6)
    assert 1 < rank <= 24


@pytest.mark.parametrize("target", ["raw", "patch_normalised"])
def test_the_training_loss_of_the_mean_voxel_is_that_of_a_network_that_says_it(mae, crops, target):
    mae.config = replace(mae.config, target=target)
    with torch.no_grad():
        output = mae(crops.image, crops.hidden, crops.valid)
    batch = SimpleNamespace(counted=crops.counted, modalities=MODALITIES, foreground_above=None)
    sums = yardstick_sums(mae.config, PATCH, output, batch, crops.image, crops.hidden, crops.valid)
    expected = float(sums["loss_mean_voxel"] / sums["samples"])
    assert float(output.mean_voxel_loss) == pytest.approx(expected, rel=1e-6)


def test_foreground_begins_half_way_between_air_and_body_but_not_below_the_window():
    stats = ChannelStats(
        p0_5=-1000.0, p50=0.0, p99_5=800.0, mean=-300.0, std=400.0, foreground_mean=30.0, foreground_std=90.0
    )
    row = SimpleNamespace(stats=(stats,), fill_value=-1024.0)
    wide = IntensityContract(kind="window", window=(-1000.0, 1000.0))
    np.testing.assert_allclose(foreground_threshold(row, wide), [(-497 + 1000) / 2000], rtol=1e-6)
    narrow = IntensityContract(kind="window", window=(-175.0, 250.0))
    np.testing.assert_allclose(foreground_threshold(row, narrow), [0.0], atol=1e-6)
    np.testing.assert_allclose(foreground_threshold(row, IntensityContract(kind="zscore")), [-197 / 400], rtol=1e-6)
