"""From the planes of slices to one even grid, or to the reason why there is none.

SliceThickness and SpacingBetweenSlices are never asked: both are wrong often, and positions never lie about themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest.formats.reasons import QuarantineError
from mimscale.ingest.formats.voxels import lps_to_ras

FEWEST_SLICES = 4
# Slices that point the same way: at 250 mm from the centre of rotation this moves a voxel by a quarter millimetre.
ORIENTATION_TOLERANCE = 1e-3
SAME_POSITION_MM = 0.01
# How far a slice may lie from where an even stack has it. Positions are often rounded to 0.1 mm, and oblique MR of some
# scanners jitters by 0.07 mm; thick slices may be off by more, thin ones by no more than a quarter of themselves.
_POSITION_TOLERANCE_MM = 0.1
_OF_THICK_SLICES = 0.02
_OF_THIN_SLICES = 0.25
_FARTHEST_MM = 1e6
_SPACING_TOLERANCE = 1e-3  # relative


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where the pixels of one slice lie: LPS, mm."""

    position: tuple[float, ...]  # of the centre of the first pixel: [3]
    directions: tuple[float, ...]  # along a row, then along a column: [6]
    spacing_mm: tuple[float, ...]  # between rows, then between columns: [2]

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across the slice: [3]."""
        return np.cross(self.directions[:3], self.directions[3:])

    @property
    def depth_mm(self) -> float:
        """Where the slice lies along its normal."""
        return float(np.dot(self.position, self.normal))


def same_orientation(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two pairs of directions [6] are those of parallel slices, turned the same way."""
    return bool(np.abs(np.subtract(one, other)).max() <= ORIENTATION_TOLERANCE)


def stack(planes: Sequence[Plane]) -> tuple[list[int], NDArray[np.float64]]:
    """The order of slices along their normal, and voxel (column, row, slice) -> RAS+, mm: [4, 4].

    Raises:
        QuarantineError: one of the reasons for DICOM series, or bad_affine.
    """
    first = planes[0]
    positions = np.array([plane.position for plane in planes])
    if max(np.abs(positions).max(), np.abs([plane.directions for plane in planes]).max()) > _FARTHEST_MM:
        raise QuarantineError("bad_affine", "a position that is out of this world")
    rows, columns = np.array(first.directions).reshape(2, 3)
    lengths = np.linalg.norm([rows, columns], axis=1)
    if np.abs(lengths - 1).max() > ORIENTATION_TOLERANCE or abs(rows @ columns) > ORIENTATION_TOLERANCE:
        raise QuarantineError("bad_affine", "ImageOrientationPatient is no pair of unit vectors at right angles")
    if not all(same_orientation(first.directions, plane.directions) for plane in planes):
        raise QuarantineError("mixed_orientations", f"{len(planes)} slices are not parallel")
    if not np.allclose([plane.spacing_mm for plane in planes], first.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
        raise QuarantineError("mixed_grids", "pixel spacing differs between slices")
    normal = first.normal / np.linalg.norm(first.normal)
    depths = positions @ normal
    order = np.argsort(depths, kind="stable")
    positions, depths = positions[order], depths[order]
    step_mm = _even_step_mm(depths)
    _require_straight(positions, depths, normal, _tolerance_mm(step_mm))
    affine = np.eye(4)
    row_mm, column_mm = first.spacing_mm
    affine[:3, 0], affine[:3, 1] = rows * column_mm, columns * row_mm  # a step along a row is one between columns
    affine[:3, 2], affine[:3, 3] = normal * step_mm, positions[0]
    return [int(index) for index in order], lps_to_ras(affine)


def _even_step_mm(depths: NDArray[np.float64]) -> float:
    """The distance between slices, from the first to the last of them: sorted depths [n]."""
    gaps = np.diff(depths)
    distinct = 1 + int(np.count_nonzero(gaps > SAME_POSITION_MM))
    if distinct < FEWEST_SLICES:
        raise QuarantineError("too_few_slices", f"{len(depths)} slices at {distinct} positions, {FEWEST_SLICES} needed")
    if distinct < len(depths):
        runs = np.diff(np.flatnonzero(np.concatenate([[True], gaps > SAME_POSITION_MM, [True]])))
        if (runs == runs[0]).all():
            raise QuarantineError("time_series", f"{runs[0]} slices at each of {distinct} positions")
        raise QuarantineError("duplicate_positions", f"{len(depths)} slices at {distinct} positions")
    median_mm = float(np.median(gaps))
    slices = gaps / median_mm
    tolerance_mm = _tolerance_mm(median_mm)
    whole = np.abs(gaps - np.rint(slices) * median_mm).max() <= 2 * tolerance_mm
    if slices.max() > 1.5 and whole:
        missing = int(np.rint(slices).sum()) - len(gaps)
        raise QuarantineError("missing_slices", f"{missing} missing between {len(depths)}, {median_mm:.4g} mm apart")
    step_mm = float(depths[-1] - depths[0]) / len(gaps)
    off_mm = float(np.abs(depths - depths[0] - step_mm * np.arange(len(depths))).max())
    if off_mm > _tolerance_mm(step_mm):
        raise QuarantineError(
            "uneven_slices", f"gaps of {gaps.min():.4g} to {gaps.max():.4g} mm; a slice lies {off_mm:.3g} mm off"
        )
    return step_mm


def _require_straight(
    positions: NDArray[np.float64], depths: NDArray[np.float64], normal: NDArray[np.float64], tolerance_mm: float
) -> None:
    """Refuse slices [n, 3] that do not lie behind each other."""
    along = (depths - depths[0])[:, None]
    aside = positions - positions[0] - along * normal  # in the plane of the slices
    aside_mm = np.linalg.norm(aside, axis=1)
    if aside_mm.max() <= tolerance_mm:
        return
    slope = aside[-1] / along[-1]
    if np.linalg.norm(aside - along * slope, axis=1).max() <= tolerance_mm:
        degrees = math.degrees(math.atan(float(np.linalg.norm(slope))))
        raise QuarantineError("gantry_tilt", f"tilted by {degrees:.2f} degrees")
    raise QuarantineError("shifted_slices", f"a slice lies {aside_mm.max():.3g} mm beside the first")


def _tolerance_mm(step_mm: float) -> float:
    return min(max(_POSITION_TOLERANCE_MM, _OF_THICK_SLICES * step_mm), _OF_THIN_SLICES * step_mm)
