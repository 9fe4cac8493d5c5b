"""A contender in a process of its own, pinned to one core, that is told round by round what to read.

Some contenders do not survive a fork, and none may profit from what another has loaded. All live at once and work in
turn, so that what else the machine does hits every one of them.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from mimscale.bench.crops import MODES, Triple, chunks_of, draw
from mimscale.errors import DataError
from mimscale.store.layout import read_info
from mimscale.store.manifest import SAMPLE_COLUMNS, load_manifest

_SILENT_S = 300.0  # a round that takes longer is none


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one contender reads."""

    contender: str  # module:class
    mode: str  # a key of MODES
    store: str
    rows: tuple[int, ...]  # of the manifest
    crop_voxels: Triple
    folder: str = ""  # where copies for contenders with files of their own lie
    core: int | None = None
    slow: dict[str, str] = field(default_factory=dict)  # environment that makes file access slow


class Contender(Protocol):
    """What reads crops. Its constructor takes a `Job`, and it opens nothing before `open`."""

    def open(self) -> None:
        """Open files, build indices: what is done once in a run."""
        ...

    def read(self, number: int) -> int:
        """Read what call `number` of the job draws, and return the number of crops."""
        ...

    def close(self) -> None:
        """Forget everything, so that the page cache can be emptied."""
        ...

    @property
    def voxels_decoded(self) -> int:
        """Voxels that were decompressed or converted so far."""
        ...

    @property
    def bytes_mapped(self) -> int:
        """Bytes taken out of mapped files so far, by one that counts them: no system call tells."""
        ...


class Crops:
    """The calls of a job: which volume, which crops."""

    def __init__(self, job: Job) -> None:
        manifest = load_manifest(Path(job.store), SAMPLE_COLUMNS)
        self.rows = [manifest.sample_row(row) for row in job.rows]
        self.manifest = manifest
        self.chunk_voxels = read_info(Path(job.store)).chunk_voxels
        self.size = job.crop_voxels
        self.mode = MODES[job.mode]
        self._shapes: list[Triple] = [row.shape[1:] for row in self.rows]

    def call(self, number: int) -> tuple[int, list[Triple]]:
        """Index into `rows`, and the first voxel of each crop."""
        return draw(self.mode, self._shapes, self.size, self.chunk_voxels, seed=1, number=number)

    def touched_voxels(self, volume: int, origins: list[Triple]) -> int:
        """Voxels of all chunks that these crops touch: what a reader of whole chunks decodes."""
        return len(chunks_of(origins, self.size, self.chunk_voxels)) * self.chunk_voxels**3 * self.rows[volume].shape[0]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One timed round."""

    crops: int
    seconds: float
    cpu_s: float
    file_bytes: int  # asked for by system calls, or counted as `bytes_mapped`
    storage_bytes: int  # that really came from storage
    voxels_decoded: int


class Runner:
    """The process of one contender."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._next_call = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **job.slow,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mimscale.bench.contender", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def round(self, calls: int, *, reopen: bool = False, drop: bool = False) -> Round:
        """Do `calls` calls.

        Args:
            calls: how many.
            reopen: close all files before, and open them anew.
            drop: besides, empty the page cache of the store and the folder.

        Raises:
            DataError: the contender ended or was silent for too long; its own words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"first": self._next_call, "calls": calls, "reopen": reopen or drop, "drop": drop}
        self._next_call += calls
        watch = threading.Timer(_SILENT_S, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            raise DataError(f"contender {self.job.contender} ended (exit code {self._process.wait()})")
        return Round(**json.loads(line))

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def drop_from_page_cache(folders: Iterable[Path]) -> None:
    """Make the kernel forget the clean pages of all files below `folders`."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def serve(argument: str) -> None:
    """The process: orders come on stdin, one JSON line each, and results go to stdout."""
    # A library may print; only results may reach the one who reads them.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tree = json.loads(argument)
    job = Job(**{**tree, "rows": tuple(tree["rows"]), "crop_voxels": tuple(tree["crop_voxels"])})
    if job.core is not None:
        os.sched_setaffinity(0, {job.core})
    module, name = job.contender.split(":")
    contender: Contender = getattr(importlib.import_module(module), name)(job)
    contender.open()
    is_open = True
    folders = [Path(name) for name in (job.store, job.folder) if name]
    for line in sys.stdin:
        order = json.loads(line)
        if order["reopen"]:
            if is_open:
                contender.close()
            if order["drop"]:
                drop_from_page_cache(folders)
            contender.open()
            is_open = True
        done = _timed(contender, order["first"], order["calls"])
        if order["drop"]:  # the next contender cannot drop pages that this one has mapped
            contender.close()
            is_open = False
        print(json.dumps(asdict(done)), file=results, flush=True)
    results.close()
    os._exit(0)  # taking a library down in order takes seconds, and nothing is left to lose


def _timed(contender: Contender, first: int, calls: int) -> Round:
    before, decoded, mapped = _io(), contender.voxels_decoded, contender.bytes_mapped
    start, cpu = time.perf_counter(), time.process_time()
    crops = sum(contender.read(number) for number in range(first, first + calls))
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    after = _io()
    return Round(
        crops=crops,
        seconds=seconds,
        cpu_s=cpu_s,
        file_bytes=after["rchar"] - before["rchar"] + contender.bytes_mapped - mapped,
        storage_bytes=after["read_bytes"] - before["read_bytes"],
        voxels_decoded=contender.voxels_decoded - decoded,
    )


def _io() -> dict[str, Any]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


if __name__ == "__main__":
    serve(sys.argv[1])
