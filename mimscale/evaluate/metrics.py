"""Dice, HD95 and NSD of one case, and their means over cases.

What happens to a class that is empty (`null` is JSON's word for "not defined"):

    truth   prediction   dice   nsd    hd95_mm
    empty   empty        null   null   null      nothing to find and nothing claimed: says nothing about the model
    empty   some         0      0      null      a false alarm; its distance to nothing is not a number
    some    empty        0      0      null      missed altogether; the same

A null takes no part in a mean, and each mean carries the number of cases behind it and the number left out.
Since a missed class leaves the HD95 mean, HD95 is only to be read beside Dice and its `undefined` count.

Definitions differ between tools, so that the same masks have other numbers elsewhere. A false alarm is a Dice of 0
here, as in nnU-Net; MONAI's `DiceMetric` leaves every case without the class out of its mean. HD95 is the larger of the
two directed 95th percentiles, as MONAI's; others pool the distances of both directions. NSD counts surface *voxels*, as
MONAI's default does; surface-distance (Nikolov et al. 2018, "Deep learning to achieve clinically applicable
segmentation of head and neck anatomy") weighs by surface area, which on thick slices is another number: 0.66 instead of
0.41 of a sphere of 30 mm that is off by one slice of 5 mm, with a tolerance of 2 mm.

Background has a Dice only: its surface is mostly the edge of the image.

    Z Y X volume, voxels
"""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE_LABEL = 255
# MONAI asks a KD-tree for each surface voxel: about 2 us where surfaces are close, 15 us where they are far apart, so
# the noise of a barely trained network takes minutes a class. Above this many a pass over the volume is cheaper.
MOST_TREE_QUERIES = 200_000
METRICS = ("dice", "hd95_mm", "nsd")


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Scores of one class in one case; None where the metric is not defined."""

    dice: float | None  # 0 to 1
    hd95_mm: float | None  # 95th percentile of the distances between the two surfaces, of the larger direction
    nsd: float | None  # share of the voxels of both surfaces within the tolerance, 0 to 1
    truth_voxels: int
    predicted_voxels: int


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over the cases in which a metric is defined."""

    mean: float | None
    std: float | None  # over cases, n - 1; None below two cases
    cases: int  # behind the mean
    undefined: int  # left out


def score_case(
    prediction: NDArray[np.integer],
    truth: NDArray[np.integer],
    class_names: Sequence[str],
    spacing_mm: Sequence[float],
    nsd_tolerance_mm: float | None,
) -> dict[str, ClassScore]:
    """Score a label map against the truth: class name -> scores.

    Voxels whose truth is `IGNORE_LABEL` count for nothing, whatever was predicted there.

    Args:
        prediction: [Z, Y, X] class numbers.
        truth: [Z, Y, X] class numbers, or IGNORE_LABEL.
        class_names: name of class 0 (background), 1, ...
        spacing_mm: voxel edges in the order of the arrays' axes.
        nsd_tolerance_mm: a surface point counts as right within this distance; None leaves out the surface scores.

    Raises:
        ValueError: the two grids differ, or the truth holds a number that is no class.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is on a grid of {prediction.shape} voxels, the truth on one of {truth.shape}")
    known = truth != IGNORE_LABEL
    highest = int(truth[known].max(initial=0))
    if highest >= len(class_names):
        raise ValueError(f"the truth holds class {highest}, but there are only {len(class_names)}: {class_names}")
    return {
        name: _score_class(
            (prediction == number) & known,
            truth == number,
            spacing_mm,
            # Background's surface is mostly the edge of the image.
            nsd_tolerance_mm if number > 0 else None,
        )
        for number, name in enumerate(class_names)
    }


def score_regions(
    prediction: NDArray[np.integer],
    truth: NDArray[np.integer],
    region_names: Sequence[str],
    classes_of_region: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    nsd_tolerance_mm: float | None,
) -> dict[str, ClassScore]:
    """Score regions that may overlap against the classes that each is made of: region name -> scores.

    Args:
        prediction: [K, Z, Y, X], above 0 inside of a region.
        truth: [Z, Y, X] class numbers, or IGNORE_LABEL, where nothing counts.
        region_names: of the K regions.
        classes_of_region: [K, 256], the classes that belong to each.
        spacing_mm: voxel edges in the order of the arrays' axes.
        nsd_tolerance_mm: a surface point counts as right within this distance; None leaves out the surface scores.

    Raises:
        ValueError: the two grids differ.
    """
    if prediction.shape[1:] != truth.shape:
        raise ValueError(f"prediction is on a grid of {prediction.shape[1:]} voxels, the truth on one of {truth.shape}")
    known = truth != IGNORE_LABEL
    return {
        name: _score_class((inside > 0) & known, members[truth] & known, spacing_mm, nsd_tolerance_mm)
        for name, inside, members in zip(region_names, prediction, classes_of_region, strict=True)
    }


def foreground_names(scores: Mapping[str, Any]) -> list[str]:
    """Of scores.json of a segmentation: its classes without the background, or all of its regions."""
    return list(scores["classes"])[0 if scores.get("regions") else 1 :]


def _score_class(
    predicted: NDArray[np.bool_],
    true: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    nsd_tolerance_mm: float | None,
) -> ClassScore:
    predicted_voxels, truth_voxels = int(predicted.sum()), int(true.sum())
    if predicted_voxels == 0 or truth_voxels == 0:
        zero = None if predicted_voxels == truth_voxels else 0.0
        return ClassScore(
            dice=zero,
            hd95_mm=None,
            nsd=zero if nsd_tolerance_mm is not None else None,
            truth_voxels=truth_voxels,
            predicted_voxels=predicted_voxels,
        )
    import torch
    from monai.metrics import compute_dice

    # All scores see only where a mask is: the rest adds nothing, and MONAI makes float copies of what it gets.
    box = _bounding_box(predicted | true)
    predicted, true = predicted[box], true[box]
    dice = float(compute_dice(torch.from_numpy(predicted)[None, None], torch.from_numpy(true)[None, None]))
    hd95_mm = nsd = None
    if nsd_tolerance_mm is not None:
        spacing = [float(edge) for edge in spacing_mm]
        surfaces = _surface(predicted), _surface(true)
        if sum(int(surface.sum()) for surface in surfaces) <= MOST_TREE_QUERIES:
            hd95_mm, nsd = _surface_scores_by_tree(predicted, true, spacing, nsd_tolerance_mm)
        else:
            hd95_mm, nsd = _surface_scores_by_transform(*surfaces, spacing, nsd_tolerance_mm)
    return ClassScore(dice=dice, hd95_mm=hd95_mm, nsd=nsd, truth_voxels=truth_voxels, predicted_voxels=predicted_voxels)


def _surface_scores_by_tree(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], spacing_mm: list[float], tolerance_mm: float
) -> tuple[float, float]:
    """HD95 (mm) and NSD of two masks [Z, Y, X], neither of them empty, as MONAI computes them."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    a, b = (torch.from_numpy(mask)[None, None] for mask in (predicted, true))  # [1, 1, Z, Y, X]
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 call their own function with an argument that they deprecate; nobody here can change it.
        warnings.filterwarnings("ignore", message="monai.metrics.utils get_mask_edges:always_return_as_numpy")
        hd95_mm = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing_mm)
        nsd = compute_surface_dice(a, b, [tolerance_mm], include_background=True, spacing=spacing_mm)
    return float(hd95_mm), float(nsd)


def _surface_scores_by_transform(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], spacing_mm: list[float], tolerance_mm: float
) -> tuple[float, float]:
    """The same from two *surfaces* [Z, Y, X] by a distance transform: equally fast whatever the surfaces look like."""
    there, back = _distances_mm(predicted, true, spacing_mm), _distances_mm(true, predicted, spacing_mm)
    hd95_mm = max(np.quantile(there, 0.95), np.quantile(back, 0.95))
    close = int((there <= np.float32(tolerance_mm)).sum()) + int((back <= np.float32(tolerance_mm)).sum())
    return float(hd95_mm), close / (there.size + back.size)


def _distances_mm(
    from_surface: NDArray[np.bool_], to_surface: NDArray[np.bool_], spacing_mm: list[float]
) -> NDArray[np.float32]:
    """Distance of each voxel of one surface to the nearest voxel of the other."""
    from scipy.ndimage import distance_transform_edt

    # Each voxel's nearest voxel instead of its distance: that takes 12 bytes a voxel and not about 50.
    nearest = distance_transform_edt(~to_surface, sampling=spacing_mm, return_distances=False, return_indices=True)
    here = np.nonzero(from_surface)
    steps_mm = [(nearest[axis][here] - here[axis]) * edge_mm for axis, edge_mm in enumerate(spacing_mm)]
    return np.asarray(np.sqrt(np.square(steps_mm).sum(axis=0)), dtype=np.float32)  # float32 as MONAI's


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask with a face to the outside; what lies beyond the array is outside."""
    from scipy.ndimage import binary_erosion

    surface: NDArray[np.bool_] = mask & ~binary_erosion(mask)
    return surface


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def mean_over_cases(values: Sequence[float | None]) -> Mean:
    """Mean and spread of the values that are defined."""
    defined = [value for value in values if value is not None]
    assert all(math.isfinite(value) for value in defined), f"a score is not finite: {defined}"
    return Mean(
        mean=statistics.fmean(defined) if defined else None,
        std=statistics.stdev(defined) if len(defined) > 1 else None,
        cases=len(defined),
        undefined=len(values) - len(defined),
    )


def means_per_class(cases: Sequence[dict[str, ClassScore]]) -> dict[str, dict[str, Mean]]:
    """Class name -> metric -> mean over the cases; every case weighs the same."""
    names = list(cases[0]) if cases else []
    return {
        name: {metric: mean_over_cases([getattr(case[name], metric) for case in cases]) for metric in METRICS}
        for name in names
    }


def mean_over_classes(per_class: dict[str, dict[str, Mean]], *, background: bool) -> dict[str, float | None]:
    """Metric -> mean of the classes' means; every class weighs the same, one without a mean takes no part.

    Args:
        per_class: of `means_per_class`; the first class is the background.
        background: whether the background counts as a class.
    """
    names = list(per_class)[0 if background else 1 :]
    means = {}
    for metric in METRICS:
        defined = [mean for name in names if (mean := per_class[name][metric].mean) is not None]
        means[metric] = statistics.fmean(defined) if defined else None
    return means
