"""What a recipe may say about the stream. No torch here: the login node reads it."""

from dataclasses import dataclass
from typing import Literal

from mimscale.config import require_positive


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

    def __post_init__(self) -> None:
        require_positive(
            "stream",
            crops_per_volume=self.crops_per_volume,
            align_voxels=self.align_voxels,
            prefetch_batches=self.prefetch_batches,
            timeout_s=self.timeout_s,
            max_spacing_ratio=self.max_spacing_ratio,
            region_voxels=self.region_voxels or 1,
            target_spacing_mm=self.target_spacing_mm or 1,
        )
        for name in ("workers", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"stream.{name}={getattr(self, name)}: must not be negative")
        if min(self.pos_neg) < 0 or not 0 < self.pos_neg[0] < float("inf") or self.pos_neg[1] == float("inf"):
            raise ValueError(
                f"stream.pos_neg={self.pos_neg}: must be two numbers, the first above 0, the second not below"
            )
