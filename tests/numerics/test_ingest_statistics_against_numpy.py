"""Statistics from counts and from sorted values against one plain numpy call for each number.

Tolerance 1e-12 of the spread of the values: both sides use float64, only the order of their sums differs. Boxes and
the number of foreground voxels are exact.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.ingest import statistics


def otsu_by_trial(values, low, high):
    """Every edge between 256 bins tried as a threshold, on values moved to the middles of their bins."""
    edges = np.linspace(low, high, 257)
    middles = (edges[:-1] + edges[1:]) / 2
    within = values[(values >= low) & (values <= high)]
    moved = middles[np.clip(np.searchsorted(edges, within, side="right") - 1, 0, 255)]
    variances = []
    for edge in edges[1:]:
        dark, bright = moved[moved < edge], moved[moved > edge]
        gap = dark.mean() - bright.mean() if dark.size and bright.size else 0.0
        variances.append(dark.size * bright.size * gap**2)
    best = np.flatnonzero(np.isclose(variances, max(variances), rtol=1e-12, atol=0))
    return edges[1 + int(best.mean())]


def reference(volume, modality):
    expected, mask = [], np.zeros(volume.shape[1:], dtype=bool)
    for channel in volume.astype(np.float64):
        values = channel.ravel()
        if modality == "ct" and (values >= -1500).any():
            values = values[values >= -1500]
        low, middle, high = np.percentile(values, [0.5, 50, 99.5])
        threshold = -500.0 if modality == "ct" else low + 0.5 * (otsu_by_trial(values, low, high) - low)
        foreground = values[values > threshold] if (values > threshold).any() else values
        expected.append((low, middle, high, values.mean(), values.std(), foreground.mean(), foreground.std()))
        mask |= channel > threshold
    return expected, mask


def assert_agrees(volume, modality):
    stats, box = statistics.describe(volume, modality)
    expected, mask = reference(volume, modality)
    spread = max(1.0, float(np.abs(volume.astype(np.float64)).max()))
    for channel, wanted in zip(stats, expected, strict=True):
        assert dataclasses.astuple(channel) == pytest.approx(wanted, rel=0, abs=1e-12 * spread)
    for axis, (start, stop) in enumerate(box):
        used = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) if mask.any() else [0, mask.shape[axis] - 1]
        assert (start, stop) == (used[0], used[-1] + 1)


def body_in_air(dtype, shape=(1, 30, 64, 61), seed=0):
    random = np.random.RandomState(seed)
    volume = np.abs(random.randn(*shape) * 8)
    volume[:, 5:22, 10:50, 20:41] += 90 + 20 * random.randn(*volume[:, 5:22, 10:50, 20:41].shape)
    return np.clip(volume, 0, 255).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_an_mr_volume_has_the_statistics_of_numpy(dtype):
    assert_agrees(body_in_air(dtype), "mr")  # 119 040 voxels: more than one block would need more than 262 144


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_volume_of_several_blocks_has_the_statistics_of_numpy(dtype):
    assert_agrees(body_in_air(dtype, (2, 40, 100, 100)), "mr")


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_ct_with_padding_has_the_statistics_of_its_inside(dtype):
    volume = (np.random.RandomState(1).randn(1, 20, 40, 40) * 400 - 600).astype(dtype)
    volume[:, :, :5] = -3024
    assert_agrees(volume, "ct")


@pytest.mark.parametrize("value", [-32768, -3024, 0, 32767])
@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_a_constant_volume_has_the_statistics_of_numpy(value, modality):
    assert_agrees(np.full((1, 3, 4, 5), value, np.int16), modality)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "float32"]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    modality=st.sampled_from(["ct", "mr"]),
)
def test_any_small_volume_has_the_statistics_of_numpy(seed, dtype, shape, modality):
    random = np.random.RandomState(seed % 2**32)
    volume = random.choice([-4000, -1000.5, -500, -499, 0, 7, 7.25, 60000], size=shape) * random.randint(0, 2, shape)
    low, high = (-3.4e38, 3.4e38) if dtype == "float32" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    assert_agrees(np.clip(volume, low, high).astype(dtype), modality)


def test_values_are_counted_block_by_block_and_a_number_outside_is_refused():
    array = np.random.RandomState(2).randint(-5, 9, (70, 70, 70)).astype(np.int16)
    assert statistics.count_values(array, -5, 8).tolist() == [int((array == value).sum()) for value in range(-5, 9)]
    with pytest.raises(ValueError, match="holds 8, above 7"):
        statistics.count_values(array, -5, 7)
    with pytest.raises(ValueError, match="negative"):
        statistics.count_values(array, -4, 8)
