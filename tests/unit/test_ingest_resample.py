import math
import tracemalloc

import numpy as np
import pytest

from mimscale.ingest import resample
from mimscale.ingest.assemble import _classes
from mimscale.ingest.resample import blur_sigma, new_size, positions, resample_classes, resample_intensities


def ramp(shape, slope=(3.0, -2.0, 0.5)):
    """Values that grow linearly along every axis: float32 [1, Z, Y, X]."""
    axes = np.meshgrid(*(np.arange(edge) for edge in shape), indexing="ij")
    return sum(step * axis for step, axis in zip(slope, axes, strict=True)).astype(np.float32)[None]


def test_two_grids_of_an_axis_share_their_centre():
    assert positions(5, 3, 2.0).tolist() == [0, 2, 4]
    assert positions(4, 2, 2.0).tolist() == [0.5, 2.5]
    assert positions(2, 4, 0.5).tolist() == [-0.25, 0.25, 0.75, 1.25]
    there = positions(57, 23, 2.5)
    back = positions(23, 57, 1 / 2.5)
    assert np.allclose(np.interp(there, np.arange(57), back), np.arange(23))


def test_a_new_axis_is_as_long_as_the_old_one_to_half_a_voxel():
    for size in range(1, 60):
        for step in (0.3, 0.77, 1.5, 2.0, 2.9):
            if size / step >= 0.5:
                assert abs(new_size(size, step) * step - size) <= step / 2 + 1e-9


@pytest.mark.parametrize("steps", [(0.5, 0.5, 0.5), (1.5, 2.0, 1.25), (0.7, 1.0, 2.0)])
def test_a_linear_ramp_keeps_its_value_at_every_place(steps):
    shape = (40, 44, 48)
    new = tuple(new_size(edge, step) for edge, step in zip(shape, steps, strict=True))
    resampled = resample_intensities(ramp(shape), new, steps)[0]
    places = [positions(*one) for one in zip(shape, new, steps, strict=True)]
    z, y, x = np.meshgrid(*places, indexing="ij")
    # Where the Gaussian and the interpolation see no edge of the volume.
    inner = np.ix_(*((place > 6) & (place < edge - 7) for place, edge in zip(places, shape, strict=True)))
    assert resampled[inner].size > 1000
    assert np.allclose(resampled[inner], (3 * z - 2 * y + 0.5 * x)[inner], rtol=0, atol=1e-3)


def test_the_blur_turns_the_width_of_an_old_voxel_into_that_of_a_new_one():
    full_width = 2 * math.sqrt(2 * math.log(2))
    for step in (1.2, 2.0, 5.0):
        assert 1 + (full_width * blur_sigma(step)) ** 2 == pytest.approx(step**2)
    assert blur_sigma(1.0) == blur_sigma(0.5) == 0


def test_fine_structure_does_not_come_back_as_a_false_pattern():
    stripes = np.zeros((1, 8, 8, 90), dtype=np.float32)
    stripes[..., ::2] = 1
    coarse = resample_intensities(stripes, (8, 8, 30), (1.0, 1.0, 3.0))
    assert coarse[..., 2:-2].std() < 0.02
    assert coarse[..., 2:-2].mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_the_dtype_stays_and_no_value_leaves_the_range_of_its_channel(dtype):
    volume = np.zeros((2, 20, 20, 20), dtype=dtype)
    high = np.iinfo(dtype).max if dtype != np.float32 else 1e4
    volume[0, 5:15, 5:15, 5:15] = high
    volume[1, 5:15, 5:15, 5:15] = 7
    for step in (0.6, 1.0, 1.9):
        new = new_size(20, step)
        resampled = resample_intensities(volume, (new, new, new), (step, step, step))
        assert resampled.dtype == dtype
        assert (resampled[0].min(), resampled[0].max()) == (0, high)
        assert (resampled[1].min(), resampled[1].max()) == (0, 7)


def test_padding_is_not_mixed_with_what_was_measured():
    volume = np.full((1, 24, 24, 24), -1000, dtype=np.int16)
    volume[0, :, 8:16, 8:16] = 60
    volume[0, :, :, :5] = -3024
    for step in (0.7, 1.6):
        new = new_size(24, step)
        resampled = resample_intensities(volume, (new, new, new), (step, step, step), padding_below=-1500)
        assert set(np.unique(resampled[resampled < -1000])) == {-3024}
        assert resampled.max() == 60
        two = volume.copy()
        two[0, 3, 3, 3] = -2000  # a scanner with two numbers for it: nothing between -1500 and -1000
        resampled = resample_intensities(two, (new, new, new), (step, step, step), padding_below=-1500)
        assert not ((resampled >= -1500) & (resampled < -1000)).any()
        assert resampled.min() == -3024
        mixed = resample_intensities(volume, (new, new, new), (step, step, step))
        assert ((mixed > -3024) & (mixed < -1000)).any(), "without the number there would be values of neither"


def test_padding_that_the_header_names_stays_that_number():
    volume = np.full((1, 24, 24, 24), 300, dtype=np.int16)
    volume[0, :, :, :7] = 0
    new, step = (15, 15, 15), 1.6
    resampled = resample_intensities(volume, new, (step,) * 3, padding_value=0)
    assert set(np.unique(resampled)) == {0, 300}


@pytest.mark.parametrize("steps", [(2.0, 2.0, 2.0), (1.7, 0.6, 1.0)])
def test_resampling_commutes_with_flips(steps):
    random = np.random.RandomState(0)
    volume = (random.rand(1, 20, 22, 25) * 1000).astype(np.int16)
    classes = random.randint(0, 3, (20, 22, 25)).astype(np.uint8)
    new = tuple(new_size(edge, step) for edge, step in zip(volume.shape[1:], steps, strict=True))
    there = resample_intensities(volume, new, steps).astype(int)
    flipped = resample_intensities(volume[:, ::-1, ::-1, ::-1], new, steps)[:, ::-1, ::-1, ::-1]
    assert np.abs(there - flipped).max() <= 1  # rounding
    labels = resample_classes(classes, new, steps)
    assert (labels == resample_classes(classes[::-1, ::-1, ::-1], new, steps)[::-1, ::-1, ::-1]).mean() > 0.999


def test_a_label_map_is_not_moved_when_two_voxels_become_one():
    classes = np.zeros((40, 40, 40), dtype=np.uint8)
    classes[10:30, 12:28, 14:26] = 3
    coarse = resample_classes(classes, (20, 20, 20), (2.0, 2.0, 2.0))
    assert np.argwhere(coarse).min(axis=0).tolist() == [5, 6, 7]
    assert np.argwhere(coarse).max(axis=0).tolist() == [14, 13, 12]
    assert set(np.unique(coarse)) == {0, 3}


def test_a_slab_is_a_part_of_the_whole_bit_for_bit(monkeypatch):
    volume = (np.random.RandomState(3).rand(1, 33, 20, 21) * 1000).astype(np.float32)
    classes = np.digitize(volume[0], [300, 700]).astype(np.uint8)
    shape, steps = (15, 27, 10), (2.2, 0.75, 2.1)
    whole = resample_intensities(volume, shape, steps), resample_classes(classes, shape, steps)
    monkeypatch.setattr(resample, "SLAB_BYTES", 1)  # a plane at a time
    assert np.array_equal(resample_intensities(volume, shape, steps), whole[0])
    assert np.array_equal(resample_classes(classes, shape, steps), whole[1])


def peak_bytes(work):
    """What `work` allocates at most at once, with its result."""
    tracemalloc.start()
    try:
        result = work()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", [0.8, 1.5])
def test_resampling_holds_its_result_and_a_few_slabs(monkeypatch, step):
    monkeypatch.setattr(resample, "SLAB_BYTES", 2**20)
    volume = np.zeros((1, 200, 128, 120), dtype=np.int16)
    volume[0, :, 20:90, 20:90] = 500
    volume[0, :, :10] = -3000
    labels = (volume[0] > 0).astype(np.uint8)
    shape = tuple(new_size(edge, step) for edge in volume.shape[1:])
    for work in (
        lambda: resample_intensities(volume, shape, (step,) * 3, padding_below=-1500),
        lambda: resample_classes(labels, shape, (step,) * 3),
    ):
        peak, result = peak_bytes(work)
        assert peak < result.nbytes + 12 * 2**20


def test_counting_the_values_of_a_label_map_takes_a_fraction_of_its_memory():
    labels = np.zeros((200, 200, 200), dtype=np.uint8)
    labels[40:60] = 2
    peak, classes = peak_bytes(lambda: _classes(labels, {}, 3))
    assert np.array_equal(classes, labels)
    assert peak < labels.nbytes
