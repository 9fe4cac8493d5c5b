import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.models.config import MaskConfig
from mimscale.models.masking import draw_masks, draw_predicted, hidden_units

CROP, PATCH = (32, 96, 64), (4, 16, 16)  # a grid of 8 x 6 x 4 = 192 patches
SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(SEEDS, min_size=1, max_size=5), ratio=st.floats(0.01, 0.99))
def test_every_sample_hides_exactly_the_ratio_of_its_patches(seeds, ratio):
    masks = draw_masks(seeds, CROP, PATCH, MaskConfig(ratio=ratio))
    assert masks.shape == (len(seeds), 192)
    assert set(masks.sum(axis=1)) == {min(max(round(ratio * 192), 1), 191)}


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(SEEDS, min_size=2, max_size=6, unique=True), data=st.data())
def test_a_mask_does_not_depend_on_the_batch_that_a_sample_travels_in(seeds, data):
    together = draw_masks(seeds, CROP, PATCH, MaskConfig())
    order = data.draw(st.permutations(range(len(seeds))))
    shuffled = draw_masks([seeds[i] for i in order], CROP, PATCH, MaskConfig())
    assert np.array_equal(shuffled, together[order])
    assert np.array_equal(draw_masks(seeds[:1], CROP, PATCH, MaskConfig())[0], together[0])


def test_masks_stay_what_they_were_in_earlier_releases():
    mask = draw_masks([7], (4, 4, 4), (2, 2, 1), MaskConfig(ratio=0.5))[0]
    assert mask.astype(int).tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 0]


def test_every_patch_and_every_pair_of_patches_is_hidden_as_often_as_chance_says():
    count, ratio = 4000, 0.75
    masks = draw_masks(range(count), (16, 32, 16), (8, 8, 8), MaskConfig(ratio=ratio)).astype(float)
    L = masks.shape[1]
    hidden = ratio * L
    assert np.abs(masks.mean(axis=0) - ratio).max() < 5 * np.sqrt(ratio * (1 - ratio) / count)
    pairs = (masks.T @ masks / count)[np.triu_indices(L, 1)]
    chance = hidden * (hidden - 1) / (L * (L - 1))
    assert np.abs(pairs - chance).max() < 5 * np.sqrt(chance * (1 - chance) / count)


def test_a_unit_of_several_patches_is_hidden_as_a_whole():
    masks = draw_masks(range(20), CROP, PATCH, MaskConfig(unit_voxels=(8, 32, 32)))
    units = masks.reshape(20, 4, 2, 3, 2, 2, 2).transpose(0, 1, 3, 5, 2, 4, 6).reshape(20, 24, 8)
    assert np.array_equal(units.any(axis=2), units.all(axis=2))
    assert set(masks.sum(axis=1)) == {18 * 8}
    assert len(np.unique(masks, axis=0)) == 20


def test_one_ratio_is_drawn_for_a_batch_and_covers_the_range():
    config = MaskConfig(ratio_range=(0.6, 0.9))
    for ratio_seed in range(3):
        assert len(set(draw_masks(range(4), CROP, PATCH, config, ratio_seed).sum(axis=1))) == 1
    ratios = np.array([hidden_units(10_000, config, seed) for seed in range(2000)]) / 10_000
    assert 0.6 <= ratios.min() < 0.602
    assert 0.898 < ratios.max() <= 0.9
    assert abs(ratios.mean() - 0.75) < 5 * 0.3 / np.sqrt(12 * 2000)


def test_at_least_one_unit_stays_visible_and_one_is_hidden():
    assert hidden_units(4, MaskConfig(ratio=0.99), 0) == 3
    assert hidden_units(4, MaskConfig(ratio=0.01), 0) == 1


def test_a_crop_without_room_for_two_units_is_refused():
    with pytest.raises(ValueError, match="nothing would stay visible"):
        draw_masks([1], (16, 16, 16), (16, 16, 16), MaskConfig())


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.lists(SEEDS, min_size=1, max_size=3), ratio=st.floats(0.01, 0.99), style=st.sampled_from(["block", "grid"])
)
def test_every_style_hides_exactly_the_ratio_and_knows_nothing_of_the_batch(seeds, ratio, style):
    config = MaskConfig(ratio=ratio, style=style)
    masks = draw_masks(seeds, CROP, PATCH, config)
    assert set(masks.sum(axis=1)) == {min(max(round(ratio * 192), 1), 191)}
    assert np.array_equal(draw_masks(seeds[-1:], CROP, PATCH, config)[0], masks[-1])


@pytest.mark.parametrize("style", ["block", "grid"])
def test_every_patch_is_hidden_about_as_often_as_any_other(style):
    masks = draw_masks(range(1000), CROP, PATCH, MaskConfig(ratio=0.6, style=style))
    shares = masks.mean(axis=0)
    # Exactly so for a grid (5 standard deviations of chance); boxes are cut off when enough is hidden, and what is
    # left of the last one lies rather at its rim than in its middle.
    assert np.abs(shares - 115 / 192).max() < (5 * np.sqrt(0.24 / 1000) if style == "grid" else 0.08)


def neighbours_alike(masks):
    """How often neighbours along the axes share their fate."""
    grids = masks.reshape(-1, 8, 6, 4)
    pairs = [np.diff(grids.astype(np.int8), axis=axis) == 0 for axis in (1, 2, 3)]
    return np.concatenate([pair.ravel() for pair in pairs]).mean()


def test_blocks_hang_together_and_grids_do_not():
    shares = {
        style: neighbours_alike(draw_masks(range(300), CROP, PATCH, MaskConfig(ratio=0.5, style=style)))
        for style in ("random", "block", "grid")
    }
    assert shares["random"] == pytest.approx(0.5, abs=0.02)
    assert shares["block"] > 0.65
    assert shares["grid"] < 0.47  # of the 8 places of a cell 4 are hidden: of 7 others, 3 have the same fate


def test_a_grid_shows_the_same_places_of_every_cell():
    masks = draw_masks(range(20), CROP, PATCH, MaskConfig(ratio=0.75, style="grid"))
    cells = masks.reshape(20, 4, 2, 3, 2, 2, 2).transpose(0, 2, 4, 6, 1, 3, 5).reshape(20, 8, 24)
    assert np.array_equal(cells.any(axis=2), cells.all(axis=2))
    assert set(cells.all(axis=2).sum(axis=1)) == {6}
    assert len(np.unique(masks, axis=0)) > 10


def test_the_predicted_patches_are_a_random_part_of_the_hidden_ones():
    seeds = range(4000)
    hidden = draw_masks(seeds, (16, 32, 16), (8, 8, 8), MaskConfig(ratio=0.75))  # 12 of 16
    predicted = draw_predicted(seeds, hidden, 0.5)
    assert not (predicted & ~hidden).any()
    assert set(predicted.sum(axis=1)) == {6}
    assert np.array_equal(draw_predicted([7], hidden[7:8], 0.5)[0], predicted[7])
    # Given that a patch is hidden, chance alone decides: not how early it was hidden.
    shares = predicted.sum(axis=0) / hidden.sum(axis=0)
    assert np.abs(shares - 0.5).max() < 5 * np.sqrt(0.25 / 3000)
    assert set(draw_predicted(seeds, hidden, 0.01).sum(axis=1)) == {1}
