"""What runs inside a job: `RunVerb` in each process, the variables it needs, and how a process is told from another.

Submitit pickles `RunVerb` by reference, so this module imports nothing that a node could lack and no torch.
"""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit

from launch.folder import JobFolder
from launch.profile import OWN_VARIABLES, Accelerator
from launch.slurm_commands import without_allocation
from mimscale import cli
from mimscale.console import say
from mimscale.errors import INTERRUPTED_EXIT_CODE, LaunchError
from mimscale.train.startup import MARKS as STARTUP_MARKS
from mimscale.world import World, leave_at_once

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
# All that a supervisor and a waiting `submit` listen to. Blocked while a job is being started: one that comes then
# waits until there are handlers for it.
JOB_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)
STACKS_SIGNAL = signal.SIGQUIT  # prints the stack of every thread to the log and changes nothing else
FIRST_PORT = 10_000  # below it, ports belong to services
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Ports that this process has given to jobs, whose ranks may not listen yet: a study starts several at once.
_given_out: set[int] = set()


@dataclass(frozen=True, kw_only=True)
class RunVerb:
    """`mimscale VERB ...` as a callable that Submitit starts in each process of a job."""

    arguments: tuple[str, ...]  # the verb and its words
    folder: Path  # working directory: the one that the job was submitted from
    environment: Mapping[str, str]  # see `job_environment`
    lock_owner: str | None = None  # jobs with the same one follow each other, and wait for what the one before left
    trains: bool = False  # it writes outcome.json, however it ends
    master_port: int | None = None  # None: the batch script chooses one at each start

    def __call__(self) -> int:
        """Run the verb as one rank.

        Returns:
            The exit code, under the debug executor. Elsewhere every process ends here: Submitit turns a returned code
            into 0, and a clean shutdown may wait for ever for ranks that are gone.
        """
        place = submitit.JobEnvironment()
        local_size = place.num_tasks // place.num_nodes
        world = World(
            rank=place.global_rank,
            size=place.num_tasks,
            local_rank=place.local_rank,
            local_size=local_size,
            node=place.hostname,
            master_address="127.0.0.1" if place.num_nodes == 1 else place.hostnames[0],
            master_port=int(os.environ["MIMSCALE_MASTER_PORT"]) if self.master_port is None else self.master_port,
        )
        os.environ.update(self.environment)
        os.environ.update(world.environment())
        os.environ["MIMSCALE_JOB_ID"] = place.job_id  # named in the run directory's lock
        if self.lock_owner is not None:
            os.environ["MIMSCALE_LOCK_OWNER"] = self.lock_owner
        os.environ["MIMSCALE_RANK_UNIX_S"] = str(time.time())
        os.chdir(self.folder)
        if place.cluster == "debug":
            return cli.main(list(self.arguments))

        _prepare_process()
        _remove_stale_result(place.paths.result_pickle)
        try:
            # Before there were handlers a cancellation could signal nobody; from here on it finds them.
            if place.cluster == "slurm" and JobFolder(Path(place.paths.folder)).cancelled.exists():
                say("cancelled before it began")
                sys.exit(INTERRUPTED_EXIT_CODE)
            code = cli.main(list(self.arguments))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # too late to stop what is done
        # srun would kill the ranks that still close their files when one leaves with 75; outcome.json has the truth.
        together = self.trains and place.cluster == "slurm" and code == INTERRUPTED_EXIT_CODE and world.size > 1
        return leave_at_once(0 if together else code)


def _prepare_process() -> None:
    # Works while the main thread is inside a collective: the handler is C, and runs in whatever thread gets the signal.
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    # In place of Submitit's handlers, which would requeue from inside the handler on rank 0 alone.
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_before_training)
    # When the supervisor is killed, its ranks save and leave instead of training on unseen.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _remove_stale_result(pickle: Path) -> None:
    # Of an attempt before a requeue: Submitit refuses to write a second one beside the draft of a killed one.
    for file in (pickle, pickle.with_name(f"{pickle.name}.save_tmp")):
        file.unlink(missing_ok=True)


def _stop_before_training(number: int, frame: FrameType | None) -> NoReturn:
    # Training puts its own handler here before its first step. Until then everything that matters is on disk.
    sys.exit(INTERRUPTED_EXIT_CODE)


def job_environment(
    inherited: Mapping[str, str], *, chosen: Mapping[str, str], threads: int, accelerator: Accelerator
) -> dict[str, str]:
    """The variables that a job's processes start with.

    Another launcher's variables are left out: a rank that finds the RANK or SLURM_PROCID of the shell that submitted it
    would take another's place. CUDA_VISIBLE_DEVICES stays as the user has it.
    """
    # The last are what a job of ours finds; a job that is submitted from inside it has its own.
    foreign = ("SUBMITIT_", "TORCHELASTIC_", "MIMSCALE_LOCK_OWNER", "MIMSCALE_MASTER_PORT", *STARTUP_MARKS.values())
    kept = {
        name: value
        for name, value in without_allocation(inherited).items()
        if not name.startswith(foreign) and name not in OWN_VARIABLES and name not in ("GROUP_RANK", "ROLE_RANK")
    }
    return {**kept, **chosen, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": accelerator}


def free_port(*, avoid: int | None = None) -> int:
    """A free TCP port outside the ephemeral range, where the kernel would hand it to any outgoing connection.

    The search starts at a place that follows from the process id, so that submissions made at the same time find
    different ports.

    Args:
        avoid: the port of the job before, which may still be held by a dying rank or in TIME_WAIT.

    Raises:
        LaunchError: every port is taken.
    """
    try:
        first_ephemeral = int(EPHEMERAL_PORTS.read_text().split()[0])
    except OSError:
        first_ephemeral = 32_768
    last = first_ephemeral if first_ephemeral > FIRST_PORT + 1_000 else 32_768
    count = last - FIRST_PORT
    for step in range(count):
        port = FIRST_PORT + (os.getpid() + step) % count
        if port != avoid and port not in _given_out and _is_free(port):
            _given_out.add(port)
            return port
    raise LaunchError(f"no free TCP port between {FIRST_PORT} and {last - 1} on {socket.gethostname()}; end other jobs")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
