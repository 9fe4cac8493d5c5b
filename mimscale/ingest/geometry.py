"""Source grid <-> the same voxels in RAS+, by flips and permutations only; `placement` crops and resamples.

X Y Z source order (as in the file), voxels | Z Y X store order, RAS+: X to the right, Y to the front, Z up
"""

from typing import Any

import nibabel.orientations
import numpy as np
from numpy.typing import NDArray

from mimscale.store.rows import VolumeRow

orientations: Any = nibabel.orientations  # nibabel annotates only half of it
_FARTHEST_MM = 1e6  # no scanner is a kilometre long
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


def why_not_an_affine(affine: NDArray[np.float64]) -> str | None:
    """What is wrong with a voxel -> world matrix [4, 4], or None."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return "is not 4x4 finite numbers"
    if np.abs(affine).max() > _FARTHEST_MM:
        return f"holds {np.abs(affine).max():g} mm"
    edges_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if (edges_mm < 1e-4).any():
        return f"has a voxel edge of 0: {edges_mm.tolist()} mm"
    if abs(np.linalg.det(affine[:3, :3] / edges_mm)) < 0.1:  # 1 for a box, 0 for a plane
        return "has axes that are nearly parallel"
    if np.isnan(orientations.io_orientation(affine)).any():
        return "has an axis without a direction"
    return None


def axis_codes(affine: NDArray[np.float64]) -> str:
    """Directions of the source axes, for example LPS."""
    return "".join(str(code) for code in orientations.aff2axcodes(affine))


def to_store_grid(array_xyz: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Turn a source array [X, Y, Z] into [Z, Y, X] in RAS+, with its affine of voxel (x, y, z) of the *store* grid."""
    orientation = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(array_xyz, orientation)
    return turned.transpose(2, 1, 0), affine @ orientations.inv_ornt_aff(orientation, array_xyz.shape)


def store_grid(
    affine: NDArray[np.float64], shape_xyz: tuple[int, int, int]
) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """Affine and shape [Z, Y, X] of what `to_store_grid` would make of a source array with this affine and shape."""
    orientation = orientations.io_orientation(affine)
    turned: list[int] = [0, 0, 0]
    for axis, (there, _) in enumerate(orientation):
        turned[int(there)] = shape_xyz[axis]
    x, y, z = turned
    return affine @ orientations.inv_ornt_aff(orientation, shape_xyz), (z, y, x)


def to_source_grid(array_zyx: NDArray[Any], row: VolumeRow) -> NDArray[Any]:
    """Turn an array [Z, Y, X] on the grid of a volume's source in RAS+ into the [X, Y, Z] of its file: exact.

    A volume that was stored as it was scanned has this grid; of others, a `Placement` brings arrays onto it.

    Raises:
        ValueError: the array is not on this grid.
    """
    if array_zyx.shape != row.source_zyx:
        raise ValueError(f"array of {array_zyx.shape} voxels; the source of volume {row.id} has {row.source_zyx}")
    turned = from_store_grid(array_zyx, row.source_orientation)
    assert turned.shape == row.source_shape, f"{turned.shape} is not the source's {row.source_shape}"
    return turned


def from_store_grid(array_zyx: NDArray[Any], codes: str) -> NDArray[Any]:
    """Turn [Z, Y, X] in RAS+ into [X, Y, Z] along axes of these directions, as `axis_codes` has them."""
    source = orientations.axcodes2ornt(codes)
    turned = orientations.apply_orientation(array_zyx.transpose(2, 1, 0), orientations.ornt_transform(_RAS, source))
    return np.ascontiguousarray(turned)


def spacing_zyx_mm(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel edges [Z, Y, X] in mm, of an affine of voxel (x, y, z)."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(z), float(y), float(x))


def grid_distance_voxels(
    affine: NDArray[np.float64], other: NDArray[np.float64], shape_xyz: tuple[int, int, int]
) -> float:
    """How far two grids of one shape lie apart at their worst corner, in voxels of the first."""
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners[:, :3] *= np.asarray(shape_xyz) - 1
    there = np.linalg.solve(affine, other @ corners.T) - corners.T
    return float(np.abs(there[:3]).max())
