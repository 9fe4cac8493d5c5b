import json
from dataclasses import asdict

import numpy as np
import pytest

from mimscale.evaluate.metrics import (
    IGNORE_LABEL,
    ClassScore,
    foreground_names,
    mean_over_cases,
    mean_over_classes,
    means_per_class,
    score_case,
    score_regions,
)

NAMES = ("background", "grey", "white")


def label_map(shape=(12, 14, 10), **boxes):
    volume = np.zeros(shape, np.uint8)
    for name, box in boxes.items():
        volume[box] = NAMES.index(name)
    return volume


def box(z, y, x, edge):
    return (slice(z, z + edge), slice(y, y + edge), slice(x, x + edge))


def score(prediction, truth, spacing_mm=(1.0, 1.0, 1.0), tolerance_mm=1.0):
    return score_case(prediction, truth, NAMES, spacing_mm, tolerance_mm)


def test_a_perfect_prediction_scores_one_and_no_distance():
    truth = label_map(grey=box(2, 2, 2, 4))
    grey = score(truth, truth)["grey"]
    assert (grey.dice, grey.hd95_mm, grey.nsd) == (1.0, 0.0, 1.0)
    assert grey.truth_voxels == grey.predicted_voxels == 64


def test_dice_is_twice_the_shared_voxels_over_both():
    truth, prediction = label_map(grey=box(2, 2, 2, 4)), label_map(grey=box(3, 2, 2, 4))
    assert score(prediction, truth)["grey"].dice == pytest.approx(2 * 48 / 128)


def test_a_shift_by_one_voxel_is_as_far_as_that_axis_is_coarse():
    truth, prediction = label_map(grey=box(2, 2, 2, 4)), label_map(grey=box(3, 2, 2, 4))
    grey = score(prediction, truth, spacing_mm=(5.0, 1.0, 1.0))["grey"]
    # All but the shifted face is within 5 mm; along the other axes the surfaces touch.
    assert grey.hd95_mm == pytest.approx(5.0)
    same = score(prediction, truth, spacing_mm=(1.0, 5.0, 5.0))["grey"]
    assert same.hd95_mm == pytest.approx(1.0)


def test_nsd_counts_surface_voxels_within_the_tolerance():
    # One-voxel masks 3 mm apart: every surface voxel is 3 mm from the other surface.
    truth, prediction = label_map(grey=box(2, 2, 2, 1)), label_map(grey=box(5, 2, 2, 1))
    assert score(prediction, truth, tolerance_mm=2.9)["grey"].nsd == 0.0
    assert score(prediction, truth, tolerance_mm=3.0)["grey"].nsd == 1.0


def test_a_class_in_neither_map_has_no_score():
    empty = label_map(grey=box(2, 2, 2, 4))
    white = score(empty, empty)["white"]
    assert (white.dice, white.hd95_mm, white.nsd) == (None, None, None)


def test_a_missed_class_scores_zero_and_has_no_distance():
    truth = label_map(grey=box(2, 2, 2, 4), white=box(7, 7, 2, 2))
    white = score(label_map(grey=box(2, 2, 2, 4)), truth)["white"]
    assert (white.dice, white.hd95_mm, white.nsd) == (0.0, None, 0.0)
    assert (white.truth_voxels, white.predicted_voxels) == (8, 0)


def test_a_false_alarm_scores_zero_and_has_no_distance():
    prediction = label_map(grey=box(2, 2, 2, 4), white=box(7, 7, 2, 2))
    white = score(prediction, label_map(grey=box(2, 2, 2, 4)))["white"]
    assert (white.dice, white.hd95_mm, white.nsd) == (0.0, None, 0.0)


def test_background_has_a_dice_and_no_surface_scores():
    truth = label_map(grey=box(2, 2, 2, 4))
    background = score(truth, truth)["background"]
    assert (background.dice, background.hd95_mm, background.nsd) == (1.0, None, None)


def test_voxels_to_be_ignored_count_for_nothing_whatever_is_predicted_there():
    truth = label_map(grey=box(2, 2, 2, 4))
    truth[8:, :, :] = IGNORE_LABEL
    wild = label_map(grey=box(2, 2, 2, 4))
    wild[8:, :, :] = NAMES.index("white")
    scores = score(wild, truth)
    assert scores["grey"].dice == 1.0
    assert scores["background"].dice == 1.0
    assert scores["white"].dice is None


def test_two_grids_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) voxels, the truth on one of \(4, 4, 5\)"):
        score(np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 5), np.uint8))


def test_a_truth_with_an_unknown_class_is_refused():
    truth = np.full((4, 4, 4), 3, np.uint8)
    with pytest.raises(ValueError, match="holds class 3, but there are only 3"):
        score(np.zeros_like(truth), truth)


def case(**dice):
    return {
        name: ClassScore(dice=value, hd95_mm=None, nsd=value, truth_voxels=1, predicted_voxels=1)
        for name, value in dice.items()
    }


def test_a_mean_leaves_out_what_is_not_defined_and_says_how_many():
    mean = mean_over_cases([0.5, None, 1.0])
    assert (mean.mean, mean.cases, mean.undefined) == (0.75, 2, 1)
    assert mean.std == pytest.approx(0.35355339)


def test_a_mean_of_nothing_is_null_and_not_nan():
    mean = mean_over_cases([None, None])
    assert (mean.mean, mean.std, mean.cases, mean.undefined) == (None, None, 0, 2)
    json.dumps(asdict(mean), allow_nan=False)


def test_one_case_has_a_mean_and_no_spread():
    assert mean_over_cases([0.5]).std is None


def test_the_mean_over_classes_weighs_every_class_the_same_however_many_cases_have_it():
    cases = [case(background=1.0, grey=0.8, white=None), case(background=1.0, grey=0.6, white=0.1)]
    per_class = means_per_class(cases)
    assert mean_over_classes(per_class, background=False)["dice"] == pytest.approx((0.7 + 0.1) / 2)
    assert mean_over_classes(per_class, background=True)["dice"] == pytest.approx((1.0 + 0.7 + 0.1) / 3)


def test_a_metric_that_no_class_has_is_null():
    assert mean_over_classes(means_per_class([case(background=1.0, grey=0.8)]), background=False)["hd95_mm"] is None


def members(*regions):
    table = np.zeros((len(regions), 256), bool)
    for number, classes in enumerate(regions):
        table[number, list(classes)] = True
    return table


def test_regions_have_the_scores_of_their_masks_and_share_voxels():
    truth = label_map(grey=box(2, 2, 2, 6), white=box(3, 3, 3, 2))
    prediction = np.stack([truth > 0, np.roll(truth == 2, 1, axis=0)])
    scores = score_regions(prediction, truth, ["all", "core"], members((1, 2), (2,)), (5.0, 1.0, 1.0), 1.0)
    assert (scores["all"].dice, scores["all"].hd95_mm, scores["all"].nsd) == (1.0, 0.0, 1.0)
    # One mask by itself has the same scores as the only class of a label map.
    alone = score((prediction[1] * 2).astype(np.uint8), (truth == 2).astype(np.uint8) * 2, (5.0, 1.0, 1.0))["white"]
    assert scores["core"] == alone
    assert alone.dice == 0.5


def test_nothing_counts_in_a_region_where_the_truth_is_unknown():
    truth = label_map(grey=box(2, 2, 2, 4))
    truth[2] = IGNORE_LABEL
    prediction = (truth > 0)[None]
    prediction[0, :3] = True
    scores = score_regions(prediction, truth, ["all"], members((1, 2)), (1.0, 1.0, 1.0), None)
    assert scores["all"].truth_voxels == 48
    assert scores["all"].predicted_voxels == 48 + 2 * 14 * 10
    with pytest.raises(ValueError, match=r"grid of \(3, 14, 10\) voxels, the truth on one of"):
        score_regions(prediction[:, :3], truth, ["all"], members((1,)), (1.0, 1.0, 1.0), None)


def test_of_classes_the_first_is_the_background_and_of_regions_none():
    assert foreground_names({"classes": ["air", "grey"]}) == ["grey"]
    assert foreground_names({"classes": ["all", "core"], "regions": {"all": ["a"], "core": ["b"]}}) == ["all", "core"]
