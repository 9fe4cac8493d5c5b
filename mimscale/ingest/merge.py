"""The end of an ingest: plan and receipts of all parts -> manifest and journal.

Receipts are folded in the order of the plan: what a later round says of a file replaces what an earlier one said.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.convert import conflicting_labels
from mimscale.ingest.plan import Plan, PlannedSource
from mimscale.ingest.receipts import live_parts, read_receipt
from mimscale.ingest.subjects import splits
from mimscale.store import layout
from mimscale.store.manifest import load_manifest, write_manifest
from mimscale.store.rows import VolumeRow, overlay_of_receipt, row_of_receipt

_WAY_OUT = "free some space and run the same command again; finished parts are kept"
SHOWN_PARTS = 10


@dataclass
class _Entry:
    """One source and what became of it; the merge changes its mind about some."""

    source: PlannedSource
    round_number: int
    line: dict[str, Any]
    row: VolumeRow | None = None

    def becomes(self, outcome: str, **more: Any) -> None:
        kept = {name: value for name, value in self.line.items() if name in ("source", "id")}
        self.line = {**kept, "outcome": outcome, **more}


@dataclass(frozen=True)
class _Folded:
    entries: list[_Entry]
    superseded: int


def journal_path(store: Path) -> Path:
    """Which file became which volume, or why not. Beside the store, because file names may name patients."""
    return store.with_name(f"{store.name}.sources.jsonl")


def merge(store: Path, plan: Plan, config: IngestConfig, key: bytes) -> dict[str, Any]:
    """Write manifest and journal.

    Returns:
        {"stored", "quarantined", "duplicates", "reasons", "warnings", "examples", "overlays", "superseded",
        "withdrawn"}: `reasons` and `warnings` are counts, `examples` the first case of each of both. Without a stored
        volume, and above `max_quarantined`, no manifest is written.

    Raises:
        DataError: parts without a receipt (each is named), a subject in two splits, or a full disk.
    """
    info = layout.read_info(store)
    folded = _fold(store, plan, info, key)
    duplicate_of = _drop_duplicates(folded.entries)
    kept = [(entry.source, entry.row) for entry in folded.entries if entry.row and entry.line["outcome"] == "stored"]
    _apply_overlays(folded.entries, {row.id: row for _, row in kept}, duplicate_of)
    split_of = _splits(kept, _splits_before(store), config)
    rows = [dataclasses.replace(row, split=split_of[source.subject]) for source, row in kept]
    summary = _summary(folded, len(rows))
    with durable.explained(DataError, store, _WAY_OUT):
        _write_private(journal_path(store), _journal(folded.entries))
        lines = [{"id": volume_id, "of": other} for volume_id, other in sorted(duplicate_of.items())]
        durable.write_text(layout.duplicates_path(store), _jsonl(lines))
    if rows and (config.max_quarantined is None or summary["quarantined"] <= config.max_quarantined):
        write_manifest(store, rows)
    return summary


def _fold(store: Path, plan: Plan, info: layout.StoreInfo, key: bytes) -> _Folded:
    """The newest word on every source, oldest round first."""
    line_of: dict[str, dict[str, Any]] = {}
    missing = []
    for part in live_parts(store, info):
        lines = read_receipt(store, part)
        if lines is None:
            missing.append(part)
        for line in lines or []:
            line_of.setdefault(line["source"], line)
    if missing:
        named = ", ".join(map(str, missing[:SHOWN_PARTS])) + (", ..." if missing[SHOWN_PARTS:] else "")
        raise DataError(
            f"{store}: {len(missing)} of {info.num_parts} parts have no receipt ({named}): their tasks have not ended, "
            "or were killed; run these tasks again, or the ingest without task= and merge="
        )
    entries = []
    for number, one in enumerate(plan.rounds):
        for source in one.sources:
            entry = _Entry(source, number, line_of[source.receipt_key(key)])
            if entry.line["outcome"] == "stored":
                entry.row = row_of_receipt(entry.line["row"])
            entries.append(entry)
    current = _newest(entries)
    return _Folded(current, superseded=len(entries) - len(current))


def _newest(entries: Sequence[_Entry]) -> list[_Entry]:
    """Of a file that was read in several rounds: what it is now. Only touched, it stays where it was stored first."""
    of_file: dict[tuple[tuple[str, ...], ...], list[_Entry]] = {}
    for entry in entries:
        if entry.source.overlay_of is None:
            of_file.setdefault(entry.source.channels, []).append(entry)
    dropped = set()
    for group in of_file.values():
        newest = [entry for entry in group if entry.round_number == group[-1].round_number]
        older = [entry for entry in group if entry.round_number != group[-1].round_number]
        first_of = {entry.row.id: entry for entry in reversed(older) if entry.row is not None}
        for entry in newest:
            first = first_of.pop(entry.row.id, None) if entry.row is not None else None
            if first is not None and first.row is not None and entry.row is not None:
                for name, overlay in entry.row.overlays.items():
                    before = first.row.overlays.get(name)
                    if before is None or before.sha256 != overlay.sha256:
                        first.row.overlays[name] = overlay
                older.remove(first)
                dropped.add(id(entry))
        dropped |= {id(entry) for entry in older}
    return [entry for entry in entries if id(entry) not in dropped]


def _drop_duplicates(entries: Sequence[_Entry]) -> dict[str, str]:
    """Keep one of the volumes that hold the same voxels (as .nii and as .nii.gz, say); returns id -> id that is kept.

    That is the one of the earliest round, of these one with a label, of these the lowest id. It takes over overlays
    that only its duplicates have; one with other labels under the same name is quarantined.
    """
    first: dict[str, _Entry] = {}
    duplicate_of: dict[str, str] = {}
    for entry in sorted(entries, key=_preference):
        if entry.row is None:
            continue
        kept = first.setdefault(entry.row.voxels_sha256, entry)
        if kept is entry:
            continue
        assert kept.row is not None, "only stored volumes are kept"
        if entry.row.id != kept.row.id:
            duplicate_of[entry.row.id] = kept.row.id
        conflict = False
        for name, overlay in entry.row.overlays.items():
            conflict |= kept.row.overlays.setdefault(name, overlay).sha256 != overlay.sha256
        if conflict:
            entry.becomes("quarantined", **conflicting_labels(kept.row.id))
        else:
            entry.becomes("duplicate", of=kept.row.id)
    for entry in entries:
        if entry.line["outcome"] == "duplicate" and entry.line["of"] in duplicate_of:
            entry.line["of"] = duplicate_of[entry.line["of"]]
    return duplicate_of


def _preference(entry: _Entry) -> tuple[Any, ...]:
    row = entry.row
    return (entry.round_number, row is None or not row.overlays, entry.line.get("id", ""), row.part if row else 0)


def _apply_overlays(
    entries: Sequence[_Entry], row_of: Mapping[str, VolumeRow], duplicate_of: Mapping[str, str]
) -> None:
    """Give volumes the label maps that came later, oldest first: the last one stays."""
    for entry in entries:
        if entry.line["outcome"] == "overlay":
            volume_id = entry.line["id"]
            row = row_of.get(duplicate_of.get(volume_id, volume_id))
            if row is None:  # the image was replaced by another one since
                entry.becomes("superseded")
            else:
                overlays = {name: overlay_of_receipt(tree) for name, tree in entry.line["overlays"].items()}
                row.overlays.update(overlays)


def _splits(
    kept: Sequence[tuple[PlannedSource, VolumeRow]], before: Mapping[str, str], config: IngestConfig
) -> dict[str, str]:
    """Subject name -> split. Subjects that a manifest has been written with keep theirs."""
    asked: dict[str, str | None] = {}
    decided: dict[str, str] = {}
    for source, row in kept:
        split, other = source.split, asked.get(source.subject)
        if split is not None and row.subject in before:
            other = before[row.subject]
        if split is not None and other is not None and other != split:
            raise DataError(
                f"subject {row.subject} (hidden name): listed as {split}, but {other} in the store or for another of "
                "its volumes; all volumes of a subject stay in one split"
            )
        asked[source.subject] = split or other
        if row.subject in before:
            decided[source.subject] = before[row.subject]
    return splits(asked, decided, config.val_fraction, config.split_seed)


def _splits_before(store: Path) -> dict[str, str]:
    if not layout.manifest_path(store).exists():
        return {}
    manifest = load_manifest(store)
    return dict(zip(manifest.column("subject").tolist(), manifest.column("split").tolist(), strict=True))


def _summary(folded: _Folded, stored: int) -> dict[str, Any]:
    outcomes = Counter(entry.line["outcome"] for entry in folded.entries)
    reasons, warnings = Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    for entry in sorted(folded.entries, key=lambda entry: str(entry.line["source"])):
        line = entry.line
        found = {line["reason"]: line["detail"]} if line["outcome"] == "quarantined" else line.get("warnings", {})
        (reasons if line["outcome"] == "quarantined" else warnings).update(found.keys())
        for reason, detail in found.items():
            examples.setdefault(reason, f"source {line['source']}{': ' if detail else ''}{detail}")
    return {
        "stored": stored,
        "quarantined": outcomes["quarantined"],
        "duplicates": outcomes["duplicate"],
        "reasons": dict(sorted(reasons.items())),
        "warnings": dict(sorted(warnings.items())),
        "examples": examples,
        "overlays": outcomes["overlay"],
        "superseded": folded.superseded + outcomes["superseded"],
        "withdrawn": outcomes["withdrawn"],
    }


def _journal(entries: Sequence[_Entry]) -> list[dict[str, Any]]:
    lines = []
    for entry in entries:
        known = {name: value for name, value in entry.line.items() if name not in ("row", "overlays", "source")}
        source = entry.source
        lines.append(
            {
                "source": source.image[0] if source.image else "",
                "label": source.label[0] if source.label else None,
                "subject": source.subject,
                "receipt": entry.line["source"],
                **known,
            }
        )
    return sorted(lines, key=lambda line: (line["source"], line["label"] or ""))


def _jsonl(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines)


def _write_private(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with durable.open_atomically(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(_jsonl(lines).encode())
