"""What a recipe may say about the stream. No torch here: the login node reads it."""

from dataclasses import dataclass
from typing import Literal

from mimscale.config import require_positive


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How samples are drawn from a store and brought to the trainer."""

    workers: int = 2  # loader processes a rank; 0 reads in the trainer itself
    crops_per_volume: int = 1  # crops of one volume in an epoch; they lie near each other but never in one global batch
    align_voxels: int = 1  # crop origins are multiples of this; the chunk edge decodes least, 1 is the most random
    origins: Literal["uniform", "foreground"] = "uniform"  # foreground: the crop's centre lies in the foreground box
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
        )
        for name in ("workers", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"stream.{name}={getattr(self, name)}: must not be negative")
