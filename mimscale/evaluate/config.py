"""What `mimscale evaluate` may be told. Everything about the model comes from the run's own config."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimscale.config import require_positive
from mimscale.targets.config import ScoreConfig

EVALUATION = "evaluate"  # folder in a run directory


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How a network is led over a whole volume."""

    overlap: float = 0.5  # share of a window that the next one covers again; more is smoother and slower
    # How windows that overlap are weighted: by a Gaussian, so that a window's edge counts little, or equally
    blending: Literal["gaussian", "constant"] = "gaussian"
    # Mirror each window along these axes, in every combination, and take the mean of the logits: 2, 4 or 8 times as
    # long. x swaps left and right: not for networks that tell a left organ from a right one
    flips: tuple[Literal["z", "y", "x"], ...] = ()
    batch: int = 2  # windows per forward pass; more needs more memory
    device: Literal["auto", "cpu", "cuda"] = (
        "auto"  # where the model runs: auto, cpu, cuda; whole volumes are always put together in main memory
    )
    threads: int | None = None  # CPU threads of the network; null: all cores that this process may use

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}: must be at least 0 and below 1")
        if len(set(self.flips)) < len(self.flips):
            raise ValueError(f"flips={list(self.flips)}: names an axis twice")
        verb = type(self).__name__.removesuffix("Config").lower()
        require_positive(verb, batch=self.batch, threads=1 if self.threads is None else self.threads)


@dataclass(frozen=True, kw_only=True)
class EvaluateTargetsConfig(ScoreConfig):
    """A run on a table of targets: what it is scored against, and how."""

    table: Path | None = None  # with the columns of the run; null, here and below: as in the run
    key: Literal["id", "subject", "image"] | None = None  # what names the cases in the table
    journal: Path | None = None  # STORE.sources.jsonl
    unmatched: Literal["refuse", "skip"] | None = None  # lines of the table that name no volume of the store
    region: Literal["foreground", "volume"] = "foreground"  # what windows cover: the box of what is no air, or all
    seed: int = 0  # of the draws


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceConfig):
    """Settings of one evaluation of one run."""

    run_dir: Path  # the run to score
    out: Path | None = None  # folder of the results, for other ways to score one run; null: run_dir/evaluate
    store: Path | None = None  # volumes to score on; null: the store that the run was trained on
    split: str = "val"  # which volumes of the store
    checkpoint: str = "newest"  # "newest" verified one, or a name such as step_00000100
    best: bool = False  # score the checkpoint that checkpoint.keep_best of the run kept too, as a second column
    unlabelled: Literal["refuse", "skip"] = "refuse"  # volumes of the split that have no label: an error, or left out
    nsd_tolerance_mm: float = 2.0  # a surface point counts as right within this distance
    # Write evaluate/predictions/<volume>.nii.gz on the source grid; of regions, a mask each: <volume>/<region>.nii.gz
    save_predictions: bool = True
    store_grid: bool = True  # Dice on the store's grid too, as a second column
    pictures: int = 4  # volumes of which slices are kept for the report
    crops: int = 4  # pretraining runs: fixed crops per volume, each with a fixed mask
    targets: EvaluateTargetsConfig = field(default_factory=EvaluateTargetsConfig)  # runs on a table of targets

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 0:
            raise ValueError(f"pictures={self.pictures}: must be at least 0")
        require_positive("evaluate", crops=self.crops, nsd_tolerance_mm=self.nsd_tolerance_mm)

    @property
    def folder(self) -> Path:
        """Where scores, predictions and pictures go."""
        return self.run_dir / EVALUATION if self.out is None else self.out
