"""Parts of packs that are mapped: read without a copy out of the page cache.

On file systems of this machine alone: elsewhere each page that is touched for the first time is a request of its own,
or small ones in a row. Only the loop in C may touch a mapping: it survives a page that cannot be read.
"""

import mmap
from collections import OrderedDict
from pathlib import Path

from mimscale.store import native

# Mapped pages count as memory of the process, though they are shared and taken from it when memory gets short; each
# needs 8 bytes of page tables: a mebibyte of these at most. A window holds a descriptor besides.
MOST_MAPPED_BYTES, MOST_WINDOWS = 512 * 1024 * 1024, 64
# What statfs(2) calls file systems whose pages lie in this machine's memory or on its disks.
_LOCAL = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
}


def is_local(file: int) -> bool:
    """True for an open file on a file system whose pages come from this machine's memory and disks."""
    return native.file_system is not None and native.file_system(file) in _LOCAL


class Windows:
    """Mapped ranges of open files, the least recently used unmapped first."""

    def __init__(self, most_bytes: int = MOST_MAPPED_BYTES, most_windows: int = MOST_WINDOWS) -> None:
        self._most_bytes, self._most_windows = most_bytes, most_windows
        self._windows: OrderedDict[tuple[Path, int, int], memoryview] = OrderedDict()
        self._bytes = 0

    def of(self, path: Path, file: int, position: int, length: int) -> memoryview | None:
        """Bytes [position, position + length) of the file at `path`, or None where they cannot be mapped.

        A byte of them that cannot be read ends the process, but for readers that are prepared.
        """
        key = (path, position, length)
        window = self._windows.get(key)
        if window is not None:
            self._windows.move_to_end(key)
            return window
        before = position % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(file, before + length, mmap.MAP_SHARED, mmap.PROT_READ, offset=position - before)
        except (OSError, ValueError):  # not on this file system; or the file is shorter, which reading it will tell
            return None
        window = self._windows[key] = memoryview(mapped)[before:]
        self._bytes += length
        while self._bytes > self._most_bytes or len(self._windows) > self._most_windows:
            if len(self._windows) == 1:
                break  # a single shard may be larger
            self._forget(next(iter(self._windows)))
        return window

    def forget(self, path: Path) -> None:
        """Unmap what is mapped of a file."""
        for key in [key for key in self._windows if key[0] == path]:
            self._forget(key)

    def clear(self) -> None:
        """Unmap everything."""
        self._windows.clear()
        self._bytes = 0

    def _forget(self, key: tuple[Path, int, int]) -> None:
        del self._windows[key]  # unmapped once nobody reads from it
        self._bytes -= key[2]
