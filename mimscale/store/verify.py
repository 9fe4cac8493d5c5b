"""Every byte of a store against the manifest, pack by pack."""

import hashlib
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mimscale import console
from mimscale.errors import DataError
from mimscale.store import files, layout
from mimscale.store.chunk_maps import chunk_maps_of, why_damaged
from mimscale.store.manifest import SAMPLE_COLUMNS, Manifest, load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import SampleRow
from mimscale.store.writer import SHARD_KEY

_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Something in a store that is not what was written."""

    volume: str  # volume id; empty when the damage belongs to no single volume
    path: str  # the pack
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """A pack that the store should have, and the volumes whose shards the manifest places there."""

    path: Path
    overlay: str | None  # None for the volumes themselves
    rows: Manifest


def verify(store: Path, pool: Executor | None = None) -> list[Bad]:
    """Check every shard's sha256 and every chunk's crc32c, volumes and overlays, and all other bytes of every pack.

    Packs that are missing and packs that no part of the store accounts for are bad too.

    Args:
        store: the store's folder.
        pool: processes that share the packs between them; None checks them in this process.

    Returns:
        what is damaged; empty for a store that is as it was written.

    Raises:
        DataError: no store, or no manifest to compare with.
    """
    info = layout.read_info(store)
    manifest = load_manifest(store, (*SAMPLE_COLUMNS, "sha256"))
    packs = list(_packs_of(store, manifest))
    check = partial(_check_pack, store)
    checked = map(check, packs) if pool is None else pool.map(check, packs)
    bad = [item for found in console.track(checked, "verify packs", len(packs)) for item in found]
    if (reason := why_damaged(store, manifest)) is not None:
        bad.append(Bad(volume="", path=str(chunk_maps_of(store, manifest)), reason=reason))
    return bad + _strangers(store, info, {pack.path for pack in packs})


def _packs_of(store: Path, manifest: Manifest) -> Iterator[_Pack]:
    """Every pack that the manifest speaks of."""
    parts = manifest.column("part")
    for part in np.unique(parts).tolist():
        rows = manifest.take(np.flatnonzero(parts == part))
        yield _Pack(path=layout.pack_path(store, part), overlay=None, rows=rows)
    for name in manifest.overlay_names():
        parts = manifest.overlay_parts(name)
        for part in np.unique(parts[parts >= 0]).tolist():
            rows = manifest.take(np.flatnonzero(parts == part))
            yield _Pack(path=layout.overlay_path(store, name, part), overlay=name, rows=rows)


def _strangers(store: Path, info: layout.StoreInfo, expected: set[Path]) -> list[Bad]:
    """Files among the packs of which the manifest knows nothing."""
    bad = []
    gone = {*info.removed_parts, *info.rewritten_parts}
    for path, _ in sorted(entry for folder in ("packs", "overlays") for entry in files.files_below(store / folder)):
        if path in expected:
            continue
        name = re.fullmatch(r"part-(\d{5,})\.zarr\.zip", path.name)
        folders = {store / "packs", *(store / "overlays" / overlay for overlay in info.overlays)}
        if name and path.parent in folders and int(name[1]) < info.num_parts and int(name[1]) not in gone:
            bad += _damaged_directory(path, set())  # a pack of nothing but duplicates, say
        else:
            reason = "the manifest knows no such pack: left behind, or put there by hand; nothing reads it, remove it"
            bad.append(Bad(volume="", path=str(path), reason=reason))
    return bad


def _check_pack(store: Path, pack: _Pack) -> list[Bad]:
    bad: list[Bad] = []
    if not files.exists(pack.path):
        reason = "the pack is missing; restore it, or remove its receipt and run the same ingest command again"
        lost = pack.rows.column("id").tolist()
        return [Bad(volume=volume_id, path=str(pack.path), reason=reason) for volume_id in lost]
    reader = ShardReader(store, pack.rows)
    for index, sha256 in enumerate(pack.rows.column("sha256").tolist()):
        row = pack.rows.sample_row(index)
        if pack.overlay is not None:
            sha256 = row.overlays[pack.overlay].sha256
        bad += _damaged_shard(reader, row, pack, sha256)
    reader.close()
    return bad + _damaged_directory(pack.path, set(pack.rows.column("id").tolist()))


def _damaged_shard(reader: ShardReader, row: SampleRow, pack: _Pack, sha256: str) -> list[Bad]:
    place = row if pack.overlay is None else row.overlays[pack.overlay]
    try:
        reasons = reader.check(row, pack.overlay)  # first: it names the chunks, a sha256 cannot
        found = _sha256_of_range(pack.path, place.offset_bytes, place.length_bytes)
    except DataError as error:
        reasons, found = [str(error)], sha256
    if not reasons and found != sha256:
        reasons = [f"shard has sha256 {found}, manifest {sha256}"]
    return [Bad(volume=row.id, path=str(pack.path), reason=reason) for reason in reasons]


def _sha256_of_range(path: Path, offset_bytes: int, length_bytes: int) -> str:
    digest = hashlib.sha256()
    with files.open_stream(path) as file:
        file.seek(offset_bytes)
        while length_bytes:
            piece = file.read(min(_PIECE_BYTES, length_bytes))
            if not piece:
                break  # the sha256 differs, which says so
            digest.update(piece)
            length_bytes -= len(piece)
    return digest.hexdigest()


def _damaged_directory(path: Path, checked: set[str]) -> list[Bad]:
    """The zip's own directory, every `zarr.json`, which other tools read, and shards of volumes not `checked` yet."""
    bad = []
    try:
        with files.open_stream(path) as stream, zipfile.ZipFile(stream) as pack:
            for entry in pack.infolist():
                volume = entry.filename.partition("/")[0] if "/" in entry.filename else ""
                try:
                    with pack.open(entry) as file:  # checks the local header as well
                        if not (entry.filename.endswith(SHARD_KEY) and volume in checked):
                            while file.read(_PIECE_BYTES):
                                pass
                except zipfile.BadZipFile as error:
                    bad.append(Bad(volume=volume, path=str(path), reason=f"{entry.filename}: {error}"))
    except (zipfile.BadZipFile, OSError) as error:
        bad.append(Bad(volume="", path=str(path), reason=f"not a readable pack ({error}); restore it or ingest again"))
    return bad
