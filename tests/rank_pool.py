"""Start the ranks of a run as real processes on gloo, with a timeout that prints every rank's stacks.

Ranks fork from a server that has imported torch and DeepSpeed once: a start costs seconds instead of the imports' ten.
"""

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from mimscale.cli import main

Plant = Callable[[int], None]  # called in the process of each rank, with its number
Body = Callable[[list[str]], int]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "mimscale.train.pretrain",
        "mimscale.train.finetune",
        "mimscale.train.session",
        "torch._inductor.compile_fx",  # brings what the start of an engine imports
    ]
)


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Rank:
    """One rank under way."""

    process: BaseProcess
    out: Path
    err: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ignore_known_warnings() -> None:
    """The message-scoped exceptions of the engine; imported late, because it brings torch."""
    from mimscale.train.engine import ignore_known_warnings as ignore

    ignore()


def _be_rank(
    body: Body,
    words: list[str],
    environment: dict[str, str],
    out: Path,
    err: Path,
    signal_rank: int,
    signal_step: int,
    plant: Plant | None,
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what the server has imported is no garbage, and ZeRO-3 looks through all of it twice when it starts
    faulthandler.enable(all_threads=True)
    warnings.simplefilter("error")
    ignore_known_warnings()
    if signal_step >= 0:
        _signal_after(signal_rank, signal_step)
    if plant is not None:
        plant(int(environment["RANK"]))
    sys.exit(body(words))


def _signal_after(rank: int, step: int) -> None:
    """Let this process send itself USR2 when it has trained `step` steps and is `rank`."""
    from mimscale.train.meter import Meter

    record_samples = Meter.record_samples

    def record_and_signal(self: Meter, at: int, sample_ids: list[int]) -> None:
        record_samples(self, at, sample_ids)
        if at == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGUSR2)

    Meter.record_samples = record_and_signal


def start_ranks(
    words: list[str],
    *,
    size: int = 2,
    signal_rank: int = -1,
    signal_step: int = -1,
    body: Body = main,
    plant: Plant | None = None,
    accelerator: str = "cpu",
) -> list[Rank]:
    """Start `mimscale WORDS`, or another function of words, as `size` ranks; `plant` brings a fault into them."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    started = []
    for rank in range(size):
        environment = dict(os.environ) | {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": accelerator,
            "OMP_NUM_THREADS": "1",
        }
        out, err = folder / f"{rank}.out", folder / f"{rank}.err"
        out.touch()
        err.touch()
        arguments = (body, words, environment, out, err, signal_rank, signal_step, plant)
        process = _CONTEXT.Process(target=_be_rank, args=arguments)
        process.start()
        started.append(Rank(process, out, err))
    return started


def wait_for(started: list[Rank], timeout_s: float = 120) -> list[Ended]:
    """Wait for the ranks; one that hangs fails the test with the stacks of all."""
    deadline_s = time.monotonic() + timeout_s
    for rank in started:
        rank.process.join(max(1.0, deadline_s - time.monotonic()))
    hanging = [rank for rank in started if rank.process.exitcode is None]
    for rank in hanging:
        os.kill(rank.process.pid, signal.SIGABRT)  # faulthandler prints the stacks
        rank.process.join(20)
    ended = [Ended(rank.process.exitcode, rank.out.read_text(), rank.err.read_text()) for rank in started]
    assert not hanging, "ranks hang; their stacks:\n" + "\n=== next rank ===\n".join(rank.err for rank in ended)
    return ended


def run_ranks(
    words: list[str],
    *,
    size: int = 2,
    signal_rank: int = -1,
    signal_step: int = -1,
    body: Body = main,
    plant: Plant | None = None,
    accelerator: str = "cpu",
) -> list[Ended]:
    """Start the ranks and wait for them."""
    started = start_ranks(
        words,
        size=size,
        signal_rank=signal_rank,
        signal_step=signal_step,
        body=body,
        plant=plant,
        accelerator=accelerator,
    )
    return wait_for(started)
