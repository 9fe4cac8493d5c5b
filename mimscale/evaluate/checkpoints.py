"""Which checkpoint of a run a user means. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from mimscale.errors import CheckpointError, ConfigError
from mimscale.train.committed import newest, step_of, tag_name, tags, why_not_loadable
from mimscale.train.config import RunConfig
from mimscale.train.retention import best_step, read_scores
from mimscale.train.run_dir import RunDir


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint of a run that was best on validation."""

    tag: Path
    metric: str
    value: float


def find_checkpoint(run: RunDir, name: str) -> Path:
    """The checkpoint that a user means: "newest" or a folder name.

    Raises:
        CheckpointError: there is none, no such one, or it is damaged.
    """
    if name == "newest":
        tag = newest(run)
        if tag is None:
            raise CheckpointError(f"{run.checkpoints}: no checkpoint yet; let the run reach its first save")
        return tag
    tag = run.checkpoints / name
    if tag not in tags(run):
        known = ", ".join(tag.name for tag in tags(run)) or "none"
        raise CheckpointError(f"{tag}: no such checkpoint; there are: {known}")
    if (reason := why_not_loadable(tag)) is not None:
        raise CheckpointError(f"{tag}: {reason}; choose another checkpoint")
    return tag


def find_best(run: RunDir, config: RunConfig) -> BestCheckpoint:
    """The checkpoint that was best on validation, by the metric that the run kept it for.

    Raises:
        ConfigError: the run was not told to keep one.
        CheckpointError: it is not there, or damaged.
    """
    metric = config.checkpoint.keep_best
    if metric is None:
        raise ConfigError(
            f"{run.path}: best=true, but checkpoint.keep_best of the run is null, so it kept no such checkpoint; "
            "train with checkpoint.keep_best=val_dice, or val_loss"
        )
    scores = read_scores(run, metric)
    # The earliest first: of equals it is the one that training kept.
    saved = {step_of(tag): scores[step_of(tag)] for tag in reversed(tags(run)) if step_of(tag) in scores}
    if not saved:
        raise CheckpointError(f"{run.checkpoints}: best=true, but no checkpoint has a {metric} in {run.metrics}")
    step = best_step(saved, metric)
    return BestCheckpoint(find_checkpoint(run, tag_name(step)), metric, saved[step])
