"""A table of targets: which case has which class or number, and who has none.

N volumes of the features | n of them with a target
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.console import say
from mimscale.errors import DataError
from mimscale.features.config import ProbeConfig
from mimscale.features.layout import Features
from mimscale.ingest.sources import table as tables

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "."})  # compared without regard to case
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Target:
    """One column of the table, for the volumes that have a value in it."""

    name: str
    kind: Literal["classify", "regress"]
    rows: NDArray[np.int64]  # [n] of the features
    values: NDArray[Any]  # [n]: class numbers (int64), or the numbers themselves (float64)
    classes: tuple[str, ...]  # names of the classes, sorted; empty for numbers
    missing: int  # volumes without a value
    not_listed: int  # of these, volumes that the table does not list


def read_targets(config: ProbeConfig, features: Features) -> list[Target]:
    """The columns that the config names, in its order.

    Raises:
        DataError: the table cannot be read, lacks a column (those that it has are listed), lists a case twice or cases
            that the features do not have, or holds a text where a number is wanted.
    """
    path = config.targets
    table = tables.read(path)
    wanted = (*config.classify, *config.regress)
    if lacking := [name for name in (config.key, *wanted) if name not in table.columns]:
        raise DataError(
            f"{path}: has no column {', '.join(lacking)}; it has {', '.join(filter(None, table.columns)) or 'no names'}"
            + ("" if config.key not in lacking else "; key= says which one names the cases: id, subject or image")
        )
    place = table.columns.index(config.key)
    cells = [(row.line, [_text(cell) for cell in row.cells]) for row in table.rows]
    line_of = _lines(config, table, [(line, row[place]) for line, row in cells])
    row_of = dict(cells)
    keys = _keys_of_volumes(config, features)
    known = {key for own in keys for key in own}
    strangers = [key for key in line_of if key not in known]
    if strangers and (config.unmatched == "refuse" or len(strangers) == len(line_of)):
        named = ", ".join(strangers[:SHOWN]) + (", ..." if strangers[SHOWN:] else "")
        raise DataError(
            f"{path}: {len(strangers)} of {len(line_of)} lines name no {_WORDS[config.key]} of {features.folder} "
            f"({named}; there are {', '.join(sorted(known)[:SHOWN])}, ...); correct column {config.key}, say key=, or "
            "pass over them with unmatched=skip"
        )
    if strangers:
        say(f"{path}: {len(strangers)} of {len(line_of)} lines name nobody of {features.folder} and are passed over")
    lines = [next((line_of[key] for key in own if key in line_of), None) for own in keys]
    targets = []
    for name in wanted:
        column = table.columns.index(name)
        texts = [None if line is None else row_of[line][column] for line in lines]
        kind: Literal["classify", "regress"] = "classify" if name in config.classify else "regress"
        targets.append(_target(path, name, kind, texts, lines, table.line_word))
    return targets


_WORDS = {"id": "volume", "subject": "subject", "image": "file that was ingested"}


def _target(
    path: Path,
    name: str,
    kind: Literal["classify", "regress"],
    texts: Sequence[str | None],
    lines: Sequence[int | None],
    line_word: str,
) -> Target:
    there = [row for row, text in enumerate(texts) if text is not None and text.lower() not in MISSING]
    if not there:
        raise DataError(f"{path}: column {name} has no value for any of the {len(texts)} volumes of the features")
    found = [str(texts[row]) for row in there]
    classes: tuple[str, ...] = ()
    values: NDArray[Any]
    if kind == "classify":
        classes = tuple(sorted(set(found)))
        number = {text: index for index, text in enumerate(classes)}
        values = np.array([number[text] for text in found], dtype=np.int64)
    else:
        values = np.array([_number(text) for text in found])
        if bad := [index for index, value in enumerate(values) if not math.isfinite(value)]:
            raise DataError(
                f"{path}: column {name} of regress= holds {len(bad)} value(s) that are no finite number, first "
                f"{found[bad[0]]!r} in {line_word} {lines[there[bad[0]]]}; correct them, leave them empty, or use "
                f"classify=[{name}]"
            )
    return Target(
        name=name,
        kind=kind,
        rows=np.array(there, dtype=np.int64),
        values=values,
        classes=classes,
        missing=len(texts) - len(there),
        not_listed=sum(text is None for text in texts),
    )


def _text(cell: str | tuple[str, ...]) -> str:
    return cell if isinstance(cell, str) else ";".join(cell)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _lines(config: ProbeConfig, table: tables.Table, cells: Sequence[tuple[int, str]]) -> dict[str, int]:
    """What names a case -> its line in the table."""
    named = [(line, _as_key(config, text)) for line, text in cells if text]
    if not named:
        raise DataError(f"{table.path}: column {config.key} names nobody")
    counts = Counter(key for _, key in named)
    if twice := [key for key, count in counts.items() if count > 1]:
        more = ", ..." if twice[SHOWN:] else ""
        raise DataError(
            f"{table.path}: {len(twice)} case(s) stand in more than one {table.line_word} ({', '.join(twice[:SHOWN])}"
            f"{more}); keep one of each"
        )
    return {key: line for line, key in named}


def _as_key(config: ProbeConfig, text: str) -> str:
    # As ingest reads a table: files lie relative to its folder, and the first channel stands for a volume.
    return _absolute(config.targets.parent, text.split(";")[0].strip()) if config.key == "image" else text


def _absolute(folder: Path, file: str) -> str:
    return str((folder / file).resolve())


def _keys_of_volumes(config: ProbeConfig, features: Features) -> list[list[str]]:
    """What may name each volume in the table: [N]."""
    if config.journal is None:
        return [[key] for key in (features.ids if config.key == "id" else features.subjects)]
    field = {"id": "id", "subject": "subject", "image": "source"}[config.key]
    keys: dict[str, list[str]] = {}
    for line in _journal(config.journal):
        volume_id = line.get("of") or line.get("id")
        if volume_id is not None and line.get(field):
            text = str(line[field])
            keys.setdefault(str(volume_id), []).append(_absolute(Path(), text) if config.key == "image" else text)
    return [keys.get(volume_id, []) for volume_id in features.ids]


def _journal(path: Path) -> list[Mapping[str, Any]]:
    with durable.explained(DataError, path, "give the STORE.sources.jsonl that ingest wrote beside the store"):
        text = path.read_text()
    try:
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: no journal of an ingest ({error}); give STORE.sources.jsonl") from None
    if not all(isinstance(line, dict) for line in lines):
        raise DataError(f"{path}: no journal of an ingest; give STORE.sources.jsonl")
    return lines
