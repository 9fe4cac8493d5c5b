"""Is a process still there?"""

from mimscale.world import Process


def is_alive(pid: int) -> bool:
    """True when a process with this id runs now and is no zombie."""
    return Process.of(pid).is_alive()
