"""Planes that pass: the same numbers as of a whole volume, and no plane kept for longer than it is needed."""

import numpy as np
import pytest
import torch

from mimscale.evaluate.planes import Normalised, Rolling, cut, mean_over_folds
from mimscale.store.intensity import ChannelStats, IntensityContract, normalisation


def chunks(whole, *sizes):
    return iter(torch.split(whole, list(sizes), dim=1))


def test_rolling_planes_are_those_of_the_whole_and_the_ones_before_are_gone():
    whole = torch.randn(2, 12, 3, 4)
    rolling = Rolling(chunks(whole, 5, 1, 4, 2), whole.shape)
    for low, high in [(0, 2), (0, 4), (2, 7), (7, 8), (7, 12), (11, 12)]:
        assert torch.equal(rolling.planes(low, high), whole[:, low:high])
    with pytest.raises(ValueError, match="plane 3 is gone, the first that is kept is 11"):
        rolling.planes(3, 5)


def test_rolling_planes_hold_no_more_than_what_was_asked_for_and_the_rest_of_a_part():
    whole = torch.randn(1, 40, 2, 2)
    rolling = Rolling(chunks(whole, *[4] * 10), whole.shape)
    for low in range(0, 38, 2):
        rolling.planes(low, low + 3)
        assert rolling._stop - rolling._first <= 3 + 4


def test_planes_far_ahead_are_reached_without_keeping_those_between():
    whole = torch.randn(1, 30, 2, 2)
    rolling = Rolling(chunks(whole, *[3] * 10), whole.shape)
    assert torch.equal(rolling.planes(20, 25), whole[:, 20:25])
    assert rolling._first == 20


def test_a_stream_is_cut_to_a_box():
    whole = torch.randn(2, 10, 6, 7)
    parts = list(cut(chunks(whole, 1, 4, 3, 2), (slice(2, 7), slice(0, 5), slice(3, 7))))
    assert torch.equal(torch.cat(parts, dim=1), whole[:, 2:7, 0:5, 3:7])


def test_a_small_volume_lies_in_the_middle_of_its_own_air_and_is_normalised_plane_by_plane():
    raw = np.random.default_rng(0).integers(-900, 900, (2, 5, 9, 4)).astype(np.int16)
    stats = ChannelStats(p0_5=-800, p50=0, p99_5=800, mean=10, std=300, foreground_mean=0, foreground_std=1)
    numbers = normalisation(IntensityContract(kind="zscore"), (stats, stats))
    image = Normalised(raw, -1024.0, numbers, (8, 8, 7))
    assert image.shape == (2, 8, 9, 7)
    assert image.inside == (slice(1, 6), slice(0, 9), slice(1, 5))
    whole = torch.cat([image.planes(0, 3), image.planes(3, 8)], dim=1).numpy()
    wanted = (np.clip(raw, -800, 800) - 10) / 300
    np.testing.assert_allclose(whole[(slice(None), *image.inside)], wanted, rtol=1e-5, atol=1e-6)  # float32
    outside = np.ones(whole.shape[1:], dtype=bool)
    outside[image.inside] = False
    assert np.allclose(whole[:, outside], -810 / 300)


def test_one_network_passes_as_it_is():
    whole = torch.randn(3, 6, 2, 2)
    assert torch.equal(
        torch.cat(list(mean_over_folds([chunks(whole, 4, 2)], whole.shape, overlapping=False)), 1), whole
    )


@pytest.mark.parametrize("overlapping", [False, True])
def test_folds_answer_with_the_mean_of_their_probabilities(overlapping):
    torch.manual_seed(0)
    folds = [4 * torch.randn(3, 9, 4, 5) for _ in range(3)]
    streams = [chunks(folds[0], 4, 5), chunks(folds[1], 1, 7, 1), chunks(folds[2], 9)]
    merged = torch.cat(list(mean_over_folds(streams, folds[0].shape, overlapping=overlapping)), dim=1)
    to_probabilities = torch.sigmoid if overlapping else (lambda logits: torch.softmax(logits, dim=0))
    wanted = sum(to_probabilities(fold.double()) for fold in folds) / 3
    torch.testing.assert_close(to_probabilities(merged.double()), wanted, rtol=1e-5, atol=1e-6)  # float32


def test_a_voxel_that_all_folds_are_sure_of_stays_a_number_that_decides():
    sure = torch.tensor([200.0, -200.0]).view(2, 1, 1, 1)
    for overlapping in (False, True):
        (merged,) = mean_over_folds([chunks(sure, 1), chunks(sure, 1)], sure.shape, overlapping=overlapping)
        assert not torch.isnan(merged).any()
        assert merged[0] > 0 if overlapping else merged[0] > merged[1]
