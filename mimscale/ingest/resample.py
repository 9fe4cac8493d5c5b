"""Arrays on coarser or finer grids: intensities, classes and class scores.

    C channels | K classes | Z Y X array, voxels | step: voxels of the old grid that one of the new grid is long

Old and new grid share their centre, so that resampling commutes with flips and is undone by the same call with 1/step.

Interpolation is linear. Unlike a cubic spline it makes no value that lies beyond its neighbours (a spline rings around
bone and around padding), and a voxel depends on near ones only, so that slabs give the very values of the whole array
in a fraction of its memory. What a spline would keep sharper, the blur of a coarser grid takes away again. Along an
axis that becomes coarser comes a Gaussian first (`blur_sigma`). Axis after axis: the kernel is the product of three.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit

Zyx = tuple[int, int, int]
Steps = tuple[float, float, float]

SLAB_BYTES = 2**25  # of float32 that are worked on at once; some temporaries are as large again
_TRUNCATE = 4.0  # standard deviations after which a Gaussian ends
_TIE = 1e-5  # weights that differ by less are the same: more than the rounding of float32 sums


def positions(size: int, new_size: int, step: float) -> NDArray[np.float64]:
    """Where the voxels of a new axis lie on the old one, in voxels of the old one: [new_size]; may lie outside it."""
    places = (size - 1) / 2 + (np.arange(new_size) - (new_size - 1) / 2) * step
    return places.astype(np.float64, copy=False)


def new_size(size: int, step: float) -> int:
    """Voxels of a new axis: as long as the old one, to half a voxel."""
    return math.floor(size / step + 0.5)


def blur_sigma(step: float) -> float:
    """Standard deviation in old voxels of the Gaussian before sampling every `step` voxels; 0 when that is no coarser.

    It widens a point spread function as wide as an old voxel (full width at half maximum) to that of a new one:
    Cardoso et al. 2015, Scale factor point spread function matching.
    """
    return math.sqrt(max(0.0, step**2 - 1) / (8 * math.log(2)))


def resample_intensities(
    volume: NDArray[Any],
    shape_zyx: Zyx,
    step_zyx: Steps,
    padding_below: float | None = None,
    padding_value: float | None = None,
) -> NDArray[Any]:
    """A volume [C, Z, Y, X] on the grid [C, *shape_zyx], in its own dtype and in the range of each channel.

    Args:
        volume: integers are rounded to the nearest one.
        shape_zyx: of the result, voxels.
        step_zyx: see above.
        padding_below: what lies below was never measured. It is not mixed with what was: a new voxel that is mostly
            padding becomes padding, all others are made of measured voxels alone.
        padding_value: was never measured either.
    """
    axes = _axes(volume.shape[1:], shape_zyx, step_zyx)
    resampled = np.empty((len(volume), *shape_zyx), dtype=volume.dtype)
    for channel, target in zip(volume, resampled, strict=True):
        low, high = float(channel.min()), float(channel.max())
        for start, stop in _slabs(axes):
            values = _intensities(channel, axes, start, stop, padding_below, padding_value)
            if volume.dtype.kind in "iu":
                np.rint(values, out=values)
            np.clip(values, low, high, out=values)
            target[start:stop] = values
    return resampled


def resample_classes(classes: NDArray[np.uint8], shape_zyx: Zyx, step_zyx: Steps) -> NDArray[np.uint8]:
    """A label map [Z, Y, X] on the grid `shape_zyx`: of each new voxel the class with the largest share of it.

    The shares are the classes' masks, resampled as an image is. Taking the nearest voxel instead would move the map by
    half a voxel when two old voxels become one, and would keep or drop thin structures by chance. A tie goes to the
    lowest class, to background last.
    """
    axes = _axes(classes.shape, shape_zyx, step_zyx)
    resampled = np.zeros(shape_zyx, dtype=np.uint8)
    for start, stop in _slabs(axes):
        low, high = axes[0].needs(start, stop)
        slab = classes[low:high]
        share = np.zeros((stop - start, *shape_zyx[1:]), dtype=np.float32)  # the largest so far
        background = np.ones_like(share)
        for value, box in enumerate(ndimage.find_objects(slab), start=1):
            if box is None:
                continue
            # Only where the class can have a share: there may be a hundred classes, each of them small.
            edges = [(box[0].start + low, box[0].stop + low), *((one.start, one.stop) for one in box[1:])]
            new = [axis.touched_by(*edge) for axis, edge in zip(axes, edges, strict=True)]
            new[0] = (max(new[0][0], start), min(new[0][1], stop))
            if any(first >= last for first, last in new):
                continue
            old = [axis.needs(*one) for axis, one in zip(axes, new, strict=True)]
            mask = classes[tuple(slice(*one) for one in old)] == value
            here = (slice(new[0][0] - start, new[0][1] - start), slice(*new[1]), slice(*new[2]))
            part = _interpolated(mask.astype(np.float32), axes, old, new)
            background[here] -= part
            larger = part > share[here] + _TIE
            share[here][larger] = part[larger]
            resampled[start:stop][here][larger] = value
        resampled[start:stop][background > share + _TIE] = 0
    return resampled


class LogitPlanes(Protocol):
    """Logits [K, Z, Y, X] that are never there all at once: their planes come and go in the order of Z."""

    @property
    def shape(self) -> tuple[int, ...]:
        """K, Z, Y, X."""
        ...

    def between(self, low: int, high: int) -> NDArray[np.float32]:
        """Planes [low, high): [K, high - low, Y, X]. `low` is never smaller than that of the call before."""
        ...


def most_likely_classes(
    logits: NDArray[np.float32] | LogitPlanes, shape_zyx: Zyx, step_zyx: Steps
) -> NDArray[np.uint8]:
    """Logits [K, Z, Y, X] -> the class of the highest probability on the grid `shape_zyx`.

    Probabilities are interpolated, not classes, so that a border may lie between two voxels; and not logits, which have
    no bounds, so that one voxel that is very sure does not outvote its neighbours.
    """
    axes = _axes(logits.shape[1:], shape_zyx, step_zyx)
    classes = np.zeros(shape_zyx, dtype=np.uint8)
    num_classes = logits.shape[0]
    for start, stop in _slabs(axes, arrays=num_classes):
        old = _taken(logits, *axes[0].needs(start, stop))
        probabilities = old - old.max(axis=0)
        np.exp(probabilities, out=probabilities)
        probabilities /= probabilities.sum(axis=0)
        best = np.full((stop - start, *shape_zyx[1:]), -1, dtype=np.float32)
        for number, one in enumerate(probabilities):
            if one.max() < 0.999 / num_classes:  # some class has more everywhere
                continue
            part = _interpolated(one, axes, *_whole(axes, start, stop))
            higher = part > best
            best[higher] = part[higher]
            classes[start:stop][higher] = number
    return classes


def likely_regions(logits: NDArray[np.float32] | LogitPlanes, shape_zyx: Zyx, step_zyx: Steps) -> NDArray[np.uint8]:
    """Logits [K, Z, Y, X] of regions that may overlap -> 1 where each has a probability above one half, else 0.

    On the grid [K, *shape_zyx]. Probabilities are interpolated, as in `most_likely_classes`.
    """
    axes = _axes(logits.shape[1:], shape_zyx, step_zyx)
    regions = np.zeros((logits.shape[0], *shape_zyx), dtype=np.uint8)
    for start, stop in _slabs(axes):
        old = _taken(logits, *axes[0].needs(start, stop))
        for region, one in zip(regions, old, strict=True):
            region[start:stop] = _interpolated(expit(one), axes, *_whole(axes, start, stop)) > 0.5
    return regions


def _taken(logits: NDArray[np.float32] | LogitPlanes, low: int, high: int) -> NDArray[np.float32]:
    if isinstance(logits, np.ndarray):
        part: NDArray[np.float32] = logits[:, low:high]
        return part
    return logits.between(low, high)


@dataclass(frozen=True)
class _Axis:
    """One axis on its way from the old grid to the new one."""

    size: int  # old voxels
    places: NDArray[np.float64]  # of the new voxels on the old axis; beyond its ends the last voxel goes on
    step: float

    @property
    def unchanged(self) -> bool:
        return self.step == 1 and self.size == len(self.places)

    @property
    def reach(self) -> int:
        """How many voxels the Gaussian reaches to either side, as ndimage counts them."""
        return int(_TRUNCATE * blur_sigma(self.step) + 0.5)

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """First and last + 1 of the old voxels that the new voxels [start, stop) are made of."""
        first, last = math.floor(self.places[start]), math.floor(self.places[stop - 1])
        return max(0, first - self.reach), min(self.size, last + 2 + self.reach)

    def touched_by(self, start: int, stop: int) -> tuple[int, int]:
        """First and last + 1 of the new voxels that the old voxels [start, stop) have a share in."""
        first = np.searchsorted(self.places, start - self.reach - 1, side="right")
        last = np.searchsorted(self.places, stop + self.reach, side="left")
        return int(first), int(last)

    def interpolated(
        self, part: NDArray[np.float32], axis: int, old: tuple[int, int], new: tuple[int, int]
    ) -> NDArray[np.float32]:
        """New voxels [*new) along `axis` of an array that holds the old voxels [*old) there."""
        if self.unchanged:
            return part[(*[slice(None)] * axis, slice(new[0] - old[0], new[1] - old[0]))]
        if self.step > 1:
            sigma = blur_sigma(self.step)
            part = ndimage.gaussian_filter1d(part, sigma, axis, mode="nearest", truncate=_TRUNCATE)
        places = self.places[new[0] : new[1]] - old[0]
        before = np.minimum(np.floor(places).astype(np.intp), part.shape[axis] - 1)
        after = np.minimum(before + 1, part.shape[axis] - 1)
        share = (places - before).astype(np.float32).reshape([-1 if one == axis else 1 for one in range(3)])
        values: NDArray[np.float32] = part.take(before, axis)
        rest = part.take(after, axis)
        rest -= values
        rest *= share
        values += rest
        return values


def _axes(shape: Sequence[int], new_shape: Sequence[int], steps: Sequence[float]) -> list[_Axis]:
    return [
        _Axis(size, np.clip(positions(size, new, step), 0, size - 1), step)
        for size, new, step in zip(shape, new_shape, steps, strict=True)
    ]


def _slabs(axes: Sequence[_Axis], arrays: int = 1) -> Iterator[tuple[int, int]]:
    """First and last + 1 plane of slabs of the new grid that are about SLAB_BYTES on either grid."""
    z, y, x = axes
    plane = max(math.ceil(z.step) * y.size * x.size, len(y.places) * len(x.places))
    planes = max(1, SLAB_BYTES // (4 * arrays * plane))
    for start in range(0, len(z.places), planes):
        yield start, min(start + planes, len(z.places))


def _whole(axes: Sequence[_Axis], start: int, stop: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Old and new ranges of a slab that is whole along Y and X."""
    z, y, x = axes
    return [z.needs(start, stop), (0, y.size), (0, x.size)], [(start, stop), (0, len(y.places)), (0, len(x.places))]


def _interpolated(
    part: NDArray[np.float32], axes: Sequence[_Axis], old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]
) -> NDArray[np.float32]:
    for number, axis in enumerate(axes):
        part = axis.interpolated(part, number, old[number], new[number])
    return part


def _intensities(
    channel: NDArray[Any],
    axes: Sequence[_Axis],
    start: int,
    stop: int,
    padding_below: float | None,
    padding_value: float | None,
) -> NDArray[np.float32]:
    old, new = _whole(axes, start, stop)
    part = channel[slice(*old[0])].astype(np.float32)
    padding = part < (-np.inf if padding_below is None else padding_below)
    if padding_value is not None:
        padding |= part == padding_value
    if not padding.any():
        return _interpolated(part, axes, old, new)
    values = part[padding]
    outside: NDArray[np.float32] | np.float32 = values[0]
    # Either divisor below is at least a half where its quotient is chosen.
    measured = _interpolated(1 - padding.astype(np.float32), axes, old, new)  # its share of each voxel
    if (values != values[0]).any():  # as a rule a scanner has one number for it
        outside = _interpolated(np.where(padding, part, np.float32(0)), axes, old, new)
        outside /= np.maximum(1 - measured, 0.25)
    part[padding] = 0
    inside = _interpolated(part, axes, old, new)
    inside /= np.maximum(measured, 0.25)
    return np.where(measured >= 0.5, inside, outside)
