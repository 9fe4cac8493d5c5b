"""Volumes of a store as an encoder sees them: normalised, at its spacing, in windows over the body.

C channels | Z Y X volume, voxels
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.errors import ConfigError
from mimscale.evaluate.planes import Normalised, Planes
from mimscale.evaluate.resampling import AtSpacing, SpacingMm, stored_voxels, target_voxels
from mimscale.evaluate.windows import Zyx, covered_box
from mimscale.store.intensity import IntensityContract, normalisation
from mimscale.store.manifest import Manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import VolumeRow

Region = Literal["foreground", "volume"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where volumes come from, and how an encoder wants them."""

    store: Path
    manifest: Manifest
    intensity: IntensityContract
    crop_voxels: Zyx  # of a window
    target_mm: SpacingMm | None  # spacing [Z, Y, X] that the encoder sees; None: that of the stored volume
    region: Region  # what windows cover: the box of what is no air, or all


@dataclass(frozen=True)
class Windowed:
    """A volume as the encoder sees it."""

    row: VolumeRow
    voxels: Tensor  # [C, Z, Y, X]
    start: Zyx  # of the box that windows cover
    stop: Zyx


def loaded_ahead(source: Source, indices: Sequence[int]) -> Iterator[tuple[VolumeRow, Callable[[], Windowed]]]:
    """Each volume, and what gives its voxels or the DataError of reading them. The next one is read meanwhile."""
    reader = ShardReader(source.store, source.manifest)
    rows = [source.manifest.row(index) for index in indices]
    with ThreadPoolExecutor(max_workers=1) as pool:  # one: a reader is for one thread at a time
        coming = pool.submit(_load, source, reader, rows[0])
        for number, row in enumerate(rows):
            loading = coming
            if number + 1 < len(rows):
                coming = pool.submit(_load, source, reader, rows[number + 1])
            yield row, loading.result


def _load(source: Source, reader: ShardReader, row: VolumeRow) -> Windowed:
    """Read a volume. Raises DataError when it cannot be read."""
    crop, target_mm = source.crop_voxels, source.target_mm
    image = Normalised(
        reader.read_volume(row),
        row.fill_value,
        normalisation(source.intensity, row.stats),
        stored_voxels(crop, row.spacing_mm, target_mm),
    )
    inside, seen = image.inside, _at(image, row.spacing_mm, target_mm)
    box = [
        (place.start + start, place.start + stop)
        for place, (start, stop) in zip(inside, row.foreground_box, strict=True)
    ]
    if source.region == "volume":
        box = [(place.start, place.stop) for place in inside]
    voxels = seen.planes(0, seen.shape[1])
    if target_mm is not None:
        scale = [own / target for own, target in zip(row.spacing_mm, target_mm, strict=True)]
        box = [(math.floor(start * by), math.ceil(stop * by)) for (start, stop), by in zip(box, scale, strict=True)]
    return Windowed(row, voxels, *covered_box(box, voxels.shape[1:], crop))


def _at(image: Planes, spacing_mm: SpacingMm, target_mm: SpacingMm | None) -> Planes:
    if target_mm is None:
        return image
    return AtSpacing(image, spacing_mm, target_mm, target_voxels(image.shape[1:], spacing_mm, target_mm))


def batches_of_windows(voxels: Tensor, origins: Sequence[Zyx], crop_voxels: Zyx, batch: int) -> Iterator[Tensor]:
    """Windows of [C, Z, Y, X] at these first voxels, `batch` at a time: [B, C, *crop_voxels]."""
    dz, dy, dx = crop_voxels
    for first in range(0, len(origins), batch):
        yield torch.stack([voxels[:, z : z + dz, y : y + dy, x : x + dx] for z, y, x in origins[first : first + batch]])


def one_channel_count(manifest: Manifest, indices: NDArray[np.int64], store: Path) -> int:
    """Channels that all of these volumes have.

    Raises:
        ConfigError: they differ.
    """
    channels = manifest.column("shape")[indices][:, 0]
    counts = {int(value): int((channels == value).sum()) for value in np.unique(channels)}
    if len(counts) > 1:
        said = ", ".join(f"{volumes} with {count}" for count, volumes in counts.items())
        raise ConfigError(f"{store}: volumes have different numbers of channels ({said}); choose some with filter=")
    return next(iter(counts))


def refuse_other_spacing(
    manifest: Manifest,
    indices: NDArray[np.int64],
    store: Path,
    trained_mm: Sequence[float] | None,
    max_ratio: float,
) -> None:
    """Refuse volumes whose voxels are of another size than those that the weights were trained on.

    Args:
        manifest: of the store.
        indices: rows of the volumes.
        store: what the message calls them.
        trained_mm: [Z, Y, X] of the contract; None where it does not say.
        max_ratio: how far the two may lie apart along each axis.

    Raises:
        ConfigError: some volumes do, and nothing resamples them.
    """
    if not trained_mm:
        return
    spacing_mm = manifest.column("spacing_mm")[indices]
    ratio = spacing_mm / np.asarray(trained_mm, dtype=np.float64)
    far = np.flatnonzero((np.maximum(ratio, 1 / ratio) > max_ratio).any(axis=1))
    if len(far):
        first = int(indices[far[0]])
        has = " x ".join(f"{edge:g}" for edge in manifest.column("spacing_mm")[first])
        trained = ", ".join(f"{edge:g}" for edge in trained_mm)
        raise ConfigError(
            f"{store}: {len(far)} of {len(indices)} volumes have voxels of another size than the weights were trained "
            f"on, [{trained}] mm (volume {manifest.column('id')[first]}: {has} mm): resample them with "
            f"target_spacing_mm=[{trained}], leave them out with filter=, or raise max_spacing_ratio={max_ratio:g}"
        )
