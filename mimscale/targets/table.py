"""A table of targets: which case has which class or number, and who has none.

N volumes that the table may name | n of them with a target
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.config import tree_hash
from mimscale.console import say
from mimscale.errors import DataError
from mimscale.ingest.sources import table as tables
from mimscale.targets.config import TargetColumns

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "."})  # compared without regard to case
SHOWN = 3
Kind = Literal["classify", "regress"]


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """Volumes that a table may name."""

    ids: Sequence[str]  # [N]
    subjects: Sequence[str]  # [N]
    where: str  # what messages call them: their store, or their features


@dataclass(frozen=True, kw_only=True)
class Target:
    """One column of the table, for the volumes that have a value in it."""

    name: str
    kind: Kind
    rows: NDArray[np.int64]  # [n] of the volumes
    values: NDArray[Any]  # [n]: class numbers (int64), or the numbers themselves (float64)
    classes: tuple[str, ...]  # names of the classes, sorted; empty for numbers
    missing: int  # volumes without a value
    not_listed: int  # of these, volumes that the table does not list


@dataclass(frozen=True)
class _Line:
    """What a line says of a case."""

    number: int  # of the line, as an editor counts
    named: str  # the case, as it is written
    texts: Mapping[str, str | None]  # column -> its cell; None where it holds no value


class TargetTable:
    """The columns of a table that are targets.

    Raises:
        DataError: the table cannot be read, lacks a column (those that it has are listed), or lists a case twice.
    """

    def __init__(self, path: Path, columns: TargetColumns) -> None:
        table = tables.read(path)
        wanted, key, prefix = columns.columns, columns.key, columns.prefix
        if lacking := [name for name in (key, *wanted) if name not in table.columns]:
            raise DataError(
                f"{path}: has no column {', '.join(lacking)}; it has "
                f"{', '.join(filter(None, table.columns)) or 'no names'}"
                + ("" if key not in lacking else f"; {prefix}key= says which one names the cases: id, subject or image")
            )
        self.path, self.columns, self.line_word = path, columns, table.line_word
        place = {name: table.columns.index(name) for name in (key, *wanted)}
        self._lines: dict[str, _Line] = {}
        found = []
        for row in table.rows:
            cells = {name: _text(row.cells[index]) for name, index in place.items()}
            if cells[key]:
                texts = {name: None if cells[name].lower() in MISSING else cells[name] for name in wanted}
                found.append((self._as_key(cells[key]), _Line(row.line, cells[key], texts)))
        if not found:
            raise DataError(f"{path}: column {key} names nobody")
        counts = Counter(name for name, _ in found)
        if twice := [name for name, count in counts.items() if count > 1]:
            more = ", ..." if twice[SHOWN:] else ""
            raise DataError(
                f"{path}: {len(twice)} case(s) stand in more than one {self.line_word} ({', '.join(twice[:SHOWN])}"
                f"{more}); keep one of each"
            )
        self._lines = dict(found)

    def kind(self, name: str) -> Kind:
        """What a column holds."""
        return "classify" if name in self.columns.classify else "regress"

    def classes(self, name: str) -> tuple[str, ...]:
        """All classes that a column names, sorted."""
        return tuple(sorted({text for line in self._lines.values() if (text := line.texts[name]) is not None}))

    def check(self) -> None:
        """Refuse what no volumes could put right. Raises DataError: all problems are named at once."""
        problems = []
        for name in self.columns.columns:
            lines = [line for line in self._lines.values() if line.texts[name] is not None]
            if not lines:
                problems.append(f"column {name} has no value in any of its {len(self._lines)} {self.line_word}s")
            elif self.kind(name) == "regress":
                problems += self._no_numbers(name, lines)
            elif len(found := self.classes(name)) == 1:
                problems.append(
                    f"target {name}: all {len(lines)} cases are of class {found[0]!r}; nothing can be told apart"
                )
        if problems:
            raise DataError("\n".join(f"{self.path}: {problem}" for problem in problems))

    def fingerprint(self) -> str:
        """A hash of what the columns say of whom; order of lines, other columns and empty lines leave it alone."""
        said = {
            line.named: dict(line.texts)
            for line in self._lines.values()
            if any(text is not None for text in line.texts.values())
        }
        return f"sha256-{tree_hash(said)}"

    def match(
        self,
        volumes: Volumes,
        classes: Mapping[str, Sequence[str]] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> list[Target]:
        """The columns, in the order of the config, for these volumes.

        Args:
            volumes: which there are.
            classes: column -> its classes, where these are given; otherwise those that the volumes have.
            rows: of the volumes that matter, where not all do; a column may say nothing of these.

        Raises:
            DataError: lines that name no volume; a column without any value for them, with a text where a number is
                wanted, or with another class than those that are given.
        """
        keys = self._keys_of_volumes(volumes)
        known = {key for own in keys for key in own}
        self._refuse_strangers(volumes, known)
        lines = [next((self._lines[key] for key in own if key in self._lines), None) for own in keys]
        if rows is not None:
            lines = [lines[row] for row in rows]
        found = [self._target(name, lines, (classes or {}).get(name)) for name in self.columns.columns]
        for target in found:
            if not len(target.rows) and rows is None:
                raise DataError(
                    f"{self.path}: column {target.name} has no value for any of the {len(lines)} volumes of "
                    f"{volumes.where}"
                )
        return found if rows is None else [replace(target, rows=rows[target.rows]) for target in found]

    def _refuse_strangers(self, volumes: Volumes, known: set[str]) -> None:
        strangers = [key for key in self._lines if key not in known]
        columns, prefix = self.columns, self.columns.prefix
        if strangers and (columns.unmatched == "refuse" or len(strangers) == len(self._lines)):
            named = ", ".join(strangers[:SHOWN]) + (", ..." if strangers[SHOWN:] else "")
            raise DataError(
                f"{self.path}: {len(strangers)} of {len(self._lines)} lines name no {_WORDS[columns.key]} of "
                f"{volumes.where} ({named}; there are {', '.join(sorted(known)[:SHOWN])}, ...); correct column "
                f"{columns.key}, say {prefix}key=, or pass over them with {prefix}unmatched=skip"
            )
        if strangers:
            say(
                f"{self.path}: {len(strangers)} of {len(self._lines)} lines name nobody of {volumes.where} and are "
                "passed over"
            )

    def _target(self, name: str, lines: Sequence[_Line | None], classes: Sequence[str] | None) -> Target:
        kind = self.kind(name)
        there = [row for row, line in enumerate(lines) if line is not None and line.texts[name] is not None]
        own = [line for row in there if (line := lines[row]) is not None]
        found = [str(line.texts[name]) for line in own]
        values: NDArray[Any]
        if kind == "classify":
            names = tuple(sorted(set(found)) if classes is None else classes)
            number = {text: index for index, text in enumerate(names)}
            if other := [line for line in own if line.texts[name] not in number]:
                raise DataError(
                    f"{self.path}: column {name} holds {len(other)} class(es) that were never trained, first "
                    f"{other[0].texts[name]!r} in {self.line_word} {other[0].number}; trained were "
                    f"{', '.join(names)}: correct them, or leave them empty"
                )
            values = np.array([number[text] for text in found], dtype=np.int64)
        else:
            names = ()
            if problems := self._no_numbers(name, own):
                raise DataError(f"{self.path}: {problems[0]}")
            values = np.array([float(text) for text in found], dtype=np.float64)
        return Target(
            name=name,
            kind=kind,
            rows=np.array(there, dtype=np.int64),
            values=values,
            classes=names,
            missing=len(lines) - len(there),
            not_listed=sum(line is None for line in lines),
        )

    def _no_numbers(self, name: str, lines: Sequence[_Line]) -> list[str]:
        """What is wrong with the numbers of a column: one text, or none."""
        bad = [line for line in lines if not math.isfinite(_number(str(line.texts[name])))]
        if not bad:
            return []
        prefix = self.columns.prefix
        return [
            f"column {name} of {prefix}regress= holds {len(bad)} value(s) that are no finite number, first "
            f"{bad[0].texts[name]!r} in {self.line_word} {bad[0].number}; correct them, leave them empty, or use "
            f"{prefix}classify=[{name}]"
        ]

    def _as_key(self, text: str) -> str:
        # As ingest reads a table: files lie relative to its folder, and the first channel stands for a volume.
        if self.columns.key != "image":
            return text
        return _absolute(self.path.parent, text.split(";")[0].strip())

    def _keys_of_volumes(self, volumes: Volumes) -> list[list[str]]:
        """What may name each volume in the table: [N]."""
        columns = self.columns
        if columns.journal is None:
            return [[key] for key in (volumes.ids if columns.key == "id" else volumes.subjects)]
        field = {"id": "id", "subject": "subject", "image": "source"}[columns.key]
        keys: dict[str, list[str]] = {}
        for line in _journal(columns.journal):
            volume_id = line.get("of") or line.get("id")
            if volume_id is not None and line.get(field):
                text = str(line[field])
                keys.setdefault(str(volume_id), []).append(_absolute(Path(), text) if columns.key == "image" else text)
        return [keys.get(volume_id, []) for volume_id in volumes.ids]


_WORDS = {"id": "volume", "subject": "subject", "image": "file that was ingested"}


def _text(cell: str | tuple[str, ...]) -> str:
    return cell if isinstance(cell, str) else ";".join(cell)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _absolute(folder: Path, file: str) -> str:
    return str((folder / file).resolve())


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
