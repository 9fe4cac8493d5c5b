"""Every byte of a store against the manifest."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mimscale import console
from mimscale.errors import DataError
from mimscale.store import layout
from mimscale.store.manifest import Manifest, VolumeRow, load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.writer import SHARD_KEY

_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Something in a store that is not what was written."""

    volume: str  # volume id; empty when the damage belongs to no single volume
    path: str  # the pack
    reason: str


def verify(store: Path) -> list[Bad]:
    """Check every shard's sha256 and every chunk's crc32c, volumes and overlays, and all other bytes of every pack.

    Returns:
        what is damaged; empty for a store that is as it was written.

    Raises:
        DataError: no store, or no manifest to compare with.
    """
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest)
    bad: list[Bad] = []
    for index in console.track(range(len(manifest)), "verify volumes", len(manifest)):
        row = manifest.row(index)
        for overlay in (None, *row.overlays):
            bad += _damaged_shard(store, reader, row, overlay)
    reader.close()
    for path in _packs(store, manifest):
        bad += _damaged_directory(path)
    return bad


def _packs(store: Path, manifest: Manifest) -> list[Path]:
    """What the manifest speaks of, and what is there besides: packs of nothing but duplicates, say."""
    rows = [manifest.row(index) for index in range(len(manifest))]
    packs = {layout.pack_path(store, row.part) for row in rows}
    packs |= {layout.overlay_path(store, name, place.part) for row in rows for name, place in row.overlays.items()}
    return sorted({*packs, *store.glob("packs/*.zarr.zip"), *store.glob("overlays/*/*.zarr.zip")})


def _damaged_shard(store: Path, reader: ShardReader, row: VolumeRow, overlay: str | None) -> list[Bad]:
    place = row if overlay is None else row.overlays[overlay]
    path = layout.pack_path(store, row.part) if overlay is None else layout.overlay_path(store, overlay, place.part)
    try:
        reader.check(row, overlay)  # first: it names the chunk, a sha256 cannot
        sha256 = _sha256_of_range(path, place.offset_bytes, place.length_bytes)
    except DataError as error:
        return [Bad(volume=row.id, path=str(path), reason=str(error))]
    if sha256 != place.sha256:
        return [Bad(volume=row.id, path=str(path), reason=f"shard has sha256 {sha256}, manifest {place.sha256}")]
    return []


def _sha256_of_range(path: Path, offset_bytes: int, length_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset_bytes)
        while length_bytes:
            piece = file.read(min(_PIECE_BYTES, length_bytes))
            if not piece:
                break  # the sha256 differs, which says so
            digest.update(piece)
            length_bytes -= len(piece)
    return digest.hexdigest()


def _damaged_directory(path: Path) -> list[Bad]:
    """The zip's own directory and every `zarr.json`, which other tools read."""
    bad = []
    try:
        with zipfile.ZipFile(path) as pack:
            for entry in pack.infolist():
                volume = entry.filename.partition("/")[0] if "/" in entry.filename else ""
                try:
                    with pack.open(entry) as file:  # checks the local header as well
                        if not entry.filename.endswith(SHARD_KEY):
                            file.read()
                except zipfile.BadZipFile as error:
                    bad.append(Bad(volume=volume, path=str(path), reason=f"{entry.filename}: {error}"))
    except (zipfile.BadZipFile, OSError) as error:
        bad.append(Bad(volume="", path=str(path), reason=f"not a readable pack ({error}); restore it or ingest again"))
    return bad
