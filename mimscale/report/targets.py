"""Runs on a table of targets -> what the page shows of them: a table a target, and how to read it."""

from collections.abc import Sequence
from typing import Any

from mimscale.evaluate.target_results import table_rows
from mimscale.report.facts import RunFacts
from mimscale.targets.results import score_text

HEADLINE = {"classify": ("auc", "AUC"), "regress": ("mean_absolute_error", "mean absolute error")}


def targets_view(runs: Sequence[RunFacts], losses: str | None) -> dict[str, Any]:
    """The section on targets; `losses` is the file of the chart of their losses."""
    return {
        "losses": losses,
        "scored": any(run.scores for run in runs),
        "runs": [
            {"name": run.name, "path": run.run.path, "scores": _run(run.scores) if run.scores else None} for run in runs
        ],
    }


def target_tiles(runs: Sequence[RunFacts]) -> list[dict[str, str]]:
    """The main score of each target of each scored run, over subjects."""
    tiles = []
    for run in runs:
        for target in run.scores["targets"] if run.scores else []:
            metric, name = HEADLINE[target["kind"]]
            rows = {row["predictor"]: row["scores"] for row in target["rows"] if row["of"] == "subjects"}
            if rows:
                label = f"{run.name}: {name} of {target['name']}, {target['subjects']} subject(s)"
                tiles.append({"value": score_text(rows["network"][metric]), "label": label})
    return tiles


def _run(scores: dict[str, Any]) -> dict[str, Any]:
    settings, best = scores["settings"], scores.get("best")
    return {
        "sentence": (
            f"Checkpoint {scores['checkpoint']}, {scores['volumes']} whole {scores['split']} volume(s), mean over "
            f"windows of {' x '.join(map(str, settings['crop_voxels']))} voxels with {settings['overlap']:g} overlap, "
            "then over the volumes of a subject."
        ),
        "best": (
            f"Best on validation: {best['checkpoint']}, which had the best {best['metric']} ({best['value']:.3f}) of "
            "all that were saved. Of many, the best on validation looks better there than it is."
            if best
            else ""
        ),
        "targets": [_target(target) for target in scores["targets"]],
        "intervals": scores["intervals"],
        "calibration": scores["calibration"],
    }


def _target(target: dict[str, Any]) -> dict[str, Any]:
    columns, rows = table_rows(target)
    counts = ", ".join(f"{count} {name}" for name, count in target["classes"].items())
    about = [f"{target['volumes']} volume(s) with a value" + (f" ({counts})" if counts else "")]
    about.append(f"{target['subjects']} subject(s)")
    if target["missing"]:
        about.append(f"{target['missing']} volume(s) without a value")
    if target["several_values"]:
        about.append(f"{target['several_values']} subject(s) whose volumes have different values, scored by volume")
    return {
        "name": target["name"],
        "about": ", ".join(about) + ".",
        "columns": columns,
        "rows": rows,
        "auc_of_class": {name: score_text(score) for name, score in target["auc_of_class"].items()},
    }
