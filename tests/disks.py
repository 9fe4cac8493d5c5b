"""A file system that is full after some kilobytes."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import skip_unless


@contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[Path]:
    """Mount a disk of `size_kb` as `folder` while the block runs."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    may_mount = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    skip_unless(may_mount, "a file system of limited size can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left_kb: int) -> None:
    """Leave `left_kb` free."""
    free = os.statvfs(disk)
    with (disk / "filling").open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize - left_kb * 1024))
