"""One writer at a time: a lock file that appears complete or not at all, and says who holds it.

flock and modification times lie on some parallel file systems (Lustre may be mounted without them), so neither is used.
While a lock is held, a thread writes the time into a file beside it: another host cannot see our process, but it can
read that.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.errors import DataError, LaunchError
from mimscale.world import Process

# The lock of another host counts as dead when its holder has given no sign of life for so long.
EXPIRES_S = 600.0
BEAT_EVERY_S = 10.0
# A job that its scheduler starts again holds the place of its own earlier start, which is over or about to be. Its lock
# counts as dead after this long without a new sign of life.
OWN_EXPIRES_S = 2.5 * BEAT_EVERY_S
TAKE_OVER_WAIT_S = 5.0


@contextmanager
def sole_writer(path: Path, holder: str, owner: str | None = None) -> Iterator[None]:
    """Hold the lock `path` while the block runs. The lock of a dead process is taken over.

    Args:
        path: the lock file.
        holder: what an error calls us, for example "job 4711".
        owner: what jobs that follow each other have in common, a job and its restart for one. A lock of the same owner
            is waited for.

    Raises:
        LaunchError: somebody else holds it.
        DataError: the disk is full or not writable.
    """
    entry = {"holder": holder, "owner": owner, "since_unix_s": time.time(), "process": vars(Process.this())}
    draft = path.with_name(f"{durable.TEMPORARY_PREFIX}{path.name}.{socket.gethostname()}.{os.getpid()}")
    with durable.explained(DataError, path, "free space or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(entry))
    try:
        _take(path, draft, owner)
    finally:
        draft.unlink(missing_ok=True)
    released = threading.Event()
    beating = threading.Thread(target=_beat, args=(_beat_file(path), released), daemon=True)
    beating.start()
    try:
        yield
    finally:
        released.set()
        beating.join()
        if _read(path) == entry:  # it may have been taken over while this host stood still
            path.unlink(missing_ok=True)
            _beat_file(path).unlink(missing_ok=True)


def refuse_if_held(path: Path) -> None:
    """Do nothing when `path` does not exist or belongs to a dead process.

    Raises:
        LaunchError: its holder lives.
    """
    entry = _read(path)
    if entry is None:
        return
    try:
        process, since_s = Process(**entry["process"]), float(entry["since_unix_s"])
    except (KeyError, TypeError, ValueError):
        raise LaunchError(f"{path}: no lock file of this version; remove it when nobody writes here") from None
    if process.host == socket.gethostname():
        alive = process.is_alive()
    else:
        beat = _read(_beat_file(path)) or {}
        alive = time.time() - max(since_s, beat.get("time_s", 0.0)) < EXPIRES_S
    if alive:
        raise LaunchError(
            f"{path.parent}: {entry['holder']} (process {process.pid} on {process.host}) is writing here; wait for it, "
            f"end it, or use another folder. If that process is gone, remove {path}"
        )


def _take(path: Path, draft: Path, owner: str | None) -> None:
    while True:
        try:
            os.link(draft, path)  # like O_EXCL, but with its content in it from the first moment
            return
        except FileExistsError:
            silent = _wait_for_own(path, owner)
            if not silent:
                refuse_if_held(path)
            _remove_dead(path, draft, silent)


def _wait_for_own(path: Path, owner: str | None) -> dict[str, Any] | None:
    """Wait for an earlier start of the same job; returns its lock once it is dead, None for what is no such lock.

    Whether the sign of life changes is asked, and not how old it is: clocks of two hosts differ.
    """
    entry, beat, changed_s = _read(path), _read(_beat_file(path)), time.monotonic()
    if not entry or owner is None or entry.get("owner") != owner:
        return None
    process = Process(**entry["process"])
    deadline_s = time.monotonic() + EXPIRES_S
    while time.monotonic() < deadline_s:
        here = process.host == socket.gethostname()
        if (here and not process.is_alive()) or time.monotonic() - changed_s > OWN_EXPIRES_S:
            return entry
        time.sleep(0.2)
        newest = _read(_beat_file(path))
        if newest != beat:
            beat, changed_s = newest, time.monotonic()
        if _read(path) != entry:
            return None
    return None


def _remove_dead(path: Path, draft: Path, silent: dict[str, Any] | None) -> None:
    """Remove the lock of a dead process: one taker at a time, or the second would remove the first one's new lock."""
    guard = path.with_name(f"{path.name}.take-over")
    deadline_s = time.monotonic() + TAKE_OVER_WAIT_S
    while True:
        try:
            os.link(draft, guard)
            break
        except FileExistsError:
            if time.monotonic() > deadline_s:
                raise LaunchError(f"{guard}: left by a process that was killed; remove it") from None
            time.sleep(0.05)
    try:
        if silent is None or _read(path) != silent:
            refuse_if_held(path)  # again, now that nobody else can change it
        path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _beat_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.alive")


def _beat(file: Path, released: threading.Event) -> None:
    while True:
        with suppress(OSError):  # a full disk: the writer itself will say so
            durable.write_json(file, {"time_s": time.time()})
        if released.wait(BEAT_EVERY_S):
            return


def _read(path: Path) -> dict[str, Any] | None:
    """A lock or beat file; None when there is none, empty when it is none of ours."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
