"""What goes into a reader and what comes out of it.

X Y Z source order, voxels | C channels
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path  # chooses the reader by its suffix; nothing is read from it
    data: bytes  # the whole file, so that what was hashed is what is stored


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader must know from the config."""

    channels: int = 1
    assume_orientation: bool = False
    max_volume_bytes: int = 8 * 2**30  # of voxels as the file holds them; a damaged header may claim any number


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a source holds."""

    voxels: NDArray[Any]  # [C, X, Y, Z] in the file's order; uint8, int16, uint16 or float32, little-endian, all finite
    affine: NDArray[np.float64]  # voxel (x, y, z, 1) -> world, RAS+, mm: [4, 4]
    modality: str | None = None  # as the file says it, for example ct or mr; only DICOM does
    header: Mapping[str, str] = field(default_factory=dict)  # how it was acquired: no name, no date, no UID
    warnings: tuple[str, ...] = ()  # words for what a person should look at, for example burned_in_annotation
    padding_value: float | None = None  # voxels of this value were never measured
