"""The files of one source -> an image and a label map on the store's grid, or a typed reason why not.

C channels | X Y Z source order, voxels | Z Y X store order, voxels
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest import geometry, statistics
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats import QuarantineError, ReadOptions, Scan, SourceFile, read_scan
from mimscale.ingest.formats.voxels import to_stored_dtype
from mimscale.ingest.plan import PlannedSource
from mimscale.ingest.sources import Source
from mimscale.store import layout
from mimscale.store.rows import VolumeRow

CHANNEL_TOLERANCE_VOXELS = 0.1  # how far the grids of one subject's channels may lie apart


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the voxels of a source lie, in the source's own order."""

    affine: NDArray[np.float64]  # voxel (x, y, z, 1) -> world, RAS+, mm: [4, 4]
    shape_xyz: tuple[int, int, int]

    @classmethod
    def of_row(cls, row: VolumeRow) -> "Grid":
        """The source grid of a volume that is stored already."""
        return cls(affine=np.reshape(row.source_affine, (4, 4)), shape_xyz=row.source_shape)

    @property
    def turned_affine(self) -> NDArray[np.float64]:
        """`affine` of the voxels turned to RAS+."""
        return geometry.store_grid(self.affine, self.shape_xyz)[0]


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image turned to RAS+: its source's voxels, or what is stored of them."""

    volume: NDArray[Any]  # [C, Z, Y, X]
    affine: NDArray[np.float64]  # of voxel (x, y, z, 1) of `volume`
    source: Grid
    source_sha256: str
    modality_in_file: str | None
    acquisition: Mapping[str, str]
    warnings: tuple[str, ...]
    padding_value: float | None  # voxels of this value were never measured


@dataclass(frozen=True, kw_only=True)
class Label:
    """A label map on its source's grid, turned to RAS+."""

    voxels: NDArray[np.uint8]  # [Z, Y, X]
    source_sha256: str


def read_image(source: Source | PlannedSource, config: IngestConfig) -> Image:
    """Read all channels of a source.

    Raises:
        QuarantineError: a channel that cannot be used, or channels on different grids.
    """
    if source.problem is not None:
        raise QuarantineError(*source.problem)
    hashes: list[str] = []
    scans: list[Scan] = []
    for files in source.channels:
        options = ReadOptions(
            channels=config.channels if len(source.channels) == 1 else 1, assume_orientation=config.assume_orientation
        )
        sha256, scan = _read_channel(files, options)
        hashes.append(sha256)
        scans.append(scan)
    first = scans[0]
    grid = Grid(affine=first.affine, shape_xyz=_shape_xyz(first))
    affine, shape_zyx = geometry.store_grid(grid.affine, grid.shape_xyz)
    for number, scan in enumerate(scans[1:], start=1):
        _refuse_other_grid("channel_grid_mismatch", f"channel {number}", scan, grid, CHANNEL_TOLERANCE_VOXELS)
    return Image(
        volume=_on_store_grid(scans, shape_zyx),
        affine=affine,
        source=grid,
        source_sha256=_joined(hashes),
        modality_in_file=first.modality,
        acquisition=first.header,
        warnings=tuple(sorted({warning for scan in scans for warning in scan.warnings})),
        padding_value=first.padding_value,
    )


def read_label(source: PlannedSource, grid: Grid, config: IngestConfig, class_names: Sequence[str]) -> Label:
    """Read a source's label map, and turn it to RAS+.

    Args:
        source: a source with a label.
        grid: of its image.
        config: for the tolerance and the class map.
        class_names: names of the values 0, 1, ... that the store may hold.

    Raises:
        QuarantineError: a file that cannot be used, another grid than the image's, or values without a name.
    """
    content = _read_files(source.label, "label: ")
    try:
        scan = read_scan(content, ReadOptions(assume_orientation=config.assume_orientation))
    except QuarantineError as error:
        raise QuarantineError(error.reason, f"label: {error.detail}") from None
    # A label may be flipped or permuted against its image; the grids are compared in the store's order.
    _refuse_other_grid("label_grid_mismatch", "label", scan, grid, config.label_tolerance_voxels)
    turned, _ = geometry.to_store_grid(scan.voxels[0], scan.affine)
    return Label(
        voxels=_classes(turned, config.class_map, len(class_names)),
        source_sha256=_sha256(content),
    )


def _read_channel(files: Sequence[str], options: ReadOptions) -> tuple[str, Scan]:
    """The hash of the files' bytes and what they hold; most readers keep none of these bytes, which are as large."""
    content = _read_files(files, "")
    return _sha256(content), read_scan(content, options)


def _read_files(files: Sequence[str], kind: str) -> list[SourceFile]:
    content = []
    for file in files:
        try:
            content.append(SourceFile(path=Path(file), data=Path(file).read_bytes()))
        except FileNotFoundError:
            raise QuarantineError("missing_file", f"{kind}no such file") from None
        except OSError as error:
            raise QuarantineError("unreadable", f"{kind}{error.strerror}") from None
    return content


def _sha256(content: Sequence[SourceFile]) -> str:
    """Of all bytes of a volume: the order in which the slices of a series are listed says nothing."""
    return _joined(sorted(hashlib.sha256(file.data).hexdigest() for file in content))


def _joined(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _shape_xyz(scan: Scan) -> tuple[int, int, int]:
    x, y, z = scan.voxels.shape[1:]
    return (x, y, z)


def _on_store_grid(scans: Sequence[Scan], shape_zyx: tuple[int, int, int]) -> NDArray[Any]:
    """All channels in one array [C, Z, Y, X] of a dtype that holds them all: the only copy that is made of them."""
    dtype = np.result_type(*(scan.voxels.dtype for scan in scans))
    volume = np.empty((sum(len(scan.voxels) for scan in scans), *shape_zyx), dtype=dtype)
    place = iter(volume)
    for scan in scans:
        for channel in scan.voxels:
            next(place)[...] = geometry.to_store_grid(channel, scan.affine)[0]
    return volume if len({scan.voxels.dtype for scan in scans}) == 1 else to_stored_dtype(volume)


def _refuse_other_grid(reason: str, what: str, scan: Scan, grid: Grid, tolerance_voxels: float) -> None:
    affine, shape_zyx = geometry.store_grid(scan.affine, _shape_xyz(scan))
    wanted_affine, wanted_zyx = geometry.store_grid(grid.affine, grid.shape_xyz)
    if shape_zyx != wanted_zyx:
        raise QuarantineError(reason, f"{what} {_shape_xyz(scan)}, image {grid.shape_xyz} voxels (x, y, z)")
    z, y, x = wanted_zyx
    distance = geometry.grid_distance_voxels(wanted_affine, affine, (x, y, z))
    if distance > tolerance_voxels:
        raise QuarantineError(reason, f"grids lie {distance:.3g} voxels apart, allowed are {tolerance_voxels:g}")


def _classes(turned: NDArray[Any], class_map: Mapping[int, int], classes: int) -> NDArray[np.uint8]:
    turned = np.ascontiguousarray(turned)
    if turned.dtype.kind in "iu":  # counting is several times faster than the sort inside np.unique
        low, high = int(turned.min()), int(turned.max())
        values: NDArray[Any] = low + np.flatnonzero(statistics.count_values(turned, low, high))
    else:
        values = np.unique(turned)
    stored = [class_map.get(int(value), int(value)) if value == int(value) else -1 for value in values]
    wrong = [
        float(value)
        for value, new in zip(values, stored, strict=True)
        if not (0 <= new < classes or new == layout.IGNORE_VALUE)
    ]
    if wrong:
        shown = ", ".join(f"{value:g}" for value in wrong[:5])
        raise QuarantineError(
            "unexpected_labels", f"{shown}{', ...' if wrong[5:] else ''}; class_names has {classes} names"
        )
    if not class_map:
        return turned.astype(np.uint8, copy=False)
    return np.asarray(stored, dtype=np.uint8)[np.searchsorted(values, turned)]
