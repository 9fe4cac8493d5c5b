"""How a table of targets is read and how predictions are scored, as every verb is told it. No torch here."""

from dataclasses import dataclass
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
class ScoreConfig:
    """Scores of predictions, and their intervals."""

    bins: int = 10  # of the expected calibration error, equally wide
    level: float = 0.95  # of the intervals
    replicates: int = 2000  # bootstrap draws of subjects

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level}: must be above 0 and below 1")
        require_positive("scores", bins=self.bins, replicates=self.replicates)
