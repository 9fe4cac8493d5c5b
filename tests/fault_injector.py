"""Faults, planted on purpose: in files, in writes, in time, and in whole processes.

    files       truncate, flip_bit, empty, delete; DAMAGES has all of them
    writes      failing_write (ENOSPC, EIO ... at the n-th write), hanging_write, slow_disk; full disks of a real
                kernel: `disks`
    time        clock_jump
    processes   kill_at (before a named call), kill_at_operation (before the n-th file operation), kill_at_random_time;
                `arm` plants a fault for good, for programs that a test starts

What is planted by a context manager is gone after its block. Only Python's own files are reached: what a library
writes in C passes by, and takes a full disk of the kernel.
"""

import errno
import functools
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# What changes a disk, or begins to. A kill before each of them in turn visits every state that a disk can be left in.
FILE_OPERATIONS = (
    "os:fsync",
    "os:open",
    "pathlib:Path.open",
    "pathlib:Path.mkdir",
    "pathlib:Path.rename",
    "pathlib:Path.replace",
    "pathlib:Path.unlink",
    "shutil:rmtree",
)


def truncate(file: Path) -> None:
    """Cut off the last third, one byte at least."""
    size = file.stat().st_size
    os.truncate(file, min(size - 1, size * 2 // 3))


def flip_bit(file: Path, byte: int | None = None) -> None:
    """Turn one bit over, in the middle by default; size and name stay."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if byte is None else byte] ^= 0x10
    file.write_bytes(data)


def empty(file: Path) -> None:
    """Leave the name and no byte, as a power cut without fsync does."""
    file.write_bytes(b"")


def delete(file: Path) -> None:
    """Remove the file."""
    file.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "bit flipped": flip_bit,
    "emptied": empty,
    "deleted": delete,
}


class _WatchedFile:
    """A file that calls `before` before each write."""

    def __init__(self, file: Any, before: Callable[[], None]) -> None:
        self._file, self._before = file, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_WatchedFile":
        self._file.__enter__()
        return self

    def __exit__(self, *details: Any) -> Any:
        return self._file.__exit__(*details)

    def write(self, data: Any) -> int:
        self._before()
        return self._file.write(data)


@contextmanager
def _before_writes(below: Path, action: Callable[[Path], None]) -> Iterator[None]:
    """Call `action` before each write and fsync below a folder, with the path."""
    folder = str(below)
    path_open, os_fsync = Path.open, os.fsync

    def open_watched(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = path_open(path, mode, *arguments, **options)
        if not str(path).startswith(folder) or not set(mode) & set("wax+"):
            return file
        return _WatchedFile(file, functools.partial(action, path))

    def fsync_watched(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if str(path).startswith(folder):
            action(path)
        os_fsync(descriptor)

    with mock.patch.object(Path, "open", open_watched), mock.patch.object(os, "fsync", fsync_watched):
        yield


@contextmanager
def failing_write(nth: int, number: int = errno.ENOSPC, *, below: Path) -> Iterator[list[Path]]:
    """Let the n-th write (0 is the first) or fsync below a folder fail, and all after it, as on a disk that is full.

    Gives the list of what was written to up to then: it is as long as the count of writes when none failed.
    """
    written: list[Path] = []

    def count(path: Path) -> None:
        written.append(path)
        if len(written) > nth:
            raise OSError(number, os.strerror(number), str(path))

    with _before_writes(below, count):
        yield written


def hang() -> None:
    """Stand still for ever, as a call to a file system whose server is gone."""
    while True:
        time.sleep(3600)


@contextmanager
def hanging_write(nth: int, *, below: Path, on_disk: Path | None = None) -> Iterator[list[Path]]:
    """Let the n-th write (0 is the first) or fsync below a folder, and all after it, never come back.

    From then on those to the rest of the disk do not either, where `on_disk` says what belongs to it. Gives the list of
    what was written to below the folder up to then, as `failing_write`.
    """
    written: list[Path] = []

    def count(path: Path) -> None:
        if path.is_relative_to(below):
            written.append(path)
        if len(written) > nth:
            hang()

    with _before_writes(on_disk or below, count):
        yield written


@contextmanager
def slow_disk(fsync_s: float) -> Iterator[None]:
    """Let each fsync take this long, as on a parallel file system that is busy."""
    os_fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(fsync_s)
        os_fsync(descriptor)

    with mock.patch.object(os, "fsync", slow):
        yield


@contextmanager
def clock_jump(seconds: float) -> Iterator[None]:
    """Let the clock on the wall, not the monotonic one, jump by this much: NTP, or another node's clock."""
    real = time.time
    with mock.patch.object(time, "time", side_effect=lambda: real() + seconds):
        yield


def die() -> None:
    """End this process as `kill -9` does: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _before(point: str, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` before each call of a function that is named as "module:Class.function"."""
    module_name, _, path = point.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        action()
        return function(*arguments, **options)

    with mock.patch.object(owner, name, call):
        yield


def _die_at(call: int) -> Callable[[], None]:
    left = [call]

    def count() -> None:
        if left[0] == 0:
            die()
        left[0] -= 1

    return count


def kill_at(point: str, call: int = 0) -> AbstractContextManager[None]:
    """Die before a call (0 is the first) of "module:Class.function", such as "mimscale.durable:rename_folder"."""
    return _before(point, _die_at(call))


@contextmanager
def kill_at_operation(nth: int) -> Iterator[None]:
    """Die before the n-th of all `FILE_OPERATIONS`."""
    count = _die_at(nth)
    with ExitStack() as stack:
        for point in FILE_OPERATIONS:
            stack.enter_context(_before(point, count))
        yield


@contextmanager
def kill_at_random_time(seed: int, within_s: float) -> Iterator[None]:
    """Die at a moment within so many seconds, which the seed chooses: by an alarm of the kernel, inside any call."""
    previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once; Python hears nothing of it
    signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-6, within_s))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


_armed = ExitStack()  # never closed: the fault stays as long as the process


def arm(fault: AbstractContextManager[Any]) -> None:
    """Plant a fault for the rest of this process."""
    _armed.enter_context(fault)


def run_program(text: str, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python text in a process of its own that finds the modules of tests/; `words` are its sys.argv[1:]."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{text}"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # so that imports write no file
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=timeout_s, env=environment
    )


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Put a folder back to its bytes of before, so that one costly folder serves many faults."""
    copy = folder.with_name(f"{folder.name}.before")
    shutil.copytree(folder, copy, symlinks=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        copy.rename(folder)
