"""One input -> masks on its own grid.

    C channels | K outputs | Z Y X volume, voxels | X Y Z source file, voxels in the file's own order

What an ingest would store of the file goes through the networks, so a store is not needed and nothing differs from
`mimscale evaluate`. Main memory, in bytes, for a source of V voxels, of b bytes each with all its channels, and m = 1
for classes or K for regions:

    2 b V                               while the source is read
    b V + m V, later 3 m V              while it is segmented; while masks are turned and written
    (K + C + 1) 4 crop_z Y X            beside that, of each network: what windows still add to

V and b V of a source that is resampled count once more, with the voxels that are stored of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import CheckpointError, DataError
from mimscale.evaluate.whole import batches_of, normalised_for, segment, turned_to_source
from mimscale.ingest.assemble import Grid, read_image
from mimscale.ingest.formats import REASONS, QuarantineError
from mimscale.ingest.geometry import axis_codes
from mimscale.ingest.sources import Source
from mimscale.ingest.stored import Stored, as_stored, modality_of
from mimscale.predict.config import PredictConfig
from mimscale.predict.ensemble import Ensemble, warn_of_spacing
from mimscale.store.intensity import normalisation


@dataclass(frozen=True, kw_only=True)
class Masks:
    """What the networks see in a source, on its grid and in its order."""

    voxels: NDArray[np.uint8]  # classes [X, Y, Z], or a mask of each region [K, X, Y, Z]
    affine: NDArray[np.float64]  # voxel (x, y, z, 1) -> world, RAS+, mm: [4, 4]


def predict_volume(
    name: str,
    source: Source,
    ensemble: Ensemble,
    config: PredictConfig,
    progress: Callable[[int], Callable[[], object]],
) -> Masks:
    """Read a source and segment it.

    Args:
        name: of it, for messages.
        source: its files.
        ensemble: the networks.
        config: how they are led over it.
        progress: number of forward passes -> what is called after each.

    Raises:
        DataError: a source that cannot be read, or has another number of channels than the networks were trained on.
        CheckpointError: a network answered with a number that is not finite.
    """
    grid, on_source = _segmented(name, source, ensemble, config, progress)
    # Only now: the voxels of the source are gone.
    return Masks(voxels=turned_to_source(on_source, axis_codes(grid.affine)), affine=grid.affine)


def _segmented(
    name: str,
    source: Source,
    ensemble: Ensemble,
    config: PredictConfig,
    progress: Callable[[int], Callable[[], object]],
) -> tuple[Grid, NDArray[np.uint8]]:
    grid, turned_affine, stored = _read(name, source, ensemble, config)
    warn_of_spacing(ensemble, name, stored.spacing_mm)
    placement, spacing_mm = stored.placement, stored.spacing_mm
    if placement.resampled:
        placement = placement.stepping(turned_affine, spacing_mm)
    numbers = normalisation(ensemble.intensity, stored.stats)
    image = normalised_for(ensemble.networks, stored.volume, spacing_mm, stored.fill_value, numbers)
    passes = batches_of(ensemble.networks, stored.volume.shape[1:], spacing_mm, config)
    del stored
    try:
        _, on_source = segment(
            ensemble.networks, image, spacing_mm, placement, ensemble.outputs, config, progress(passes)
        )
    except FloatingPointError as error:
        raise CheckpointError(f"{ensemble.name}: {error}; predict with an earlier checkpoint=step_...") from None
    return grid, on_source


def _read(
    name: str, source: Source, ensemble: Ensemble, config: PredictConfig
) -> tuple[Grid, NDArray[np.float64], Stored]:
    """The grid of the source, its affine turned to RAS+, and what ingest would store of it."""
    ingest, channels = ensemble.ingest, ensemble.ingest.channels
    try:
        image = read_image(source, ingest)
        if len(image.volume) != channels:
            raise DataError(f"{name}: {_wrong_channels(len(image.volume), channels)}")
        stored = as_stored(image, config.modality or modality_of(source, image, ingest), ingest)
    except QuarantineError as error:
        raise DataError(f"{name}: {explained(error.reason, error.detail, channels)}") from None
    return image.source, image.affine, stored


def explained(reason: str, detail: str, channels: int) -> str:
    """Why a source cannot be read, in words for a person."""
    way_out = ""
    if reason == "not_3d":
        way_out = (
            f"; the networks were trained on {channels} channel(s): give a file of "
            + ("three axes" if channels == 1 else f"four axes, the fourth of {channels}")
            + ("" if channels == 1 else f", or {channels} files joined by commas")
        )
    return f"{REASONS.get(reason, 'cannot be read')} ({reason}: {detail}){way_out}"


def _wrong_channels(found: int, wanted: int) -> str:
    files: Any = "file" if wanted == 1 else f"{wanted} files joined by commas, in the order of training"
    return f"has {found} channel(s), the networks were trained on {wanted}; give {files}"
