"""Trivial predictors and the feature rank against slow loops and known cases."""

import math

import numpy as np
import pytest
import torch

from mimscale.models.trivial import CONSTANT_WEIGHT, SCALES, effective_rank, interpolated, mean_voxel

CROP, PATCH = (4, 6, 8), (2, 3, 2)  # neither cubic


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn((2, 2, *CROP), generator=torch.Generator().manual_seed(1)) + 3


@pytest.fixture
def shown() -> torch.Tensor:
    return torch.rand((2, 1, *CROP), generator=torch.Generator().manual_seed(2)) < 0.3


def test_the_mean_voxel_is_that_of_the_shown_voxels_of_each_sample_and_channel(image, shown):
    guess = mean_voxel(image, shown)
    for sample in range(2):
        for channel in range(2):
            mean = image[sample, channel][shown[sample, 0]].double().mean()
            torch.testing.assert_close(guess[sample, channel].double(), mean.expand(CROP), rtol=1e-6, atol=0)


def test_interpolation_is_the_mean_of_all_shown_voxels_weighted_by_their_distance(image, shown):
    guess = interpolated(image, shown, PATCH)
    places = np.stack(np.meshgrid(*map(np.arange, CROP), indexing="ij"), axis=-1).reshape(-1, 3).astype(float)
    for sample in range(2):
        visible = shown[sample, 0].numpy().ravel()
        voxels = image[sample].numpy().reshape(2, -1)[:, visible].astype(float)
        for target in range(0, len(places), 7):
            distance = (places[visible] - places[target]) / np.array(PATCH)
            weight = np.full(len(distance), CONSTANT_WEIGHT)
            for patches, scale in SCALES:
                weight += scale * np.exp(-((distance / patches) ** 2).sum(axis=1) / 2)
            expected = (voxels * weight).sum(axis=1) / weight.sum()
            # fp32 sums of some hundred numbers near 3.
            np.testing.assert_allclose(guess[sample].reshape(2, -1)[:, target].numpy(), expected, rtol=1e-5)


def test_interpolation_knows_a_smooth_volume_better_than_the_mean_does():
    ramp = torch.arange(8.0).expand(1, 1, *CROP)
    shown = torch.ones(1, 1, *CROP, dtype=torch.bool)
    shown[..., 2:4] = shown[..., 6:] = False
    hidden = ~shown[0, 0]
    errors = [
        (guess[0, 0] - ramp[0, 0])[hidden].abs().mean()
        for guess in (interpolated(ramp, shown, (2, 2, 2)), mean_voxel(ramp, shown))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_interpolation_answers_far_from_everything_and_without_anything_shown():
    shown = torch.zeros((1, 1, 2, 2, 400), dtype=torch.bool)
    image = torch.full((1, 1, 2, 2, 400), 5.0)
    assert interpolated(image, shown, (2, 2, 2)).eq(0).all()
    shown[..., 0] = True
    torch.testing.assert_close(interpolated(image, shown, (2, 2, 2)), image)


def reference_rank(features: np.ndarray) -> float:
    singular = np.linalg.svd(features, compute_uv=False)
    share = singular / singular.sum()
    return float(np.exp(-sum(p * math.log(p) for p in share if p > 0)))


def test_the_feature_rank_is_rankme_of_the_stacked_features():
    parts = [torch.randn(50, 12, generator=torch.Generator().manual_seed(n)).double() for n in range(3)]
    parts[0][:, 3:] *= 0.01
    gram = sum(part.T @ part for part in parts)
    # Singular values by the root of the Gram matrix: half of float64's digits.
    assert effective_rank(gram) == pytest.approx(reference_rank(torch.cat(parts).numpy()), rel=1e-6)


def test_the_feature_rank_of_equal_orthogonal_directions_is_their_number():
    assert effective_rank(torch.eye(8, dtype=torch.float64) * 5) == pytest.approx(8)


def test_collapsed_features_have_rank_1_and_none_have_rank_0():
    same = torch.randn(1, 16).double().expand(100, -1)
    assert effective_rank(same.T @ same) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(4, 4).double()) == 0
    assert math.isnan(effective_rank(torch.full((4, 4), math.nan).double()))
