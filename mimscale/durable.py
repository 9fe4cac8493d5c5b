"""Files that are complete or absent: temporary name, fsync, rename, fsync of the folder.

A reader never sees half a file under its final name, whatever killed the writer. A temporary file starts with `.tmp-`,
so that a later run can tell it from data and remove it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mimscale.errors import MimscaleError

TEMPORARY_PREFIX = ".tmp-"


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a file that something else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears as `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole small file, complete or not at all."""
    with open_atomically(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole small UTF-8 file, complete or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, tree: Any) -> None:
    """Write sorted, indented JSON, complete or not at all. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(tree, indent=2, sort_keys=True, allow_nan=False) + "\n")


def rename_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name. Both stand in the same parent folder."""
    temporary.rename(final)
    fsync_folder(final.parent)


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def explained(kind: type[MimscaleError], path: Path, way_out: str) -> Iterator[None]:
    """Turn an OSError of the block into `kind`, with the path, the bytes that are free and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise kind(f"{path}: the disk is full ({_free_bytes(path)} bytes free); {way_out}") from error
        raise kind(f"{path}: {error.strerror or error}; {way_out}") from error


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free
