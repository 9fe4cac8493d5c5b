"""What the outputs of a segmentation network mean: classes that exclude each other, or regions that may overlap.

    K outputs | Z Y X volume, voxels | x y z source file, voxels in the file's own order

Both kinds answer the same questions, so that whole volumes are scored, written and drawn in one way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mimscale.errors import ConfigError
from mimscale.evaluate.inference import classes_of
from mimscale.evaluate.metrics import IGNORE_LABEL, ClassScore, score_case, score_regions
from mimscale.ingest.placement import Placement
from mimscale.ingest.resample import LogitPlanes
from mimscale.train.config import FinetuneConfig
from mimscale.train.finetune import classes_of_region


@dataclass(frozen=True)
class Classes:
    """Every voxel has one class, the likeliest; class 0 is the background."""

    names: list[str]

    def decide(self, logits: Tensor) -> NDArray[np.uint8]:
        """[K, Z, Y, X] -> class of each voxel [Z, Y, X]."""
        return classes_of(logits).numpy()

    def interpolated(self, logits: LogitPlanes, placement: Placement) -> NDArray[np.uint8]:
        """Classes on the grid of the source, turned to RAS+, of a volume that was resampled: [Z, Y, X]."""
        return placement.logits_to_source(logits)

    def placed(self, decided: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
        """The same of a volume that was not resampled, from what `decide` said of it: [Z, Y, X]."""
        return placement.classes_to_source(decided)

    def score(
        self,
        decided: NDArray[np.uint8],
        truth: NDArray[np.uint8],
        spacing_mm: Sequence[float],
        nsd_tolerance_mm: float | None,
    ) -> dict[str, ClassScore]:
        """Scores of each class against the overlay's classes on the same grid."""
        return score_case(decided, truth, self.names, spacing_mm, nsd_tolerance_mm)

    def files(self, volume_id: str, on_source: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
        """NIfTI files of the prediction: path -> what is in it [x, y, z]."""
        return {f"{volume_id}.nii.gz": on_source}

    def drawn(self, decided: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One colour a voxel: [Z, Y, X]."""
        return decided

    def truth_drawn(self, truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same of the overlay's classes [Z, Y, X]."""
        return truth


@dataclass(frozen=True)
class Regions:
    """A voxel lies in every region whose probability is above one half; there is no background."""

    names: list[str]
    classes_of_region: NDArray[np.bool_]  # [K, 256], by the number that a class has in the overlay

    def decide(self, logits: Tensor) -> NDArray[np.uint8]:
        """[K, Z, Y, X] -> 1 inside of a region, 0 outside: [K, Z, Y, X]."""
        return (logits > 0).numpy().astype(np.uint8)

    def interpolated(self, logits: LogitPlanes, placement: Placement) -> NDArray[np.uint8]:
        """Regions on the grid of the source, turned to RAS+, of a volume that was resampled: [K, Z, Y, X]."""
        return placement.region_logits_to_source(logits)

    def placed(self, decided: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
        """The same of a volume that was not resampled, from what `decide` said of it: [K, Z, Y, X]."""
        return placement.regions_to_source(decided)

    def score(
        self,
        decided: NDArray[np.uint8],
        truth: NDArray[np.uint8],
        spacing_mm: Sequence[float],
        nsd_tolerance_mm: float | None,
    ) -> dict[str, ClassScore]:
        """Scores of each region against the classes that it is made of."""
        return score_regions(decided, truth, self.names, self.classes_of_region, spacing_mm, nsd_tolerance_mm)

    def files(self, volume_id: str, on_source: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
        """NIfTI files of the prediction, a mask of each region: path -> what is in it [x, y, z]."""
        return {f"{volume_id}/{file_name(name)}.nii.gz": mask for name, mask in zip(self.names, on_source, strict=True)}

    def drawn(self, decided: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One colour a voxel [Z, Y, X]: region 1, 2, ...; of several the one that is made of the fewest classes."""
        picture = np.zeros(decided.shape[1:], dtype=np.uint8)
        for number in np.argsort(-self.classes_of_region.sum(axis=1), kind="stable"):
            picture[decided[number] > 0] = number + 1
        return picture

    def truth_drawn(self, truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same of the overlay's classes [Z, Y, X]."""
        picture = self.drawn(self.classes_of_region[:, truth].astype(np.uint8))
        picture[truth == IGNORE_LABEL] = IGNORE_LABEL
        return picture


def file_name(region: str) -> str:
    """A region's name, which may be any text, as the name of a file."""
    return "".join(letter if letter.isalnum() or letter in "-_. " else "_" for letter in region).strip(". ") or "_"


def outputs_of(config: FinetuneConfig, class_names: Sequence[str]) -> Classes | Regions:
    """What the outputs of a run mean, on a store whose overlay has these classes.

    Raises:
        ConfigError: two regions would be files of one name.
    """
    if config.regions is None:
        return Classes(list(class_names))
    if len(set(map(file_name, config.regions))) < len(config.regions):
        raise ConfigError(f"regions {', '.join(config.regions)}: two of them would be files of one name; rename one")
    return Regions(list(config.regions), classes_of_region(config.regions, class_names).numpy())
