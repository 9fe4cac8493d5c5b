"""The three planes through a point of a volume, as a radiologist looks at them. No torch: the report reads them too.

Inside, axes are [Z, Y, X] and grow towards superior, anterior and right. On a picture the patient's right is on the
left, the front is up (axial) or left (sagittal), the head is up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable

PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Plane:
    """One slice: layer name -> [rows, columns], and how high and wide a pixel is."""

    layers: dict[str, NDArray[Any]]
    pixel_mm: tuple[float, float]  # height, width


def cut_planes(
    layers: Mapping[str, NDArray[Any]], centre_zyx: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> dict[str, Plane]:
    """Cut every layer ([Z, Y, X], same grid) at `centre_zyx`: plane name -> slices."""
    z, y, x = centre_zyx
    dz, dy, dx = spacing_mm
    planes = {}
    for name, axis, pixel_mm in (("axial", 0, (dy, dx)), ("coronal", 1, (dz, dx)), ("sagittal", 2, (dz, dy))):
        at = (z, y, x)[axis]
        cuts = {key: layer.take(at, axis=axis)[::-1, ::-1] for key, layer in layers.items()}
        planes[name] = Plane(cuts, pixel_mm)
    return planes


def save_planes(path: Path, planes: Mapping[str, Plane]) -> None:
    """Write slices as one .npz, complete or not at all."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, plane in planes.items():
        arrays[f"{name}.pixel_mm"] = np.asarray(plane.pixel_mm, dtype=np.float64)
        arrays |= {f"{name}.layer.{key}": np.ascontiguousarray(layer) for key, layer in plane.layers.items()}
    with durable.open_atomically(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_planes(path: Path) -> dict[str, Plane]:
    """Read what `save_planes` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {
            name: Plane(
                {
                    key.removeprefix(f"{name}.layer."): arrays[key]
                    for key in arrays.files
                    if key.startswith(f"{name}.layer.")
                },
                (float(arrays[f"{name}.pixel_mm"][0]), float(arrays[f"{name}.pixel_mm"][1])),
            )
            for name in PLANES
        }


def centre_of(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """The voxel in the middle of the true voxels' box, or of the grid when there are none: (z, y, x)."""
    centre = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        centre.append(int(hit[0] + hit[-1]) // 2 if hit.size else mask.shape[axis] // 2)
    return centre[0], centre[1], centre[2]


def grey_levels(image: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Map [low, high] to 0..255 for a picture."""
    scaled = (image - low) / max(high - low, 1e-6)
    return np.asarray(np.clip(scaled, 0, 1) * 255, dtype=np.uint8)
