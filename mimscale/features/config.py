"""What `mimscale extract` and `mimscale probe` may be told. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimscale.config import require_positive
from mimscale.ingest.config import task_share
from mimscale.targets.config import ScoreConfig, TargetColumns


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Features of the volumes of a store. Everything about the encoder comes from the run."""

    run_dir: Path  # the pretraining or fine-tuning run whose encoder is used
    store: Path | None = None  # its volumes; null: the store that the run was trained on
    out: Path  # folder for the features
    checkpoint: str = "newest"  # "newest" verified one, or a name such as step_00000100
    weights: Literal["trained", "random"] = "trained"  # random: the same encoder untrained, as a control
    seed: int = 0  # of random weights, and of the places of `crops`
    split: str | None = None  # only volumes of this split; null: all
    filter: str | None = None  # only these volumes, in the language of stream.filter
    region: Literal["foreground", "volume"] = "foreground"  # what windows cover: the box of what is no air, or all
    overlap: float = 0.0  # share of a window that the next one covers again
    crops: int | None = None  # this many windows at random places of the region; null: windows that cover it
    pool: Literal["mean", "max"] = "mean"  # over the tokens of a window, and over the windows of a volume
    windows: bool = False  # write the features of each window too
    tokens: bool = False  # write all tokens of each window too, as Zarr
    tokens_as: Literal["float16", "float32"] = "float16"  # in which tokens are written
    target_spacing_mm: tuple[float, float, float] | None = None  # resample volumes to it; null: as the run did
    # Without resampling: how far a volume's spacing may lie from the one that the run was trained at, along each axis;
    # null: stream.max_spacing_ratio of the run
    max_spacing_ratio: float | None = None
    part_volumes: int = 32  # volumes of a part, the unit of work and of restart
    max_failed: int = 0  # exit 3 when more volumes than this cannot be read; the others make no result then
    batch: int = 4  # windows per forward pass; more needs more memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the encoder runs
    threads: int | None = None  # CPU threads of the encoder; null: all cores that this process may use
    task: str | None = None  # "3/64": the parts of array task 3 of 0 to 63, and no merge
    merge: bool = False  # compute nothing: put the parts of all tasks together

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}: must be at least 0 and below 1")
        if self.crops is not None and self.overlap:
            raise ValueError(f"overlap={self.overlap}: has no effect with crops={self.crops}; give one of them")
        if self.seed < 0 or self.max_failed < 0:
            raise ValueError(f"seed={self.seed} and max_failed={self.max_failed}: must be at least 0")
        require_positive(
            "extract",
            part_volumes=self.part_volumes,
            batch=self.batch,
            crops=self.crops or 1,
            threads=self.threads or 1,
            target_spacing_mm=self.target_spacing_mm or 1,
            max_spacing_ratio=self.max_spacing_ratio or 1,
        )
        if self.task is not None:
            task_share(self.task)
            if self.merge:
                raise ValueError("task and merge: give one of them, they are different steps")


# Change no feature, or are recorded as what they stand for (weights by their hash, the store by its manifest's).
OUTSIDE_PLAN = (
    "run_dir",
    "store",
    "out",
    "checkpoint",
    "max_failed",
    "batch",
    "device",
    "threads",
    "task",
    "merge",
)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(TargetColumns, ScoreConfig):
    """What features can tell of a table of targets."""

    features: Path  # folder that `mimscale extract` wrote
    targets: Path  # CSV, TSV or Parquet with a line for each volume or subject
    controls: tuple[Path, ...] = ()  # features of the same volumes from other weights (weights=random), for comparison
    out: Path | None = None  # folder for the results; null: FEATURES/probe
    folds: int | None = None  # cross-validate over so many groups of subjects; null: train_split against test_split
    train_split: str = "train"
    test_split: str = "val"
    inner_folds: int = 5  # groups of training subjects among which k and the regularisation are chosen
    neighbours: tuple[int, ...] = (1, 3, 5, 10, 20, 50)  # k of the nearest neighbours to choose from
    # inverse strength of the penalty on a logistic regression to choose from, and strength of the one on a ridge
    logistic_c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    ridge_alpha: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    seed: int = 0  # of folds and draws

    def __post_init__(self) -> None:
        TargetColumns.__post_init__(self)
        ScoreConfig.__post_init__(self)
        for name, least in (("folds", 2), ("inner_folds", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.train_split == self.test_split:
            raise ValueError(f"train_split and test_split: both are {self.test_split}; use folds=5 to cross-validate")
        for name in ("neighbours", "logistic_c", "ridge_alpha"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]: needs at least one value")
        require_positive(
            "probe",
            neighbours=self.neighbours,
            logistic_c=self.logistic_c,
            ridge_alpha=self.ridge_alpha,
        )
