import os
import signal
import subprocess
import sys

import pytest

from mimscale.errors import LaunchError
from mimscale.world import StopRequest, World


def test_alone_is_a_world_of_one():
    world = World.from_environment({})
    assert (world.rank, world.size, world.local_rank, world.is_first) == (0, 1, 0, True)


def test_torchrun_variables_are_read():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1234"}
    with pytest.raises(LaunchError, match="8 ranks on more than one node, but MASTER_ADDR"):
        World.from_environment(environment)
    world = World.from_environment(environment | {"MASTER_ADDR": "node1"})
    assert (world.rank, world.size, world.local_rank, world.local_size, world.master_port) == (3, 8, 1, 2, 1234)
    assert not world.is_first


def test_what_deepspeed_needs_is_complete():
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert World().environment().keys() == names


def test_half_of_a_launchers_variables_is_an_error():
    with pytest.raises(LaunchError, match="WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE not set beside RANK"):
        World.from_environment({"RANK": "0"})


def test_a_rank_outside_of_the_world_is_an_error():
    environment = {"RANK": "8", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    with pytest.raises(LaunchError, match="rank 8 of 8"):
        World.from_environment(environment)


def test_a_signal_is_remembered_and_the_old_handler_comes_back():
    seen = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.received == signal.SIGUSR2
        assert seen == []
        stop.hand_back()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_limit_of_time_asks_for_a_stop_by_its_name_and_a_signal_comes_first():
    stop = StopRequest()
    try:
        stop.stop_after("stop_after_min", 3600)
        assert stop.reason == ""
        stop.stop_after("time limit", -1.0)
        assert stop.reason == "time limit"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.reason == "SIGUSR2"
    finally:
        stop.hand_back()


@pytest.mark.parametrize("was_a_rank", [True, False])
def test_a_rank_leaves_without_taking_the_interpreter_down(was_a_rank):
    """Else a thread of gloo that lets go of a tensor meanwhile ends a run that is done with SIGABRT."""
    program = f"""
import atexit, sys, types
from mimscale import cli
atexit.register(print, "the interpreter goes down")
sys.modules["verb"] = types.SimpleNamespace(main=lambda words: print(*words) or 75)
cli.VERBS["train"] = ("verb:main", "")
sys.argv[1:] = ["train", "done"]
if {was_a_rank}:
    sys.modules["mimscale.train.engine"] = None
cli.run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines() == (["done"] if was_a_rank else ["done", "the interpreter goes down"])
