"""The results of probes as tables: for a person, for a spreadsheet, and each case's prediction."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mimscale.features.layout import Features
from mimscale.targets.results import cells, headings, plain_name
from mimscale.targets.table import Target

if TYPE_CHECKING:
    from mimscale.features.probe import Row


def table_rows(target: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one target's table."""
    metrics = list(target["rows"][0]["scores"])
    rows = [[row["features"], row["probe"], *cells(row["scores"], metrics)] for row in target["rows"]]
    for entry in target["differences"]:
        other = entry["minus"]
        name = other["probe"] if other["features"] == "none" else other["features"]
        rows.append([f"{entry['features']} - {name}", entry["probe"], *cells(entry["scores"], metrics)])
    return ["features", "probe", *headings(metrics)], rows


def table_csv(targets: Sequence[dict[str, Any]]) -> str:
    """One line a target, features, probe and score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["target", "features", "probe", "minus", "score", "value", "low", "high", "cases", "subjects"])
    for target in targets:
        for row in [*target["rows"], *target["differences"]]:
            minus = "/".join(row["minus"].values()) if "minus" in row else ""
            for name, score in row["scores"].items():
                numbers = [score["value"], score["low"], score["high"], target["cases"], target["subjects"]]
                writer.writerow([target["name"], row["features"], row["probe"], minus, name, *numbers])
    return text.getvalue()


def cases_name(number: int, target: str) -> str:
    """File of a target's cases; a column may have any name, a file not."""
    return f"cases_{plain_name(number, target)}.csv"


def cases_csv(target: Target, rows: Sequence["Row"], features: Features) -> str:
    """One line a case, features and probe: the truth, the prediction, and of classes the probability of each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["id", "subject", "fold", "features", "probe", "truth", "predicted", *(f"p:{name}" for name in target.classes)]
    )
    for row in rows:
        for case, fold, predicted in zip(row.cases.tolist(), row.fold.tolist(), row.predicted, strict=True):
            volume = int(target.rows[case])
            value = target.values[case]
            answers = (
                [target.classes[value], target.classes[predicted.argmax()], *predicted.tolist()]
                if target.classes
                else [float(value), float(predicted)]
            )
            start = [features.ids[volume], features.subjects[volume], fold, row.features, row.probe]
            writer.writerow([*start, *answers])
    return text.getvalue()
