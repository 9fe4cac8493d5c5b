"""Who am I among the processes of this run, and has somebody asked me to stop?

Everything about rank and size comes from here. Sources, in this order: torchrun (RANK ...), Slurm (SLURM_PROCID ...),
otherwise a single process.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mimscale.errors import LaunchError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of one process in a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: str = "localhost"
    master_address: str = "127.0.0.1"
    master_port: int = 0  # the system chooses: alone nobody else must find it

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise LaunchError(
                f"rank {self.rank} of {self.size}, local rank {self.local_rank} of {self.local_size}: not a legal "
                "place; unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or set all four"
            )

    @property
    def is_first(self) -> bool:
        """True on the one process that writes what all share."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "World":
        """Read the place of this process from the variables that a launcher sets.

        Raises:
            LaunchError: only some of a launcher's variables are set, or one is no number.
        """
        if "RANK" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        else:
            return cls(node=socket.gethostname())
        missing = [name for name in names if name not in environment]
        if missing:
            raise LaunchError(
                f"{', '.join(missing)} not set beside {names[0]}; a launcher sets all of {', '.join(names)}"
            )
        try:
            rank, size, local_rank, local_size = (int(environment[name]) for name in names)
        except ValueError as error:
            raise LaunchError(f"{', '.join(names)}: {error}; each must be a whole number") from None
        if local_size < size and "MASTER_ADDR" not in environment:
            raise LaunchError(
                f"{size} ranks on more than one node, but MASTER_ADDR does not say where rank 0 is; set it"
            )
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            node=socket.gethostname(),
            master_address=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environment.get("MASTER_PORT", "29400")),
        )

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed read; all five, or DeepSpeed looks for MPI."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class Process:
    """One process of one host. Its start time tells it from a later process with the same id."""

    pid: int
    host: str
    start_ticks: int  # clock ticks since boot, field 22 of /proc/PID/stat; -1 when there was no such process

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has this id now on this host."""
        return cls(pid=pid, host=socket.gethostname(), start_ticks=_state_and_start(pid)[1])

    @classmethod
    def this(cls) -> "Process":
        """The calling process."""
        return cls.of(os.getpid())

    def is_alive(self) -> bool:
        """True when it runs on this host, and is no zombie. Of another host nothing is known here: False."""
        state, start_ticks = _state_and_start(self.pid)
        return self.host == socket.gethostname() and state not in ("", "Z") and start_ticks == self.start_ticks


def _state_and_start(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()  # the name before it may hold spaces
    except OSError:
        return "", -1
    return fields[0], int(fields[19])


def die_with_parent(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends, in whatever way. Does nothing but on Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(number))


class StopRequest:
    """Remembers a scheduler's signal; the ranks agree on a stop step in a reduction that they make anyway.

    Limits of time stop a run in the same way, so that one ends well where no signal announces the end.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGUSR2, signal.SIGTERM)) -> None:
        self.received: signal.Signals | None = None
        self._limits: dict[str, float] = {}  # name -> monotonic seconds
        self._previous = {number: signal.signal(number, self._remember) for number in signals}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)  # nothing else: a handler runs between any two bytecodes

    def stop_after(self, name: str, seconds: float) -> None:
        """Ask for a stop after so many seconds from now; `name` is what the outcome calls this limit."""
        self._limits[name] = time.monotonic() + seconds

    @property
    def reason(self) -> str:
        """The signal or the limit that asks this process to stop; empty while nothing does."""
        if self.received is not None:
            return self.received.name
        now_s = time.monotonic()
        return next((name for name, limit_s in self._limits.items() if now_s > limit_s), "")

    def hand_back(self) -> None:
        """Put back the handlers that stood before ours."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def leave_at_once(code: int) -> NoReturn:
    """End this process without taking the interpreter down in order; child processes are ended, output is flushed.

    Threads of gloo outlive its process group, because DeepSpeed keeps references to it. One that lets go of a tensor
    while the interpreter goes down needs a lock that is no longer to be had, and the C++ runtime ends the process with
    SIGABRT, although all is done. To take torch down also takes seconds, out of those that a preemption leaves.
    """
    for child in active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
