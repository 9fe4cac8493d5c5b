"""What a store, and what lies beside it, says about its volumes: where they came from, and which are real."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mimscale.errors import DataError
from mimscale.ingest.merge import journal_path
from mimscale.store import files, layout
from mimscale.store.manifest import load_manifest
from mimscale.store.rows import VolumeRow

# `mimscale cohort` writes it beside imagesTr/ and labelsTr/.
COHORT_FILE = "cohort.json"


@dataclass(frozen=True, kw_only=True)
class VolumeFacts:
    """One volume of a store."""

    id: str
    source: str  # file name of the source, "" when nothing says so
    origin: str | None  # "real", "derived", or None when nothing says so
    description: str = ""  # what a real volume of a cohort is
    split: str
    shape: str  # Z Y X
    spacing: str  # Z Y X, mm
    dtype: str


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """Volumes of a store, or why they cannot be read."""

    path: Path
    problem: str = ""
    modality: str = ""
    volumes: list[VolumeFacts] = field(default_factory=list)

    def view(self) -> dict[str, Any]:
        """What the page shows."""
        origins = [volume.origin for volume in self.volumes]
        splits = [volume.split for volume in self.volumes]
        real = [volume.source or volume.id for volume in self.volumes if volume.origin == "real"]
        counts = ", ".join(f"{splits.count(split)} {split}" for split in sorted(set(splits)))
        return {
            "path": self.path,
            "problem": self.problem,
            "volumes": sorted(self.volumes, key=lambda volume: (volume.source, volume.id)),
            "real": len(real),
            "derived": origins.count("derived"),
            "unknown": origins.count(None),
            "descriptions": [
                f"{volume.source} is {volume.description}" for volume in self.volumes if volume.description
            ],
            "real_names": ", ".join(real) or "a real volume that is not in this store",
            "sentence": f"Store {self.path}: {len(self.volumes)} {self.modality} volumes ({counts}).",
        }


def read_store(path: Path) -> StoreFacts:
    """Read what a store says. A store that is gone is told, not raised: the runs can be shown without it."""
    try:
        info, manifest = layout.read_info(path), load_manifest(path)
    except DataError as error:
        return StoreFacts(path=path, problem=f"not readable now, so its volumes are not listed ({error})")
    sources = read_journal(path)
    rows = (manifest.row(index) for index in range(len(manifest)))
    return StoreFacts(
        path=path, modality=info.modality, volumes=[_volume_facts(row, sources.get(row.id)) for row in rows]
    )


def read_journal(store: Path) -> dict[str, Path]:
    """Volume id -> source file, from the private journal beside a store; empty when there is none to read."""
    try:
        lines = journal_path(store).read_text().splitlines()
    except OSError:
        return {}
    entries = [json.loads(line) for line in lines]
    return {entry["id"]: Path(entry["source"]) for entry in entries if entry["outcome"] == "stored"}


def read_receipts(store: Path) -> Iterator[dict[str, Any]]:
    """What became of every source of a store: the lines of all receipts, duplicates of other parts marked as such."""
    duplicates: set[str] = set()
    if files.exists(layout.duplicates_path(store)):
        lines = files.read_bytes(layout.duplicates_path(store)).decode().splitlines()
        duplicates = {json.loads(line)["id"] for line in lines}
    for part in range(layout.read_info(store).num_parts):
        path = layout.receipt_path(store, part)
        for line in files.read_bytes(path).decode().splitlines() if files.exists(path) else []:
            entry = json.loads(line)
            entry.pop("row", None)
            if entry["outcome"] == "stored" and entry["id"] in duplicates:
                entry["outcome"] = "duplicate"
            yield entry


def origin_of(source: Path) -> tuple[str | None, str]:
    """ "real" or "derived" as the cohort's own list says, and what a real one is; None for a file of no cohort."""
    for folder in source.parents[:2]:
        subjects = _cohort(folder / COHORT_FILE)
        if subjects is not None:
            entry = subjects.get(source.name.partition(".")[0], {})
            return entry.get("kind"), str(entry.get("origin", ""))
    return None, ""


@lru_cache(maxsize=64)
def _cohort(path: Path) -> dict[str, dict[str, Any]] | None:
    """Subject (a file's name up to its first dot) -> how it was made, of a cohort.json; None when there is none."""
    try:
        subjects = json.loads(path.read_text())["subjects"]
    except (OSError, ValueError, KeyError):
        return None
    assert isinstance(subjects, dict)
    return subjects


def _volume_facts(row: VolumeRow, source: Path | None) -> VolumeFacts:
    origin, description = origin_of(source) if source else (None, "")
    return VolumeFacts(
        id=row.id,
        source=source.name if source else "",
        origin=origin,
        description=description,
        split=row.split,
        shape=" x ".join(map(str, row.shape[1:])),
        spacing=" x ".join(f"{edge:.3g}" for edge in row.spacing_mm),
        dtype=row.dtype,
    )
