"""The end of an ingest: receipts of all parts -> manifest, with subjects hidden and held-out subjects chosen."""

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.errors import ConfigError, DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.convert import conflicting_labels
from mimscale.ingest.sources.planned import PlannedSource
from mimscale.store import layout
from mimscale.store.manifest import VolumeRow, row_of_receipt, write_manifest

KEY_BYTES = 32


def journal_path(store: Path) -> Path:
    """Which file became which volume, or why not. Beside the store, because file names may name patients."""
    return store.with_name(f"{store.name}.sources.jsonl")


def subject_key(store: Path, path: str | None) -> bytes:
    """The secret that hides subject names; made on first use, readable by its owner only.

    Raises:
        ConfigError: it is gone although the store was made with it, others may read it, or it is no key.
    """
    file = Path(path) if path is not None else store.with_name(f"{store.name}.subject_key")
    if not file.exists():
        if layout.info_path(store).exists():
            made_with = layout.read_info(store).subject_key_fingerprint
            raise ConfigError(
                f"{file}: the subject key {made_with} of {store} is gone; put it back or give it with subject_key=FILE"
            )
        with durable.explained(DataError, file, "choose another out or subject_key"):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_hex(KEY_BYTES) + "\n")
    with durable.explained(ConfigError, file, "give a key that you may read"):
        mode, text = file.stat().st_mode & 0o777, file.read_text().strip()
    if mode & 0o077:
        raise ConfigError(f"{file}: mode {mode:04o} lets others read the subject key; run chmod 600 {file}")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{file}: not a subject key ({2 * KEY_BYTES} hex digits); remove it, or restore it")
    return key


def fingerprint(key: bytes) -> str:
    """What the store tells of its subject key."""
    return hashlib.sha256(b"mimscale subject key " + key).hexdigest()[:16]


def merge(
    store: Path,
    parts: Sequence[Sequence[PlannedSource]],
    receipts: Mapping[int, Sequence[dict[str, Any]]],
    config: IngestConfig,
    key: bytes,
) -> dict[str, Any]:
    """Write manifest and journal. Returns {"stored", "quarantined", "duplicates", "reasons"}."""
    rows: dict[str, VolumeRow] = {}
    subjects: dict[str, str] = {}
    journal: list[dict[str, Any]] = []
    for part, planned in enumerate(parts):
        for source, line in zip(planned, receipts[part], strict=True):
            if line["outcome"] == "stored":
                rows[source.id] = row_of_receipt(line["row"])
                subjects[source.id] = source.subject
            known = {name: value for name, value in line.items() if name != "row"}
            journal.append({"source": source.image, "label": source.label, "subject": source.subject, **known})
    duplicates = _same_voxels(rows)
    for entry in journal:
        if entry["outcome"] != "quarantined" and entry["id"] in duplicates:
            kept_id = duplicates[entry["id"]]
            entry |= {"outcome": "duplicate", "of": kept_id}
            if entry["label"] and _label_hashes(rows[entry["id"]]) != _label_hashes(rows[kept_id]):
                entry |= {"outcome": "quarantined", **conflicting_labels(kept_id)}
    kept = {volume_id: row for volume_id, row in rows.items() if volume_id not in duplicates}
    held_out = held_out_subjects({subjects[volume_id] for volume_id in kept}, config.val_fraction, config.split_seed)
    final = [
        dataclasses.replace(
            row,
            subject=hmac.digest(key, subjects[row.id].encode(), "sha256").hex()[:16],
            split="val" if subjects[row.id] in held_out else "train",
        )
        for row in kept.values()
    ]
    outcomes = Counter(entry["outcome"] for entry in journal)
    reasons = Counter(entry["reason"] for entry in journal if entry["outcome"] == "quarantined")
    with durable.explained(DataError, store, "free some space and run the same command again; finished parts are kept"):
        _write_private(journal_path(store), sorted(journal, key=lambda entry: entry["source"]))
        lines = [{"id": volume_id, "of": other} for volume_id, other in sorted(duplicates.items())]
        durable.write_text(layout.duplicates_path(store), _jsonl(lines))
    accepted = config.max_quarantined is None or outcomes["quarantined"] <= config.max_quarantined
    if final and accepted:
        write_manifest(store, final)
    return {
        "stored": len(final),
        "quarantined": outcomes["quarantined"],
        "duplicates": outcomes["duplicate"],
        "reasons": dict(sorted(reasons.items())),
    }


def held_out_subjects(subjects: set[str], val_fraction: float, split_seed: int) -> set[str]:
    """The subjects of the validation split: at least one of two or more, never all, for a fraction above 0.

    Subjects are ranked by a hash of seed and name, so the choice depends on no order of files or workers.
    """
    if val_fraction == 0 or len(subjects) < 2:
        return set()
    count = min(max(1, round(val_fraction * len(subjects))), len(subjects) - 1)
    ranked = sorted(subjects, key=lambda name: hashlib.sha256(f"{split_seed} {name}".encode()).digest())
    return set(ranked[:count])


def _same_voxels(rows: Mapping[str, VolumeRow]) -> dict[str, str]:
    """Volumes that hold the voxels of another one (as .nii and as .nii.gz, say): id -> the one that is kept.

    That is the lowest id of those with a label, or of all.
    """
    first: dict[str, str] = {}
    duplicates = {}
    for volume_id in sorted(rows, key=lambda volume_id: (not rows[volume_id].overlays, volume_id)):
        kept = first.setdefault(rows[volume_id].voxels_sha256, volume_id)
        if kept != volume_id:
            duplicates[volume_id] = kept
    return duplicates


def _label_hashes(row: VolumeRow) -> dict[str, str]:
    return {name: overlay.sha256 for name, overlay in row.overlays.items()}


def _jsonl(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines)


def _write_private(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with durable.open_atomically(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(_jsonl(lines).encode())
