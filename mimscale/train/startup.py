"""Where the time goes between the scheduler's start of a job and its first step: startup.json in the run directory.

unpack_s       the environment's archive to the disks of the nodes (batch script)
launch_s       srun, until Python runs on rank 0
import_s       mimscale, torch and DeepSpeed
init_s         the process group; includes waiting for the slowest rank
preflight_s    facts of all ranks compared
build_s        store, model and engine
load_s         the newest checkpoint
first_batch_s  until the loader gives the first micro-batch
first_step_s   the rest of the first step
total_s        all of it
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from mimscale import durable
from mimscale.console import say
from mimscale.train.run_dir import RunDir

T = TypeVar("T")
# When the batch script began, when it called srun, and when Python ran: seconds since 1970.
MARKS = {"unpack_s": "MIMSCALE_BATCH_UNIX_S", "launch_s": "MIMSCALE_SRUN_UNIX_S", "import_s": "MIMSCALE_RANK_UNIX_S"}


def _process_began_unix_s() -> float | None:
    """When this process began, where the kernel tells it: for runs that no launcher of ours has started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return time.time() - (up_s - ticks / os.sysconf("SC_CLK_TCK"))


class Startup:
    """Spans of this process from the scheduler's start to the first step.

    Args:
        environment: holds the marks that launchers leave; without one the span before it is not known.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        if MARKS["import_s"] not in environment and (began_s := _process_began_unix_s()) is not None:
            environment = {**environment, MARKS["import_s"]: str(began_s)}
        marks = [(name, float(environment[variable])) for name, variable in MARKS.items() if variable in environment]
        now_s = time.time()
        self._began_s = marks[0][1] if marks else now_s
        self._last_s = now_s
        begins_s = [began_s for _, began_s in marks] + [now_s]
        self.spans = {name: begins_s[index + 1] - began_s for index, (name, began_s) in enumerate(marks)}
        self._done = False

    def ends(self, span: str) -> None:
        """The span that began with the end of the one before it is over."""
        now_s = time.time()
        self.spans[span] = now_s - self._last_s
        self._last_s = now_s

    @property
    def running_s(self) -> float:
        """Seconds since the scheduler started this job."""
        return time.time() - self._began_s

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the first one ends a span."""
        for batch in batches:
            if "first_batch_s" not in self.spans:
                self.ends("first_batch_s")
            yield batch

    def first_step_is_done(self, run: RunDir) -> None:
        """Write startup.json, once."""
        if not self._done:
            self._done = True
            self.ends("first_step_s")
            spans = {name: round(seconds, 3) for name, seconds in self.spans.items()}
            total_s = round(self._last_s - self._began_s, 3)
            durable.write_json(run.path / "startup.json", {**spans, "total_s": total_s})
            parts = "  ".join(f"{name.removesuffix('_s')} {seconds:.1f}" for name, seconds in spans.items())
            say(f"first step after {total_s:.1f} s: {parts}")
