"""Is a process still there, the end of several at once, and locks of processes that are not ours."""

import json
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mimscale.world import Process


def is_alive(pid: int) -> bool:
    """True when a process with this id runs now and is no zombie."""
    return Process.of(pid).is_alive()


def kill_all(pids: Iterable[int]) -> None:
    """kill -9 of processes of which some end with others: with its task srun is gone, with a rank its workers."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def write_lock(path: Path, holder: str, *, pid: int, host: str | None = None, since_unix_s: float = 0.0) -> None:
    """A lock file as another process would have left it."""
    process = Process(pid=pid, host=host or socket.gethostname(), start_ticks=1)
    path.write_text(json.dumps({"holder": holder, "since_unix_s": since_unix_s, "process": vars(process)}))
