"""Is a process still there, and locks of processes that are not ours."""

import json
import socket
from pathlib import Path

from mimscale.world import Process


def is_alive(pid: int) -> bool:
    """True when a process with this id runs now and is no zombie."""
    return Process.of(pid).is_alive()


def write_lock(path: Path, holder: str, *, pid: int, host: str | None = None, since_unix_s: float = 0.0) -> None:
    """A lock file as another process would have left it."""
    process = Process(pid=pid, host=host or socket.gethostname(), start_ticks=1)
    path.write_text(json.dumps({"holder": holder, "since_unix_s": since_unix_s, "process": vars(process)}))
