"""Scores of probes against scikit-learn, plain loops and known values; intervals that know of subjects."""

import numpy as np
import pytest
from sklearn import metrics

from mimscale.targets.scores import (
    auc,
    balanced_accuracy,
    brier,
    calibration_error,
    classes_auc,
    draw_weights,
    drawn,
    mean_absolute_error,
    r2,
)

N, DRAWS = 60, 25


@pytest.fixture
def cases():
    random = np.random.default_rng(3)
    truth = random.integers(0, 3, N)
    probabilities = random.dirichlet(np.ones(3), N).round(1)  # rounded: ties
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    weights = random.integers(0, 4, (DRAWS, N)).astype(float)
    return probabilities, truth, weights


def test_auc_with_ties_and_weights_is_that_of_scikit_learn(cases):
    probabilities, truth, weights = cases
    scores, positive = probabilities[:, 1], truth == 1
    expected = [metrics.roc_auc_score(positive, scores, sample_weight=draw) for draw in weights]
    np.testing.assert_allclose(auc(scores, positive, weights), expected, rtol=1e-12)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    # Pairs: (0.4, 0.1) right, (0.4, 0.4) half, (0.8, 0.1) and (0.8, 0.4) right.
    assert auc(scores, positive, np.ones((1, 4))) == pytest.approx(3.5 / 4)


def test_auc_compares_cases_of_one_fold_only(cases):
    probabilities, truth, weights = cases
    scores, positive, fold = probabilities[:, 1], truth == 1, np.random.default_rng(9).integers(0, 4, N)
    for draw, found in zip(weights, auc(scores, positive, weights, fold), strict=True):
        right = pairs = 0.0
        for i in np.flatnonzero(positive):
            for j in np.flatnonzero(~positive & (fold == fold[i])):
                pairs += draw[i] * draw[j]
                right += draw[i] * draw[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
        assert found == pytest.approx(right / pairs)


def test_a_predictor_that_sees_nothing_is_chance_over_folds_although_its_scores_follow_them():
    truth = np.array([1, 1, 0, 0, 0, 1])
    shares = np.array([1 / 3] * 3 + [2 / 3] * 3)  # of the training cases: low where the fold has many positive cases
    assert auc(shares, truth == 1, np.ones((1, 6))) == pytest.approx(1 / 3)
    assert auc(shares, truth == 1, np.ones((1, 6)), np.array([0, 0, 0, 1, 1, 1])) == 0.5


def test_the_auc_of_several_classes_is_the_mean_of_each_against_the_rest(cases):
    probabilities, truth, _ = cases
    expected = metrics.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert classes_auc(probabilities, truth, np.ones((1, N))) == pytest.approx(expected)


def test_balanced_accuracy_is_that_of_scikit_learn(cases):
    probabilities, truth, weights = cases
    guess = probabilities.argmax(axis=1)
    expected = [metrics.balanced_accuracy_score(truth, guess, sample_weight=draw) for draw in weights]
    np.testing.assert_allclose(balanced_accuracy(probabilities, truth, weights), expected, rtol=1e-12)


def test_brier_is_that_of_scikit_learn_for_two_classes_and_a_plain_sum_for_more(cases):
    probabilities, truth, weights = cases
    two = np.stack([1 - probabilities[:, 1], probabilities[:, 1]], axis=1)
    expected = [metrics.brier_score_loss(truth == 1, two[:, 1], sample_weight=draw) for draw in weights]
    np.testing.assert_allclose(brier(two, (truth == 1).astype(np.int64), weights), expected, rtol=1e-12)
    slow = [sum((p - (k == t)) ** 2 for k, p in enumerate(row)) for row, t in zip(probabilities, truth, strict=True)]
    np.testing.assert_allclose(brier(probabilities, truth, weights), weights @ slow / weights.sum(axis=1), rtol=1e-12)


def test_calibration_error_is_that_of_a_plain_loop_over_bins(cases):
    _, truth, weights = cases
    probabilities = np.random.default_rng(8).dirichlet(np.ones(3), N)  # none at the edge of a bin
    for draw, found in zip(weights, calibration_error(probabilities, truth, weights, bins=5), strict=True):
        total = 0.0
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            inside = [i for i in range(N) if low < probabilities[i].max() <= low + 0.2]
            gap = sum(draw[i] * ((probabilities[i].argmax() == truth[i]) - probabilities[i].max()) for i in inside)
            total += abs(gap)
        assert found == pytest.approx(total / draw.sum())


def test_a_probe_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    probabilities = np.tile([0.25, 0.75], (8, 1))
    truth = np.array([1, 1, 1, 0, 1, 1, 1, 0])
    assert calibration_error(probabilities, truth, np.ones((1, 8)), bins=10) == pytest.approx(0)
    assert calibration_error(probabilities, 1 - truth, np.ones((1, 8)), bins=10) == pytest.approx(0.5)


def test_scores_of_numbers_are_those_of_scikit_learn(cases):
    random = np.random.default_rng(4)
    truth, predicted, weights = random.normal(1000, 3, N), random.normal(1000, 3, N), cases[2]
    expected = [metrics.mean_absolute_error(truth, predicted, sample_weight=draw) for draw in weights]
    np.testing.assert_allclose(mean_absolute_error(predicted, truth, weights), expected, rtol=1e-9)
    expected = [metrics.r2_score(truth, predicted, sample_weight=draw) for draw in weights]
    np.testing.assert_allclose(r2(predicted, truth, weights), expected, rtol=1e-6)


def test_what_a_draw_does_not_define_takes_no_part():
    truth = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    weights = np.array([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    for score in (classes_auc, balanced_accuracy):
        assert np.isfinite(score(probabilities, truth, weights)).tolist() == [True, False, False]
    assert np.isnan(r2(np.zeros(3), np.full(3, 7.0), np.ones((1, 3)))).all()
    found = drawn(lambda w: classes_auc(probabilities, truth, w), ["a", "a", "b", "b"], 400, seed=0).interval(0.95)
    assert found.value == pytest.approx(0.75)
    assert 100 < found.draws < 300  # half of all draws hold one subject, and so one class, only


def test_a_draw_takes_all_cases_of_a_subject_together():
    subjects = ["a", "b", "a", "c", "b", "a"]
    weights = np.concatenate(list(draw_weights(subjects, 200, seed=1)))
    assert weights.shape == (200, 6)
    for first, second in ((0, 2), (0, 5), (1, 4)):
        assert np.array_equal(weights[:, first], weights[:, second])
    assert np.array_equal(weights[:, 0] + weights[:, 1] + weights[:, 3], np.full(200, 3))
    assert np.array_equal(weights, np.concatenate(list(draw_weights(subjects, 200, seed=1))))


def test_an_interval_is_wider_when_cases_are_repeats_of_few_subjects():
    random = np.random.default_rng(5)
    of_subject = random.normal(0, 1, 12)
    values, subjects = np.repeat(of_subject, 20), np.repeat(np.arange(12), 20).astype(str).tolist()

    def width(names):
        found = drawn(lambda w: mean_absolute_error(values, np.zeros(240), w), names, 500, seed=0).interval(0.95)
        return found.high - found.low

    alone = [str(index) for index in range(240)]
    assert width(subjects) / width(alone) == pytest.approx(np.sqrt(20), rel=0.3)


def test_95_percent_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(6)
    names = [str(index) for index in range(80)]
    held = 0
    for trial in range(150):
        values = np.abs(random.normal(0, 1, 80))
        found = drawn(lambda w, v=values: mean_absolute_error(v, np.zeros(80), w), names, 300, seed=trial).interval(
            0.95
        )
        held += found.low <= np.sqrt(2 / np.pi) <= found.high
    # Of 150 binomial trials of 0.95 (0.93 for percentiles of 80 cases) 3 standard deviations are 8.
    assert 131 <= held <= 149


def test_a_difference_of_two_scores_of_the_same_cases_is_surer_than_their_intervals():
    random = np.random.default_rng(7)
    truth, names = random.normal(0, 1, 50), [str(index) for index in range(50)]
    noise = random.normal(0, 5, 50)
    ours = drawn(lambda w: mean_absolute_error(truth + noise, truth, w), names, 300, seed=0)
    theirs = drawn(lambda w: mean_absolute_error(truth + noise * 1.01, truth, w), names, 300, seed=0)
    difference = ours.minus(theirs, 0.95)
    assert difference.high < 0
    assert difference.high - difference.low < 0.05 * (ours.interval(0.95).high - ours.interval(0.95).low)
