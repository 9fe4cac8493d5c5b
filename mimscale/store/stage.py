"""Copies of packs on a disk of this node, for stores that lie far away.

stage_dir/<16 hex digits>-part-00042.zarr.zip

The digits are a hash of the shards that the manifest places in the pack, so a copy is that of one content whatever
store, run or path it came from: several runs share a folder, and an old copy can never pass for another pack. A copy
has its name only when every shard in it has the sha256 that the manifest knows. The time of last use is the file's
modification time: the disk is this node's own, and nobody locks by it.
"""

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError, LaunchError
from mimscale.lock import sole_writer
from mimscale.store import files, layout
from mimscale.store.manifest import Manifest
from mimscale.world import Process

# What a stage needs of a manifest.
STAGE_COLUMNS = ("id", "part", "offset_bytes", "length_bytes", "sha256", "overlays")
_PIECE_BYTES = 8 * 1024 * 1024
_PIECES_AT_ONCE = 8
_ROOM_WAIT_S = 10.0


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack of a store with n shards, and what its copy is called."""

    path: Path
    name: str
    offsets: NDArray[np.int64]  # [n]
    lengths: NDArray[np.int64]  # [n]
    sha256s: NDArray[np.bytes_]  # [n] 32 bytes each


class Added(Enum):
    """What became of an attempt to copy a pack."""

    COPIED = "copied"
    THERE = "there already"
    BUSY = "another run is copying it"
    FULL = "no room"
    UNREADABLE = "the pack cannot be read, or is damaged"


class Stage:
    """A folder of copies on this node's own disk, shared by everybody who reads stores here."""

    def __init__(self, folder: Path, limit_bytes: int, packs: Sequence[Pack]) -> None:
        """Make the folder, when there is none.

        Args:
            folder: on a disk of this node.
            limit_bytes: what all copies in it may take up together.
            packs: the packs of the store that copies are wanted of.

        Raises:
            DataError: the folder cannot be made or written.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.copied_bytes = 0  # by this process, of complete copies
        self.packs = {pack.path: pack for pack in packs}
        way_out = "choose another stream.stage_dir, or leave it out to read the store itself"
        with durable.explained(DataError, folder, way_out):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(None, "not writable")

    def copy_of(self, path: Path) -> Path | None:
        """The complete copy of a pack, or None."""
        pack = self.packs.get(path)
        if pack is None:
            return None
        copy = self.folder / pack.name
        return copy if copy.exists() else None

    def mark_used(self, copy: Path) -> None:
        """Let a copy count as used now."""
        with suppress(OSError):  # evicted this very moment
            os.utime(copy)

    def discard(self, path: Path) -> bool:
        """Remove the copy of a pack; True when there was one. For a copy that turned out to be unreadable."""
        copy = self.copy_of(path)
        if copy is None:
            return False
        copy.unlink(missing_ok=True)
        return True

    def add(self, path: Path, keep: frozenset[Path] = frozenset()) -> Added:
        """Copy a pack, unless it is there; the least recently used copies make room, but never those of `keep`.

        Nothing is raised for what a disk or a source does: the store itself can always be read instead.
        """
        pack = self.packs[path]
        if self.copy_of(path) is not None:
            return Added.THERE
        try:
            # Per pack: a second run that needs the same one goes on with the next.
            with sole_writer(self.folder / f"{pack.name}.lock", f"process {os.getpid()}"):
                return Added.THERE if self.copy_of(path) is not None else self._add(pack, keep)
        except LaunchError:
            return Added.BUSY
        except (DataError, OSError):
            return Added.FULL

    def _add(self, pack: Pack, keep: frozenset[Path]) -> Added:
        try:
            source, size = files.open_file(pack.path), files.size_bytes(pack.path)
        except OSError:
            return Added.UNREADABLE
        if size < (pack.offsets + pack.lengths).max():
            return Added.UNREADABLE  # truncated
        this = Process.this()
        draft = self.folder / f"{durable.TEMPORARY_PREFIX}{pack.name}.{this.pid}.{this.start_ticks}"
        try:
            with draft.open("w+b") as file:
                if not self._reserve(file.fileno(), size, keep):
                    return Added.FULL
                try:
                    complete = _copy(source, file.fileno(), size)
                except _SourceError:
                    complete = False
                if not complete or not _matches(file.fileno(), pack):
                    return Added.UNREADABLE
                os.fsync(file.fileno())
            draft.replace(self.folder / pack.name)
            durable.fsync_folder(self.folder)
            self.copied_bytes += size
        finally:
            draft.unlink(missing_ok=True)
        return Added.COPIED

    def _reserve(self, draft: int, size: int, keep: frozenset[Path]) -> bool:
        """Take up `size` bytes for a draft, with one process at a time making room; False when there is none."""
        kept = {self.packs[path].name for path in keep if path in self.packs}
        with self._alone():
            copies, taken = [], 0
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    taken += status.st_size
                    if _is_dead_draft(entry.name):
                        Path(entry.path).unlink()
                        taken -= status.st_size
                    elif entry.name.endswith(".zarr.zip") and not entry.name.startswith(durable.TEMPORARY_PREFIX):
                        copies.append((status.st_mtime, entry.name, status.st_size))
            removable = sorted(copy for copy in copies if copy[1] not in kept)
            if taken - sum(copy[2] for copy in removable) + size > self.limit_bytes:
                return False  # nobody's copies must go for a pack that does not fit anyway
            for _, name, length in removable:
                if taken + size <= self.limit_bytes:
                    break
                (self.folder / name).unlink(missing_ok=True)
                taken -= length
            try:
                os.posix_fallocate(draft, 0, max(size, 1))  # a full disk shows now and not after gigabytes
            except OSError:
                return False
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        deadline_s = time.monotonic() + _ROOM_WAIT_S
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(sole_writer(self.folder / "room.lock", f"process {os.getpid()}"))
                    break
                except LaunchError:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.05)
            yield


def packs_of(store: Path, manifest: Manifest, overlay: str | None = None) -> list[Pack]:
    """The packs of a store's volumes, and those of an overlay. `manifest` needs `STAGE_COLUMNS`."""
    packs = _grouped(partial(layout.pack_path, store), *manifest.shards())
    if overlay is not None:
        packs += _grouped(partial(layout.overlay_path, store, overlay), *manifest.shards(overlay))
    return packs


def _grouped(
    path_of: Callable[[int], Path],
    parts: NDArray[np.int64],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    sha256s: NDArray[np.bytes_],
) -> list[Pack]:
    order = np.lexsort((offsets, parts))
    packs = []
    for rows in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
        if len(rows):
            shards = offsets[rows], lengths[rows], sha256s[rows]
            digest = hashlib.sha256(b"".join(column.tobytes() for column in shards)).hexdigest()[:16]
            path = path_of(int(parts[rows[0]]))
            packs.append(Pack(path, f"{digest}-{path.name}", *shards))
    return packs


class _SourceError(Exception):
    """The pack cannot be read: no fault of the stage's disk."""


@contextmanager
def _of_source() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _SourceError from error


def _copy(source: files.OpenFile, target: int, size: int) -> bool:
    """Copy `size` bytes; False when the source ends before.

    Raises:
        _SourceError: the source cannot be read.
        OSError: the target cannot be written.
    """
    pieces = [(position, min(_PIECE_BYTES, size - position)) for position in range(0, size, _PIECE_BYTES)]
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for start in range(0, len(pieces), _PIECES_AT_ONCE):
        with _of_source():
            source.will_read(pieces[start : start + _PIECES_AT_ONCE])
        for position, length in pieces[start : start + _PIECES_AT_ONCE]:
            data = buffer[:length]
            with _of_source():
                found = source.read_into(position, data)
            if found < length:
                return False
            while data:
                written = os.pwrite(target, data, position)
                data, position = data[written:], position + written
    return True


def _matches(file: int, pack: Pack) -> bool:
    """Whether every shard of the copy has the sha256 that the manifest knows."""
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
        for offset, length, sha256 in zip(pack.offsets, pack.lengths, pack.sha256s, strict=True):
            with data[offset : offset + length] as shard:
                if hashlib.sha256(shard).digest() != sha256.ljust(32, b"\0"):  # NumPy cuts zero bytes off the end
                    return False
    return True


def _is_dead_draft(name: str) -> bool:
    """A draft, of a copy or of a lock, whose process was killed: its id, and for copies its start, end the name."""
    if not name.startswith(durable.TEMPORARY_PREFIX):
        return False
    *_, second_last, last = name.split(".")
    pid, start_ticks = (second_last, last) if second_last.isdigit() else (last, None)
    if not pid.isdigit():
        return False
    process = Process.of(int(pid))
    return not process.is_alive() or (start_ticks is not None and start_ticks != str(process.start_ticks))
