"""How a table of targets is read and how predictions are scored, as every verb is told it. No torch here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from mimscale.config import require_positive


@dataclass(frozen=True, kw_only=True)
class TargetColumns:
    """Which columns of a table are targets, and what names the cases in it."""

    classify: tuple[str, ...] = ()  # columns that hold a class
    regress: tuple[str, ...] = ()  # columns that hold a number
    # What names the cases in the table, in a column of this name. id: volumes as in the store's manifest; subject: all
    # volumes of a subject; image: files, as the journal beside the store names them
    key: Literal["id", "subject", "image"] = "id"
    journal: Path | None = (
        None  # STORE.sources.jsonl: with it `subject` holds names as in the sources, and `image` works
    )
    unmatched: Literal["refuse", "skip"] = "refuse"  # lines of the table that name no volume that there is

    prefix: ClassVar[str] = ""  # of these keys on the command line

    def __post_init__(self) -> None:
        prefix = self.prefix
        if not self.columns:
            raise ValueError(
                f"{prefix}classify=[COLUMN, ...] or {prefix}regress=[COLUMN, ...]: say which columns of the table to "
                "predict"
            )
        if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            raise ValueError(f"{prefix}classify and {prefix}regress: {', '.join(twice)} is listed twice")
        if self.key in self.columns:
            raise ValueError(f"{prefix}key={self.key}: is what names the cases, and no target")
        if self.key == "image" and self.journal is None:
            raise ValueError(
                f"{prefix}key=image: needs {prefix}journal=STORE.sources.jsonl, which says which file became which "
                "volume"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are predicted: classes first, then numbers."""
        return (*self.classify, *self.regress)


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(TargetColumns):
    """What fine-tuning learns from a table of targets, and how."""

    table: Path  # CSV, TSV or Parquet with a line for each volume or subject; cells may be empty
    pool: Literal["mean", "attention"] = "mean"  # of the tokens of a crop; attention: by weights that are learned
    # Of numbers, in standard deviations of the training volumes
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    # balanced: each class of a target has the same weight in sum, however many volumes it has
    class_weights: Literal["none", "balanced"] = "none"
    task_weights: dict[str, float] = field(default_factory=dict)  # column: its weight in the loss; 1 where none is said
    unlabelled: Literal["refuse", "skip"] = "refuse"  # volumes without a value in any column: an error, or left out
    # Filled in from the table when a run begins; a table that says something else does not continue it
    classes: dict[str, tuple[str, ...]] | None = None  # column of `classify`: its classes
    table_hash: str | None = None  # a hash of what the columns say of whom

    prefix: ClassVar[str] = "targets."

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.task_weights) - set(self.columns)):
            raise ValueError(
                f"targets.task_weights: {', '.join(unknown)} is no column of classify or regress; there are "
                f"{', '.join(self.columns)}"
            )
        require_positive("targets", **{f"task_weights.{name}": weight for name, weight in self.task_weights.items()})
        if self.classes is not None and set(self.classes) != set(self.classify):
            raise ValueError(
                f"targets.classes: is of {', '.join(self.classes) or 'nothing'}, classify of "
                f"{', '.join(self.classify) or 'nothing'}; leave it out, it follows from the table"
            )

    @property
    def outputs(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each column with its classes; none for a number. Before the table is read, two stand for all that it has."""
        classes = dict.fromkeys(self.classify, ("", "")) if self.classes is None else self.classes
        return [(name, classes.get(name, ())) for name in self.columns]

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each column in the loss; their sum is 1."""
        own = [self.task_weights.get(name, 1.0) for name in self.columns]
        return tuple(weight / sum(own) for weight in own)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Scores of predictions, and their intervals."""

    bins: int = 10  # of the expected calibration error, equally wide
    level: float = 0.95  # of the intervals
    replicates: int = 2000  # bootstrap draws of subjects

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level}: must be above 0 and below 1")
        require_positive("scores", bins=self.bins, replicates=self.replicates)
