"""Which voxels of a source are stored, and on what grid; and back.

    C channels | K classes | Z Y X volume, voxels

Every grid here is turned to RAS+ (`geometry.to_store_grid`). A source is cropped first and resampled then. Without
either, its placement is the identity, and no function here touches a voxel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest import geometry
from mimscale.ingest.formats import QuarantineError
from mimscale.ingest.resample import (
    LogitPlanes,
    Steps,
    Zyx,
    likely_regions,
    most_likely_classes,
    new_size,
    positions,
    resample_classes,
    resample_intensities,
)
from mimscale.store.rows import Box, VolumeRow

MAX_GROWTH = 32  # a resampled volume of more than this many times its source's voxels is a slip of the pen
SAME_SPACING = 1e-3  # of a voxel's edge: an axis whose spacing is this near to the wanted one keeps its voxels


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How the grid of a stored volume lies in that of its source."""

    source_zyx: Zyx  # shape of the source
    box: Box  # zyx start and stop of what is stored, in the source grid
    shape_zyx: Zyx  # of what is stored
    step_zyx: Steps  # edges of a stored voxel, in voxels of the source; 1.0 where it is one

    @classmethod
    def of_row(cls, row: VolumeRow) -> "Placement":
        """The placement of a volume that is stored already."""
        affine, source_zyx = geometry.store_grid(np.reshape(row.source_affine, (4, 4)), row.source_shape)
        everything = cls(
            source_zyx=source_zyx,
            box=row.crop_box or _everything(source_zyx),
            shape_zyx=row.shape[1:],
            step_zyx=(1.0, 1.0, 1.0),
        )
        return everything.stepping(affine, row.spacing_mm) if row.resampled else everything

    def stepping(self, source_affine: NDArray[np.float64], stored_mm: Sequence[float]) -> "Placement":
        """The same, with steps that follow from the spacings of source and stored volume, [Z, Y, X].

        `place` knows the wanted spacing, a stored volume the one that it got: they may differ in the last bits, so
        whoever goes back takes these.
        """
        spacing_mm = geometry.spacing_zyx_mm(source_affine)
        z, y, x = (_step(old, new) for old, new in zip(spacing_mm, stored_mm, strict=True))
        return replace(self, step_zyx=(z, y, x))

    @property
    def crop_box(self) -> Box | None:
        """`box`, or None when it holds all of the source."""
        return None if self.box == _everything(self.source_zyx) else self.box

    @property
    def resampled(self) -> bool:
        """True when stored voxels are not those of the source."""
        return self.step_zyx != (1.0, 1.0, 1.0)

    @property
    def as_scanned(self) -> bool:
        """True when what is stored is the source, all of it."""
        return self.crop_box is None and not self.resampled

    def affine(self, source_affine: NDArray[np.float64]) -> NDArray[np.float64]:
        """Voxel (x, y, z, 1) of the stored volume -> world, from the same of the source: [4, 4]."""
        if self.as_scanned:
            return source_affine
        to_source = np.eye(4)
        for axis, (start, edge, new, step) in enumerate(zip(*self._axes(), strict=True)):
            to_source[2 - axis, 2 - axis] = step
            to_source[2 - axis, 3] = start + positions(edge, new, step)[0]
        return source_affine @ to_source

    def store_image(
        self, volume: NDArray[Any], padding_below: float | None = None, padding_value: float | None = None
    ) -> NDArray[Any]:
        """What is stored of a source [C, Z, Y, X]; see `resample_intensities`."""
        if self.as_scanned:
            return volume
        inside = volume[(slice(None), *self._slices())]
        if not self.resampled:
            return inside.copy()  # a view would keep the whole source in memory
        return resample_intensities(inside, self.shape_zyx, self.step_zyx, padding_below, padding_value)

    def store_classes(self, classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is stored of a source's label map [Z, Y, X]; see `resample_classes`."""
        inside = classes[self._slices()]
        return resample_classes(inside, self.shape_zyx, self.step_zyx) if self.resampled else inside

    def image_to_source(self, volume: NDArray[Any], fill_value: float) -> NDArray[Any]:
        """A stored volume [C, Z, Y, X] on the grid of its source, `fill_value` outside the crop."""
        if self.resampled:
            volume = resample_intensities(volume, self._box_zyx(), self._back())
        return self._padded(volume, fill_value)

    def classes_to_source(self, classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Classes [Z, Y, X] of a stored volume on the grid of its source, background outside the crop."""
        if self.resampled:
            classes = resample_classes(classes, self._box_zyx(), self._back())
        return self._padded(classes, 0)

    def logits_to_source(self, logits: NDArray[np.float32] | LogitPlanes) -> NDArray[np.uint8]:
        """Logits [K, Z, Y, X] of a stored volume -> most likely classes [Z, Y, X] on the grid of its source.

        Outside the crop there is background. Without resampling `classes_to_source` gives the same and is faster.
        """
        return self._padded(most_likely_classes(logits, self._box_zyx(), self._back()), 0)

    def regions_to_source(self, regions: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Masks [K, Z, Y, X] of a volume that was not resampled, on the grid of its source; 0 outside the crop."""
        assert not self.resampled, "masks cannot be interpolated; give region_logits_to_source the logits"
        return self._padded(regions, 0)

    def region_logits_to_source(self, logits: NDArray[np.float32] | LogitPlanes) -> NDArray[np.uint8]:
        """Logits [K, Z, Y, X] of regions that may overlap -> 1 inside of each, on the grid of the source; else 0."""
        return self._padded(likely_regions(logits, self._box_zyx(), self._back()), 0)

    def _axes(self) -> tuple[Sequence[int], Zyx, Zyx, Steps]:
        return [start for start, _ in self.box], self._box_zyx(), self.shape_zyx, self.step_zyx

    def _box_zyx(self) -> Zyx:
        z, y, x = (stop - start for start, stop in self.box)
        return z, y, x

    def _slices(self) -> tuple[slice, slice, slice]:
        z, y, x = (slice(start, stop) for start, stop in self.box)
        return z, y, x

    def _back(self) -> Steps:
        z, y, x = (1 / step for step in self.step_zyx)
        return z, y, x

    def _padded(self, inside: NDArray[Any], fill_value: float) -> NDArray[Any]:
        if self.crop_box is None:
            return inside
        whole = np.full((*inside.shape[:-3], *self.source_zyx), fill_value, dtype=inside.dtype)
        whole[(..., *self._slices())] = inside
        return whole


def place(
    source_zyx: Zyx,
    spacing_mm: Sequence[float],
    *,
    voxel_bytes: int,
    max_bytes: int,
    box: Box | None = None,
    wanted_mm: Sequence[float] | None = None,
) -> Placement:
    """Decide what is stored of a source.

    Args:
        source_zyx: its shape, voxels.
        spacing_mm: its voxel edges [Z, Y, X].
        voxel_bytes: of all channels.
        max_bytes: what a volume may have, checked before anything of that size is made.
        box: what to keep; None keeps all.
        wanted_mm: voxel edges [Z, Y, X] to resample to; None keeps the voxels.

    Raises:
        QuarantineError: too_large, too_coarse.
    """
    box = box or _everything(source_zyx)
    steps = [1.0, 1.0, 1.0]
    if wanted_mm is not None:
        steps = [_step(old, new) for old, new in zip(spacing_mm, wanted_mm, strict=True)]
    kept = [stop - start for start, stop in box]
    edges = [edge / step for edge, step in zip(kept, steps, strict=True)]  # of a broken header: any number
    what = f"{_named(kept)} voxels of {_named(spacing_mm)} mm at spacing_mm {_named(wanted_mm or spacing_mm)}"
    if math.prod(edges) > MAX_GROWTH * math.prod(kept):
        raise QuarantineError("too_large", f"{what}: more than {MAX_GROWTH} times as many voxels")
    if min(edges) < 0.5:
        raise QuarantineError("too_coarse", what)
    z, y, x = (new_size(edge, step) for edge, step in zip(kept, steps, strict=True))
    if z * y * x * voxel_bytes > max_bytes:
        raise QuarantineError("too_large", f"{what}: more than {max_bytes} bytes")
    dz, dy, dx = steps
    return Placement(source_zyx=source_zyx, box=box, shape_zyx=(z, y, x), step_zyx=(dz, dy, dx))


def with_margin(box: Box, margin_mm: float, spacing_mm: Sequence[float], shape_zyx: Zyx) -> Box:
    """A box that is at least `margin_mm` larger on every side, as far as the volume goes."""
    wider = []
    for (start, stop), edge_mm, size in zip(box, spacing_mm, shape_zyx, strict=True):
        # Less than a thousandth of a voxel is rounding: 10 mm are 10 voxels of 1.0000001 mm.
        margin = math.ceil(margin_mm / edge_mm - 1e-3)
        wider.append((max(0, start - margin), min(size, stop + margin)))
    z, y, x = wider
    return (z, y, x)


def _named(edges: Sequence[float]) -> str:
    return " x ".join(f"{edge:g}" for edge in edges)


def _step(old_mm: float, new_mm: float) -> float:
    step = new_mm / old_mm
    return 1.0 if abs(step - 1) < SAME_SPACING else step


def _everything(shape_zyx: Zyx) -> Box:
    z, y, x = shape_zyx
    return ((0, z), (0, y), (0, x))
