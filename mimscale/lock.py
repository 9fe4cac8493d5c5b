"""One writer at a time: a lock file that appears complete or not at all, and says who holds it.

flock and modification times lie on some parallel file systems (Lustre may be mounted without them), so neither is used.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mimscale import durable
from mimscale.errors import DataError, LaunchError
from mimscale.world import Process

# The lock of another host counts as dead when its holder has given no sign of life for so long.
EXPIRES_S = 600.0


@contextmanager
def sole_writer(path: Path, holder: str, last_sign_s: Callable[[], float | None] | None = None) -> Iterator[None]:
    """Hold the lock `path` while the block runs. The lock of a dead process is taken over.

    Args:
        path: the lock file.
        holder: what an error calls us, for example "job 4711".
        last_sign_s: Unix time of the holder's last sign of life, or None for none yet; without this function the lock
            of another host stands until somebody removes it.

    Raises:
        LaunchError: somebody else holds it.
        DataError: the disk is full or not writable.
    """
    entry = {"holder": holder, "since_unix_s": time.time(), "process": vars(Process.this())}
    draft = path.with_name(f"{durable.TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    with durable.explained(DataError, path, "free space or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(entry))
    try:
        _take(path, draft, last_sign_s)
    finally:
        draft.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def refuse_if_held(path: Path, last_sign_s: Callable[[], float | None] | None = None) -> None:
    """Remove the lock of a dead process.

    Raises:
        LaunchError: its holder lives.
    """
    try:
        entry = json.loads(path.read_text())
        process = Process(**entry["process"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise LaunchError(f"{path}: no lock file of this version; remove it when nobody writes here") from None
    if process.host == socket.gethostname():
        alive = process.is_alive()
    else:
        sign_s = max(entry["since_unix_s"], (last_sign_s() if last_sign_s else None) or 0.0)
        alive = last_sign_s is None or time.time() - sign_s < EXPIRES_S
    if alive:
        raise LaunchError(
            f"{path.parent}: {entry['holder']} (process {process.pid} on {process.host}) is writing here; wait for it, "
            f"end it, or use another folder. If that process is gone, remove {path}"
        )
    path.unlink(missing_ok=True)


def _take(path: Path, draft: Path, last_sign_s: Callable[[], float | None] | None) -> None:
    for _ in range(3):
        try:
            os.link(draft, path)  # like O_EXCL, but with its content in it from the first moment
            return
        except FileExistsError:
            refuse_if_held(path, last_sign_s)
    raise LaunchError(f"{path.parent}: others take its lock at the same moment; try again")
