"""Scores of targets as text, for tables that a person reads."""

from collections.abc import Sequence
from typing import Any

from mimscale.store.layout import is_plain_name

SHORT = {
    "auc": "AUC",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier",
    "calibration_error": "ECE",
    "mean_absolute_error": "MAE",
    "r2": "R2",
}


def headings(metrics: Sequence[str]) -> list[str]:
    """What people call these scores."""
    return [SHORT[name] for name in metrics]


def cells(scores: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """The scores with their intervals, empty where one was not asked for."""
    return [score_text(scores[name]) if name in scores else "" for name in metrics]


def score_text(score: dict[str, Any]) -> str:
    """A score as results hold it, with its interval where it has one."""
    if score["value"] is None:
        return "-"
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def plain_name(number: int, target: str) -> str:
    """A target's name in names of files and metrics: a column may be called anything, these may not."""
    return target if is_plain_name(target) else f"target_{number + 1}"
