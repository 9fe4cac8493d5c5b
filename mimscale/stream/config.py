"""What a recipe may say about the stream. No torch here: the login node reads it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimscale.config import require_positive


def fold_share(fold: str) -> tuple[int, int]:
    """`1/5` -> (1, 5): the second of five folds.

    Raises:
        ValueError: not of this form, or a number out of range.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    if match is None or not (int(match[1]) < int(match[2]) and int(match[2]) > 1):
        raise ValueError(f"stream.fold={fold}: expected I/N with N at least 2 and I from 0 to N-1, for example 0/5")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How often volumes are drawn, relative to each other: against a store with ten times as many CTs as MRs."""

    by: str  # a column of text, or a tag: modality, dataset, tags["site"]
    values: dict[str, float]  # value -> weight, 1 where not listed; the highest is drawn once an epoch, others less

    def __post_init__(self) -> None:
        wrong = {value: weight for value, weight in self.values.items() if not 0 < weight < float("inf")}
        if wrong or not self.values:
            raise ValueError(
                f"stream.weights.values={self.values}: every weight must be above 0; leave volumes out by stream.filter"
            )


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How samples are drawn from a store and brought to the trainer."""

    workers: int = 2  # loader processes a rank; 0 reads in the trainer itself
    filter: str | None = None  # which volumes: modality == "ct" and spacing_mm[0] <= 3 and tags["site"] in ("A", "B")
    train_fraction: float = 1.0  # share of the training subjects that is used; a smaller share is part of a larger one
    fold: str | None = None  # 0/5: the first fifth of all subjects validates, the others train; null: the store's split
    weights: WeightsConfig | None = None  # how often volumes of each kind are drawn; null: all equally often
    crops_per_volume: int = 1  # crops of one volume in an epoch; they lie near each other but never in one global batch
    region_voxels: tuple[int, int, int] | None = None  # the crops of a volume come from one region, decoded once
    align_voxels: int = 1  # origins of crops, or of regions, are multiples of this; the chunk edge decodes least
    # uniform; foreground: the crop's centre lies in the foreground box; occupied: it holds a chunk with foreground;
    # labelled: it holds a chunk with a class of the overlay above 0, as often as `pos_neg` says
    origins: Literal["uniform", "foreground", "occupied", "labelled"] = "uniform"
    pos_neg: tuple[float, float] = (1.0, 1.0)  # `origins: labelled`: crops at a label : crops anywhere
    target_spacing_mm: tuple[float, float, float] | None = None  # resample on the device; null: the store's spacings
    max_spacing_ratio: float = 2.0  # without it: the largest spacing of the volumes over the smallest, along each axis
    prefetch_batches: int = 2  # micro-batches that each worker holds ready
    timeout_s: float = 600.0  # a worker that is silent for longer is an error
    max_bad_samples: int = 10  # unreadable samples a rank replaces before the run stops
    start_method: Literal["fork", "forkserver", "spawn"] = "fork"  # fork shares the manifest's memory
    stage_dir: Path | None = None  # folder on a disk of each node: packs are copied there ahead of use; null: no copies
    stage_gib: float = 500.0  # what all copies in it may take up
    # map: packs are mapped; pread: they are read by calls; auto: mapped on file systems of the node (ext4, xfs, btrfs,
    # tmpfs, overlay) while the page cache has what is read, read by calls on Lustre, GPFS, NFS and while a disk answers
    read: Literal["auto", "map", "pread"] = "auto"

    def __post_init__(self) -> None:
        require_positive(
            "stream",
            crops_per_volume=self.crops_per_volume,
            align_voxels=self.align_voxels,
            prefetch_batches=self.prefetch_batches,
            timeout_s=self.timeout_s,
            stage_gib=self.stage_gib,
            max_spacing_ratio=self.max_spacing_ratio,
            region_voxels=self.region_voxels or 1,
            target_spacing_mm=self.target_spacing_mm or 1,
        )
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"stream.train_fraction={self.train_fraction}: must be above 0 and at most 1")
        if self.fold is not None:
            fold_share(self.fold)
        for name in ("workers", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"stream.{name}={getattr(self, name)}: must not be negative")
        if min(self.pos_neg) < 0 or not 0 < self.pos_neg[0] < float("inf") or self.pos_neg[1] == float("inf"):
            raise ValueError(
                f"stream.pos_neg={self.pos_neg}: must be two numbers, the first above 0, the second not below"
            )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training samples; nothing by default. A `*_prob` is the share of the samples that change.

    Flips and quarter turns come first, then one affine map, then intensities in the order of the fields.
    """

    flip_prob: tuple[float, float, float] = (0.0, 0.0, 0.0)  # along Z, Y, X; X swaps left and right
    rot90_prob: float = 0.0  # one, two or three quarter turns in the plane of Y and X, whose crop edges must be equal
    affine_prob: float = 0.0  # turn, scale and shift, linear between voxels
    rotate_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)  # largest angle about Z, Y, X, to either side
    zoom: tuple[float, float] = (1.0, 1.0)  # smallest and largest magnification; log-uniform between
    translate_voxels: tuple[float, float, float] = (0.0, 0.0, 0.0)  # largest shift along Z, Y, X, to either side
    scale_prob: float = 0.0
    scale_by: float = 0.1  # intensities become (1 + s) times as large, s uniform in [-scale_by, scale_by]
    shift_prob: float = 0.0
    shift_by: float = 0.1  # in normalised units, uniform in [-shift_by, shift_by]
    gamma_prob: float = 0.0
    gamma: tuple[float, float] = (0.7, 1.5)  # exponent, log-uniform, on intensities brought to [0, 1] crop by crop
    noise_prob: float = 0.0
    noise_std: float = 0.1  # in normalised units; each sample's standard deviation is uniform in [0, noise_std]

    def __post_init__(self) -> None:
        for name in ("rot90_prob", "affine_prob", "scale_prob", "shift_prob", "gamma_prob", "noise_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}={getattr(self, name)}: must be between 0 and 1")
        if not all(0 <= share <= 1 for share in self.flip_prob):
            raise ValueError(f"augment.flip_prob={self.flip_prob}: must be three numbers between 0 and 1")
        for name in ("rotate_deg", "translate_voxels"):
            if not all(0 <= largest < math.inf for largest in getattr(self, name)):
                raise ValueError(f"augment.{name}={getattr(self, name)}: must be three finite numbers, none below 0")
        for name in ("scale_by", "shift_by", "noise_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augment.{name}={getattr(self, name)}: must be finite and not below 0")
        for name in ("zoom", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"augment.{name}={(low, high)}: must be two numbers above 0, the smaller first")
