"""Files of a store, wherever it lies: on a file system, behind a URL, or staged on a disk of this node.

The place of a store is a `Path` either way: pathlib writes `s3://bucket/store` as `s3:/bucket/store`, and here it
becomes a URL again, which fsspec reads. Credentials and endpoints come from where the scheme's own tools look for them
(`AWS_*`, `~/.aws`), never from a recipe.

fsspec, and not obstore: loader workers are forked, and in a fork obstore's threads are gone, so that every request
hangs, of a new client too. fsspec starts its own thread anew in each process.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

from mimscale.errors import ConfigError
from mimscale.store.windows import Windows, is_local

REMOTE_SCHEMES = ("s3", "gs", "az", "abfs", "memory")
# Chunks of an object nearer than this are read at once: 20 ms a request at 50 MB/s of one connection.
REMOTE_GAP_BYTES = 1024 * 1024
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 20
# auto: map what lies on this machine's own file systems, and read what its page cache lacks; see `Files.window`.
ReadBy = Literal["auto", "map", "pread"]
ATTEMPTS = 4  # of a request that ends in a 5xx, "slow down" or a timeout
# s3fs tries again what broke off under way, and does so at two levels: a silent server gets 2 x 2 x ATTEMPTS requests,
# which end before `stream.timeout_s`; its own 5 x 5 would not.
S3FS_ATTEMPTS = 2
LOOK_FOR_COPY_EVERY_S = 1.0


class OpenFile(Protocol):
    """A file that is open for reading. It is closed when nobody holds it any more."""

    gap_bytes: int | None  # ranges nearer than this are worth one request; None: measure what a request costs

    def read_into(self, position: int, data: memoryview) -> int:
        """Fill `data` with the bytes from `position` on; returns how many there were: fewer at the end of the file.

        Raises:
            OSError: they cannot be read.
        """
        ...

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which (position, length) are read next, so that all are under way at once."""
        ...


class LocalFile:
    """A file of a mounted file system."""

    gap_bytes: int | None = None

    def __init__(self, path: Path) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, position: int, data: memoryview) -> int:
        """See `OpenFile`."""
        done = count = os.preadv(self._file, [data], position)
        while count and done < len(data):
            count = os.preadv(self._file, [data[done:]], position + done)
            done += count
        return done

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `OpenFile`."""
        for position, length in ranges:
            os.posix_fadvise(self._file, position, length, os.POSIX_FADV_WILLNEED)

    def fileno(self) -> int:
        """The descriptor, as for Python's own files."""
        return self._file

    @cached_property
    def is_local(self) -> bool:
        """True where a page that is touched comes from this machine's memory or disk."""
        return is_local(self._file)

    @property
    def is_removed(self) -> bool:
        """True when the file has lost its name: only this descriptor keeps its blocks on the disk."""
        return os.fstat(self._file).st_nlink == 0

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class RemoteFile:
    """An object behind a URL. Opening costs nothing; each range is a request, those announced together run together."""

    gap_bytes: int | None = REMOTE_GAP_BYTES

    def __init__(self, url: str) -> None:
        self._url = url
        self._ahead: dict[tuple[int, int], bytes] = {}

    def read_into(self, position: int, data: memoryview) -> int:
        """See `OpenFile`."""
        found = self._ahead.pop((position, len(data)), None)
        if found is None:
            self.will_read([(position, len(data))])
            found = self._ahead.pop((position, len(data)))
        data[: len(found)] = found
        return len(found)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `OpenFile`. What was announced before and not read is forgotten."""
        self._ahead.clear()
        with _remote_errors(self._url):
            found = _file_system(self._url).cat_ranges(
                [self._url] * len(ranges),
                [position for position, _ in ranges],
                [position + length for position, length in ranges],
                on_error="return",
            )
            for piece in found:
                if isinstance(piece, Exception) and not _is_behind_the_end(piece):
                    raise piece
        for (position, length), piece in zip(ranges, found, strict=True):
            # A server that ignores the range and sends the whole object must not pass for the range.
            if not isinstance(piece, Exception) and len(piece) > length:
                raise OSError(f"the server sent {len(piece)} bytes for a range of {length}")
            self._ahead[position, length] = b"" if isinstance(piece, Exception) else bytes(piece)


class Files:
    """Open files of a store by path, the least recently used closed first; copies on a stage before the originals.

    `hits` and `misses` count how often an opened file was a copy on the stage or not. One for each process.
    """

    def __init__(self, stage: "Copies | None" = None, *, read_by: ReadBy = "auto", max_open_files: int = 64) -> None:
        self._stage = stage
        self._read_by = read_by
        self._windows = Windows()
        self._max_open_files = max_open_files
        self._open: OrderedDict[Path, tuple[OpenFile, bool]] = OrderedDict()
        self._next_look_s: dict[Path, float] = {}
        self.hits = self.misses = 0

    def open(self, path: Path) -> OpenFile:
        """The file at `path`, opened once.

        Raises:
            OSError: there is no such file.
        """
        if self._stage is not None:
            self._look_for_copy(self._stage, path)
        entry = self._open.get(path)
        if entry is None:
            entry = self._open[path] = self._opened(path)
            if len(self._open) > self._max_open_files:
                self._let_go(next(iter(self._open)))
        else:
            self._open.move_to_end(path)
        file, is_copy = entry
        self.hits += is_copy
        self.misses += not is_copy
        return file

    def window(self, path: Path, position: int, length: int) -> tuple[memoryview, int] | None:
        """A part of an opened file as a mapping, or None where it is better read.

        A page that the page cache lacks is a request of its own when it is touched, or of a few pages: larger reads are
        faster, on a disk, and all the more on a parallel file system, which may take pages away at any time.

        Returns:
            the mapping: a byte of it that cannot be read ends the process, but for readers that are prepared; and the
            descriptor by which to ask whether the page cache has what is wanted, or -1: then nobody asks.
        """
        file, _ = self._open[path]
        if self._read_by == "pread" or not isinstance(file, LocalFile):
            return None
        if self._read_by == "auto" and not file.is_local:
            return None
        window = self._windows.of(path, file.fileno(), position, length)
        return None if window is None else (window, file.fileno() if self._read_by == "auto" else -1)

    def close(self) -> None:
        """Forget the open files; they are opened again when asked for."""
        self._windows.clear()
        self._open.clear()
        self._next_look_s.clear()

    def _opened(self, path: Path) -> tuple[OpenFile, bool]:
        copy = None if self._stage is None else self._stage.copy_of(path)
        if copy is not None:
            try:
                return LocalFile(copy), True
            except OSError:
                pass  # evicted this very moment
        return open_file(path), False

    def _look_for_copy(self, stage: "Copies", path: Path) -> None:
        """Now and then: open the copy once there is one, let go of one that was evicted, and mark it as in use."""
        now_s = time.monotonic()
        if now_s < self._next_look_s.get(path, 0.0):
            return
        self._next_look_s[path] = now_s + LOOK_FOR_COPY_EVERY_S
        copy = stage.copy_of(path)
        if copy is not None:
            stage.mark_used(copy)
        if (entry := self._open.get(path)) is not None:
            file, is_copy = entry
            if is_copy != (copy is not None) or (isinstance(file, LocalFile) and is_copy and file.is_removed):
                self._let_go(path)

    def _let_go(self, path: Path) -> None:
        self._windows.forget(path)
        del self._open[path]  # closed once nobody reads from it


class Copies(Protocol):
    """What readers need of a stage; see `mimscale.store.stage.Stage`."""

    def copy_of(self, path: Path) -> Path | None:
        """The complete copy of a file of the store on this node, or None."""
        ...

    def mark_used(self, copy: Path) -> None:
        """Let the copy count as used now."""
        ...


def url_of(path: Path) -> str | None:
    """The URL that a path stands for, or None for a file system's own: `s3:/bucket/store` -> `s3://bucket/store`."""
    first = path.parts[0] if path.parts else ""
    if first.removesuffix(":") not in REMOTE_SCHEMES or not first.endswith(":"):
        return None
    return f"{first}//{'/'.join(path.parts[1:])}"


def local_path(path: Path) -> Path:
    """`path` without the scheme of `file:///...`."""
    return Path("/", *path.parts[1:]) if path.parts and path.parts[0] == "file:" else path


def leads_out_of(store: Path, path: Path) -> bool:
    """True when a link somewhere below a store's folder makes `path` a file outside of it. Objects have no links."""
    if url_of(store) is not None:
        return False
    here = local_path(store)
    there = local_path(path)
    steps = there.relative_to(here).parts
    # Two system calls a pack, and no more: the folders above the store are the user's affair.
    if not any(here.joinpath(*steps[:count]).is_symlink() for count in range(1, len(steps) + 1)):
        return False
    return not there.resolve().is_relative_to(here.resolve())


def open_file(path: Path) -> OpenFile:
    """Open a file or an object. A missing object is found missing at the first read.

    Raises:
        OSError: there is no such file.
    """
    url = url_of(path)
    return LocalFile(local_path(path)) if url is None else RemoteFile(url)


def read_bytes(path: Path) -> bytes:
    """A whole small file.

    Raises:
        OSError: it cannot be read.
    """
    url = url_of(path)
    if url is None:
        return local_path(path).read_bytes()
    with _remote_errors(url):
        return bytes(_file_system(url).cat_file(url))


def open_stream(path: Path) -> IO[bytes]:
    """A file to read and seek in, for libraries that want one.

    Raises:
        OSError: there is no such file.
    """
    url = url_of(path)
    if url is None:
        return local_path(path).open("rb")
    with _remote_errors(url):
        return cast(IO[bytes], _file_system(url).open(url, "rb"))


def size_bytes(path: Path) -> int:
    """Size of a file.

    Raises:
        OSError: there is no such file.
    """
    url = url_of(path)
    if url is None:
        return local_path(path).stat().st_size
    with _remote_errors(url):
        return int(_file_system(url).size(url))


def exists(path: Path) -> bool:
    """True for a file that is there. Other failures than a missing file are raised."""
    try:
        size_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def files_below(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file below a folder with its size, sorted by path; none where there is no folder."""
    url = url_of(folder)
    if url is None:
        there = local_path(folder)
        found_here = (path for path in sorted(there.rglob("*")) if path.is_file())
        yield from ((folder / path.relative_to(there), path.stat().st_size) for path in found_here)
        return
    with _remote_errors(url):
        system = _file_system(url)
        base = system._strip_protocol(url)
        found = system.find(url, detail=True)
    yield from sorted((folder / name[len(base) :].lstrip("/"), int(info["size"])) for name, info in found.items())


def _file_system(url: str) -> Any:
    """The fsspec file system of a URL: one a process and set of options, made anew in a fork."""
    import fsspec

    scheme = url.partition(":")[0]
    options: dict[str, Any] = {}
    if scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
        }
    try:
        system = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; install what reads it: pip install 'mimscale[remote]'") from None
    if scheme == "s3":
        system.retries = S3FS_ATTEMPTS
    return system


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Whatever the library of a scheme raises, a reader meets an OSError, and a missing object a FileNotFoundError."""
    try:
        yield
    except (OSError, ConfigError):
        raise
    except Exception as error:  # each has exceptions of its own: botocore's, aiohttp's, Google's
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def _is_behind_the_end(error: Exception) -> bool:
    """S3's answer to a range that begins behind the last byte: for a file system that is no error but 0 bytes."""
    return "InvalidRange" in str(error) or "requested range is not satisfiable" in str(error).lower()
