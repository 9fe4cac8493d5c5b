"""A new subject out of a real one: another anatomy (deformed), another scanner (contrast, bias, noise).

X Y Z file order, voxels | K control points along an axis
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy import interpolate, ndimage

# A cubic B-spline displacement folds nowhere when amplitude * 2.48 / spacing, summed over the scales, is below 1
# (Choi and Lee 2000, doi:10.1006/gmod.1999.0491). Both scales together: 0.88.
ELASTIC_SCALES_MM = ((40.0, 8.0), (16.0, 2.5))  # control point spacing, largest amplitude
ROTATION_DEGREES = 8.0
SCALE_RANGE = (0.9, 1.1)
SHEAR = 0.04
GAMMA_RANGE = (0.75, 1.35)
CURVE_KNOTS = 6
CURVE_STEP_RANGE = (0.4, 1.6)  # slope of the contrast curve between two knots, against a straight line
BIAS_SPACING_MM = 80.0
BIAS_AMPLITUDE = 0.35  # of the logarithm of the gain
NOISE_RANGE = (0.005, 0.03)  # sigma of each of the two Gaussian parts, against the brightest tissue
GAIN_RANGE = (400.0, 2000.0)  # stored value of the brightest tissue
SLAB_VOXELS = 16


@dataclass(frozen=True)
class Subject:
    """A derived volume and the parameters that explain it."""

    image: NDArray[np.int16]  # [X, Y, Z]
    label: NDArray[np.uint8]  # [X, Y, Z]
    parameters: dict[str, Any]


def derive(
    image: NDArray[Any], label: NDArray[np.uint8], spacing_xyz_mm: NDArray[np.float64], seed: int, number: int
) -> Subject:
    """Derive subject `number`. The same arguments always give the same voxels.

    Args:
        image: the real volume [X, Y, Z].
        label: its label map [X, Y, Z].
        spacing_xyz_mm: voxel edges, mm.
        seed: of the cohort.
        number: of the subject, from 1.
    """
    random = RandomState([seed, number])  # the legacy generator: its stream never changes between NumPy versions
    matrix, parameters = _affine(random)
    control = [
        (spacing, _control_points(random, image.shape, spacing_xyz_mm, spacing)) for spacing, _ in ELASTIC_SCALES_MM
    ]
    amplitudes = [amplitude for _, amplitude in ELASTIC_SCALES_MM]
    warped = np.empty(image.shape, dtype=np.float32)
    warped_label = np.empty(label.shape, dtype=np.uint8)
    low, high = float(image.min()), float(np.percentile(image, 99.8))
    source = (image.astype(np.float32) - low) / max(high - low, 1e-6)  # brightest tissue is about 1
    for start in range(0, image.shape[0], SLAB_VOXELS):
        slab = slice(start, min(start + SLAB_VOXELS, image.shape[0]))
        where = _source_voxels(slab, image.shape, spacing_xyz_mm, matrix, control, amplitudes)
        warped[slab] = ndimage.map_coordinates(source, where, order=1, mode="constant", cval=0.0)
        warped_label[slab] = ndimage.map_coordinates(label, where, order=0, mode="constant", cval=0)
    seen, scanner = _scan(random, warped, spacing_xyz_mm)
    return Subject(seen, warped_label, {**parameters, **scanner})


def _affine(random: RandomState) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Backward map of world millimetres about the centre: [3, 3]."""
    degrees = random.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3)
    scale = random.uniform(*SCALE_RANGE, 3)
    shear = random.uniform(-SHEAR, SHEAR, 3)
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        a, b = [other for other in range(3) if other != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    upper = np.eye(3)
    upper[0, 1], upper[0, 2], upper[1, 2] = shear
    parameters = {"rotation_degrees": degrees.tolist(), "scale": scale.tolist(), "shear": shear.tolist()}
    return matrix @ upper @ np.diag(1.0 / scale), parameters


def _control_points(
    random: RandomState, shape: tuple[int, ...], spacing_xyz_mm: NDArray[np.float64], spacing_mm: float
) -> NDArray[np.float32]:
    """Numbers in [-1, 1] on a grid that reaches one and a half points beyond the volume: [3, Kx, Ky, Kz]."""
    points = [int(np.ceil(edge * voxel / spacing_mm)) + 3 for edge, voxel in zip(shape, spacing_xyz_mm, strict=True)]
    return random.uniform(-1, 1, (3, *points)).astype(np.float32)


def _basis(positions_mm: NDArray[np.float64], spacing_mm: float, points: int) -> NDArray[np.float32]:
    """Cubic B-spline weights of every control point at every position: [positions, points]."""
    distance = np.abs(positions_mm[:, None] / spacing_mm + 1 - np.arange(points)[None, :])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _field(
    control: NDArray[np.float32],
    slab: slice,
    shape: tuple[int, ...],
    spacing_xyz_mm: NDArray[np.float64],
    spacing_mm: float,
) -> NDArray[np.float32]:
    """A smooth field in [-1, 1] on a slab of X: [n, X of the slab, Y, Z] from control points [n, Kx, Ky, Kz]."""
    axes = [np.arange(edge) * voxel for edge, voxel in zip(shape, spacing_xyz_mm, strict=True)]
    axes[0] = axes[0][slab]
    bx, by, bz = (_basis(axis, spacing_mm, k) for axis, k in zip(axes, control.shape[1:], strict=True))
    field = np.tensordot(control, bx, axes=(1, 1))  # [n, Ky, Kz, X]
    field = np.tensordot(field, by, axes=(1, 1))  # [n, Kz, X, Y]
    return np.tensordot(field, bz, axes=(1, 1)).astype(np.float32, copy=False)  # [n, X, Y, Z]


def _source_voxels(
    slab: slice,
    shape: tuple[int, ...],
    spacing_xyz_mm: NDArray[np.float64],
    matrix: NDArray[np.float64],
    control: list[tuple[float, NDArray[np.float32]]],
    amplitudes: list[float],
) -> NDArray[np.float32]:
    """Where in the real volume each voxel of a slab comes from: [3, X of the slab, Y, Z]."""
    centre_mm = (np.asarray(shape) - 1) * spacing_xyz_mm / 2
    grid = np.meshgrid(
        *(
            (np.arange(edge)[part] * voxel - middle).astype(np.float32)
            for edge, part, voxel, middle in zip(
                shape, (slab, slice(None), slice(None)), spacing_xyz_mm, centre_mm, strict=True
            )
        ),
        indexing="ij",
    )
    where = np.tensordot(matrix.astype(np.float32), np.stack(grid), axes=(1, 0))
    for (spacing_mm, points), amplitude_mm in zip(control, amplitudes, strict=True):
        where += amplitude_mm * _field(points, slab, shape, spacing_xyz_mm, spacing_mm)
    where += centre_mm.astype(np.float32)[:, None, None, None]
    where /= spacing_xyz_mm.astype(np.float32)[:, None, None, None]
    return np.asarray(where)


def _scan(
    random: RandomState, tissue: NDArray[np.float32], spacing_xyz_mm: NDArray[np.float64]
) -> tuple[NDArray[np.int16], dict[str, Any]]:
    """What a scanner makes of tissue values in about [0, 1]."""
    steps = random.uniform(*CURVE_STEP_RANGE, CURVE_KNOTS - 1)
    heights = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    gamma = float(np.exp(random.uniform(*np.log(GAMMA_RANGE))))
    table = interpolate.PchipInterpolator(np.linspace(0, 1, CURVE_KNOTS), heights)(np.linspace(0, 1, 1024)) ** gamma
    sigma = float(random.uniform(*NOISE_RANGE))
    gain = float(random.uniform(*GAIN_RANGE))
    bias_points = _control_points(random, tissue.shape, spacing_xyz_mm, BIAS_SPACING_MM)[:1]
    # A skull-stripped or defaced source has exact zeros, and so have scans that were prepared like it.
    cut_out = float((tissue <= 0).mean()) > 0.2
    image = np.empty(tissue.shape, dtype=np.int16)
    for start in range(0, tissue.shape[0], SLAB_VOXELS):
        slab = slice(start, min(start + SLAB_VOXELS, tissue.shape[0]))
        values = tissue[slab]
        seen = np.interp(values, np.linspace(0, 1, 1024), table) * np.maximum(values, 1)  # keeps what is above 1
        seen *= np.exp(BIAS_AMPLITUDE * _field(bias_points, slab, tissue.shape, spacing_xyz_mm, BIAS_SPACING_MM)[0])
        # Rician: the length of a complex number with Gaussian noise in both parts.
        real = seen + sigma * random.standard_normal(seen.shape)
        seen = np.hypot(real, sigma * random.standard_normal(seen.shape))
        if cut_out:
            seen[values <= 0] = 0
        image[slab] = np.clip(np.rint(seen * gain), 0, 32767)
    return image, {
        "contrast_curve": heights.tolist(),
        "gamma": gamma,
        "noise_sigma": sigma,
        "gain": gain,
        "skull_stripped": cut_out,
    }
