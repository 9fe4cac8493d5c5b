"""Slabs, axis by axis, against scipy on the whole array with an explicit coordinate for every voxel.

Tolerance 1e-5 of the spread of the values: one side sums in float32, the other in float64, in another order.
"""

import numpy as np
import pytest
from scipy import ndimage

from mimscale.ingest import resample
from mimscale.ingest.resample import (
    blur_sigma,
    likely_regions,
    most_likely_classes,
    resample_classes,
    resample_intensities,
)

SHAPE = (23, 31, 18)
STEPS = [(2.0, 2.0, 2.0), (1.7, 1.0, 0.6), (0.4, 3.3, 1.0), (1.0, 1.0, 2.5), (0.5, 0.5, 0.5)]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(resample, "SLAB_BYTES", 4 * 31 * 18 * 5)


def new_shape(steps):
    return tuple(resample.new_size(size, step) for size, step in zip(SHAPE, steps, strict=True))


def reference(array, shape, steps):
    sigmas = [blur_sigma(step) for step in steps]
    smooth = ndimage.gaussian_filter(array.astype(np.float64), sigmas, mode="nearest", truncate=4.0)
    axes = [
        (old - 1) / 2 + (np.arange(new) - (new - 1) / 2) * step
        for old, new, step in zip(array.shape, shape, steps, strict=True)
    ]
    return ndimage.map_coordinates(smooth, np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")


@pytest.mark.parametrize("steps", STEPS)
def test_intensities_are_those_of_a_blur_and_one_interpolation_of_the_whole(steps):
    volume = np.random.RandomState(0).randn(2, *SHAPE).astype(np.float32)
    shape = new_shape(steps)
    resampled = resample_intensities(volume, shape, steps)
    for channel, wanted in zip(resampled, volume, strict=True):
        assert np.allclose(channel, reference(wanted, shape, steps), rtol=0, atol=5e-5)
    whole = np.rint(volume * 100).astype(np.int16)
    assert np.abs(resample_intensities(whole, shape, steps)[1] - reference(whole[1], shape, steps)).max() <= 0.501


@pytest.mark.parametrize("steps", STEPS)
def test_classes_are_those_with_the_largest_share(steps):
    random = np.random.RandomState(1)
    blobs = ndimage.gaussian_filter(random.randn(4, *SHAPE), (0, 2, 2, 2)).argmax(axis=0)
    classes = np.choose(blobs, [0, 1, 7, 255]).astype(np.uint8)
    shape = new_shape(steps)
    values = np.array([1, 7, 255, 0])
    shares = np.stack([reference(classes == value, shape, steps) for value in values])
    ranked = np.sort(shares, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-3
    assert clear.mean() > 0.9
    resampled = resample_classes(classes, shape, steps)
    assert resampled.dtype == np.uint8
    assert np.array_equal(resampled[clear], values[shares.argmax(axis=0)][clear])


@pytest.mark.parametrize("steps", STEPS)
def test_most_likely_classes_are_those_of_interpolated_probabilities(steps):
    logits = np.random.RandomState(2).randn(3, *SHAPE).astype(np.float32) * 5
    shape = new_shape(steps)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=0)
    wanted = np.stack([reference(one, shape, steps) for one in probabilities])
    ranked = np.sort(wanted, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(most_likely_classes(logits, shape, steps)[clear], wanted.argmax(axis=0)[clear])


@pytest.mark.parametrize("steps", STEPS)
def test_likely_regions_are_those_whose_interpolated_probability_is_above_one_half(steps):
    logits = np.random.RandomState(3).randn(2, *SHAPE).astype(np.float32) * 5
    shape = new_shape(steps)
    wanted = np.stack([reference(1 / (1 + np.exp(-one.astype(np.float64))), shape, steps) for one in logits])
    clear = np.abs(wanted - 0.5) > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(likely_regions(logits, shape, steps)[clear], wanted[clear] > 0.5)
