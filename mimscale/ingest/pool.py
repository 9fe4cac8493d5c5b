"""Worker processes that end with the process that started them, however that one died."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from mimscale.errors import DataError


@contextmanager
def process_pool(workers: int, jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to share `jobs` between; None when one is enough.

    Started afresh, not forked: numpy may hold threads.

    Raises:
        DataError: a worker was killed.
    """
    if min(workers, jobs) <= 1:
        yield None
        return
    pool = ProcessPoolExecutor(min(workers, jobs), multiprocessing.get_context("spawn"), initializer=_leave_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; what is finished is kept: "
            "run the same command again, with a smaller workers=N"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def wait() -> None:
        # A killed parent never tells its workers; they would wait for work for ever.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
