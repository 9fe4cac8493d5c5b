"""HD95 and NSD against a brute-force definition, and against MONAI on the uncropped volume."""

import warnings

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from mimscale.evaluate import metrics
from mimscale.evaluate.metrics import score_case

SPACING_MM = (3.0, 1.0, 0.5)
NAMES = ("background", "blob")


def two_blobs(seed):
    noise = np.random.default_rng(seed)
    truth = np.zeros((10, 16, 14), np.uint8)
    truth[2:7, 3:12, 4:11] = 1
    prediction = np.roll(truth, (1, -2, 1), axis=(0, 1, 2))
    prediction[noise.random(truth.shape) < 0.01] = 1
    truth[0, :, :3] = 1  # touches the edge of the volume, where a surface is easily lost
    return prediction, truth


def surface_mm(mask):
    return np.argwhere(mask & ~binary_erosion(mask)) * np.array(SPACING_MM)


@pytest.mark.parametrize("most_tree_queries", [0, 10**9], ids=["transform", "tree"])
@pytest.mark.parametrize("seed", range(3))
def test_surface_scores_equal_their_definition(seed, most_tree_queries, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_TREE_QUERIES", most_tree_queries)
    prediction, truth = two_blobs(seed)
    between = cdist(surface_mm(prediction == 1), surface_mm(truth == 1))
    there, back = between.min(axis=1), between.min(axis=0)
    hd95_mm = max(np.quantile(there, 0.95), np.quantile(back, 0.95))
    nsd = ((there <= 2.0).sum() + (back <= 2.0).sum()) / (there.size + back.size)

    blob = score_case(prediction, truth, NAMES, SPACING_MM, 2.0)["blob"]

    # float32 distances of a few mm
    assert blob.hd95_mm == pytest.approx(hd95_mm, rel=1e-5)
    assert blob.nsd == pytest.approx(nsd, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_looking_only_at_the_masks_box_changes_no_score(seed):
    prediction, truth = two_blobs(seed)
    masks = [torch.from_numpy(volume == 1)[None, None] for volume in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="monai.metrics.utils get_mask_edges:always_return_as_numpy")
        hd95_mm = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING_MM)
        nsd = compute_surface_dice(*masks, [2.0], include_background=True, spacing=SPACING_MM)
    blob = score_case(prediction, truth, NAMES, SPACING_MM, 2.0)["blob"]
    assert (blob.hd95_mm, blob.nsd) == (float(hd95_mm), float(nsd))


@pytest.mark.parametrize("tolerance_mm", [0.5, 1.0, 2.1, 3.0])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_transform_and_monais_tree_give_the_same_scores_of_noise(share, tolerance_mm, monkeypatch):
    # Spacings and tolerances of which multiples are no binary fractions: a distance of exactly the tolerance counts.
    noise = np.random.default_rng(7)
    prediction, truth = ((noise.random((14, 15, 16)) < share).astype(np.uint8) for _ in range(2))
    scores = []
    for most in (0, 10**9):
        monkeypatch.setattr(metrics, "MOST_TREE_QUERIES", most)
        scores.append(score_case(prediction, truth, NAMES, (0.7, 1.0, 2.1), tolerance_mm)["blob"])
    assert scores[0].hd95_mm == pytest.approx(scores[1].hd95_mm, rel=1e-6)  # float32
    assert scores[0].nsd == pytest.approx(scores[1].nsd, rel=1e-6)


def test_nsd_of_thick_slices_counts_voxels_and_is_not_that_of_areas():
    """The numbers that the module's docstring gives: a sphere of 30 mm, one slice of 5 mm off, tolerance 2 mm."""
    spacing_mm = (5.0, 0.8, 0.8)
    z, y, x = (np.arange(count) * edge for count, edge in zip((18, 84, 84), spacing_mm, strict=True))
    truth = (z[:, None, None] - 40) ** 2 + (y[:, None] - 33.6) ** 2 + (x - 33.6) ** 2 <= 30**2
    masks = np.roll(truth, 1, axis=0), truth
    sphere = score_case(*(mask.astype(np.uint8) for mask in masks), NAMES, spacing_mm, 2.0)["blob"]
    tensors = [torch.from_numpy(mask)[None, None] for mask in masks]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="monai.metrics.utils get_mask_edges:always_return_as_numpy")
        by_area = compute_surface_dice(*tensors, [2.0], include_background=True, spacing=spacing_mm, use_subvoxels=True)
    assert sphere.nsd == pytest.approx(0.41, abs=0.01)
    assert float(by_area) == pytest.approx(0.66, abs=0.01)


def test_a_false_alarm_has_a_dice_of_zero_where_monais_metric_leaves_the_case_out():
    prediction, truth = np.zeros((2, 4, 4, 4), np.uint8)
    prediction[0, 0, 0] = 1
    masks = [torch.from_numpy(volume == 1)[None, None] for volume in (prediction, truth)]
    assert score_case(prediction, truth, NAMES, SPACING_MM, 2.0)["blob"].dice == 0.0
    assert torch.isnan(DiceMetric()(*masks)).all()
