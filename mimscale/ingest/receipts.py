"""What became of every source: one JSON line a source, one file a part, written when the part's packs are whole.

A line names its source by a keyed hash only: receipts are part of the store, and file names name patients.

    {"source", "outcome": "stored",      "id", "row", "warnings"}
    {"source", "outcome": "overlay",     "id", "name", "overlay"}    a label map for a volume that is stored
    {"source", "outcome": "duplicate",   "id", "of"}
    {"source", "outcome": "quarantined", "reason", "detail"}
    {"source", "outcome": "withdrawn"}                                    its subject was removed from the store
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store import layout

Lines = list[dict[str, Any]]


def write_receipt(store: Path, part: int, lines: Sequence[dict[str, Any]]) -> None:
    """Write the receipt of a part, complete or not at all: with it the part is finished.

    Raises:
        DataError: it cannot be written.
    """
    path = layout.receipt_path(store, part)
    with durable.explained(DataError, path, "free some space and run the same command again; finished parts are kept"):
        durable.write_text(path, "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines))


def read_receipt(store: Path, part: int) -> Lines | None:
    """The lines of a finished part, or None for a part that must be done."""
    path = layout.receipt_path(store, part)
    if not path.exists():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return lines if all(pack.exists() for pack in packs_of(store, part, lines)) else None
    except (ValueError, KeyError, TypeError):
        return None  # damaged: the part is done again


def packs_of(store: Path, part: int, lines: Sequence[dict[str, Any]]) -> list[Path]:
    """The packs that the lines of a part's receipt speak of."""
    overlays = {line["name"] for line in lines if line["outcome"] == "overlay"}
    stored = [line for line in lines if line["outcome"] == "stored"]
    overlays |= {name for line in stored for name in line["row"]["overlays"]}
    packs = [layout.pack_path(store, part)] if stored else []
    return packs + [layout.overlay_path(store, name, part) for name in sorted(overlays)]


def live_parts(store: Path, info: layout.StoreInfo) -> Iterator[int]:
    """The parts that count: of one that was rewritten without a subject, and its successor, the one that is whole."""
    finished = {old: new for old, new in info.rewritten_parts.items() if layout.receipt_path(store, new).exists()}
    unfinished = set(info.rewritten_parts.values()) - set(finished.values())
    gone = finished.keys() | unfinished | set(info.removed_parts)
    return (part for part in range(info.num_parts) if part not in gone)
