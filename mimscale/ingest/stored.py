"""What a store would hold of an image: its voxels and all that is measured on them.

    C channels | Z Y X volume, voxels

Ingest writes it, and `mimscale predict` gives it to a network without a store: one place decides, so that both see the
same voxels.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mimscale.ingest import geometry, statistics
from mimscale.ingest.assemble import Image
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats import ReadOptions
from mimscale.ingest.placement import Placement, place, with_margin
from mimscale.store.intensity import ChannelStats
from mimscale.store.rows import Box


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A volume as it is stored."""

    volume: NDArray[Any]  # [C, Z, Y, X], stored units
    affine: NDArray[np.float64]  # voxel (x, y, z, 1) -> world (RAS+, mm): [4, 4]
    spacing_mm: tuple[float, float, float]  # [Z, Y, X]
    placement: Placement  # how its grid lies in that of the source
    fill_value: float  # its air
    stats: tuple[ChannelStats, ...]  # one a channel
    foreground_box: Box  # zyx start and stop
    thresholds: tuple[float, ...]  # of each channel: above it lies foreground


class Listed(Protocol):
    """What a list of sources may say of a volume."""

    @property
    def modality(self) -> str | None:
        """Its modality; None when the list does not say."""
        ...


def modality_of(source: Listed, image: Image, config: IngestConfig) -> str:
    """The list's word first, then the recipe's, then the file's."""
    if source.modality is not None:
        return source.modality.lower()
    return config.modality if config.modality != "other" else image.modality_in_file or "other"


def as_stored(image: Image, modality: str, config: IngestConfig) -> Stored:
    """Crop and resample an image as the config says, and measure what comes out.

    Raises:
        QuarantineError: too_large, too_coarse.
    """
    placement = _placement(image, modality, config)
    volume = placement.store_image(image.volume, statistics.padding_below(modality), image.padding_value)
    affine = placement.affine(image.affine)
    stats, box, thresholds = statistics.measure(volume, modality, image.padding_value)
    return Stored(
        volume=volume,
        affine=affine,
        spacing_mm=geometry.spacing_zyx_mm(affine),
        placement=placement,
        fill_value=statistics.fill_value(volume, modality),
        stats=stats,
        foreground_box=box,
        thresholds=thresholds,
    )


def _placement(image: Image, modality: str, config: IngestConfig) -> Placement:
    """What of an image is stored.

    Raises:
        QuarantineError: too_large, too_coarse.
    """
    channels, z, y, x = image.volume.shape
    spacing_mm = geometry.spacing_zyx_mm(image.affine)
    box = None
    if config.crop == "foreground":
        _, foreground = statistics.describe(image.volume, modality, image.padding_value)
        box = with_margin(foreground, config.crop_margin_mm, spacing_mm, (z, y, x))
    return place(
        (z, y, x),
        spacing_mm,
        voxel_bytes=channels * image.volume.itemsize,
        max_bytes=ReadOptions().max_volume_bytes,
        box=box,
        wanted_mm=config.spacing_zyx_mm,
    )
