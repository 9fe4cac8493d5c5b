"""A `pretrain` without torch, and the means to submit it: tests of the launcher need ranks that start in no time.

FAKE in the profile's environment says what each rank does.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from mimscale.config import config_yaml, load_verb_config
from mimscale.errors import INTERRUPTED_EXIT_CODE, DataError, LostRankError
from mimscale.store.intensity import IntensityContract
from mimscale.store.layout import StoreInfo, write_info
from mimscale.train.config import PretrainConfig
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.world import StopRequest

TESTS = Path(__file__).parent
# Python imports this module at its start, in the submitting process and in every rank.
SITECUSTOMIZE = "from mimscale import cli\ncli.VERBS['pretrain'] = ('launch_fake_verb:main', 'a fake')\n"


def main(argv: list[str]) -> int:
    """What stands in for `mimscale pretrain`."""
    check = "--check" in argv
    config = load_verb_config(PretrainConfig, [word for word in argv if word != "--check"], needs_recipe=True)
    if check:
        print(config_yaml(config), end="")
        return 0
    rank = int(os.environ["RANK"])
    run = RunDir(config.run_dir)
    (run.path / f"environment{rank}.json").write_text(json.dumps(dict(os.environ)))
    (run.path / f"config{rank}.txt").write_text(argv[0])
    print(f"rank {rank} at work", file=sys.stderr, flush=True)
    behaviour = os.environ.get("FAKE", "finish").split(":")
    if behaviour[0] == "slow-start":  # no handler of training's own yet
        time.sleep(60)
    stop = StopRequest()
    with run.registered(rank):
        try:
            return _behave(behaviour, rank, run, stop)
        finally:
            stop.hand_back()


def _behave(behaviour: list[str], rank: int, run: RunDir, stop: StopRequest) -> int:
    what, *culprit = behaviour
    if what == "until-stopped":
        while stop.received is None:
            time.sleep(0.05)
        print(f"rank {rank} stopped by {stop.received.name}", file=sys.stderr, flush=True)
        if rank == 0:
            saved = Outcome(outcome="interrupted", exit_code=INTERRUPTED_EXIT_CODE, step=7, stopped_by=stop.reason)
            run.write_outcome(saved)
        return INTERRUPTED_EXIT_CODE
    if what == "gives-up":  # as watchdogs do
        text = "step 3 was not done within 5 s; rank 1 stood at x"
        run.write_outcome(Outcome(outcome="failed", exit_code=LostRankError.exit_code, step=-1, message=text))
        return LostRankError.exit_code
    if what != "finish":
        if culprit == [str(rank)]:
            time.sleep(0.3)
            _fail(what)
        _hang()
    if rank == 0:
        run.write_outcome(Outcome(outcome="finished", exit_code=0, step=20))
    return 0


def _fail(what: str) -> None:
    if what == "killed":
        child = subprocess.Popen(["sleep", "600"])  # stands for a loader worker
        Path(os.environ["FAKE_CHILD_FILE"]).write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "data-error":
        raise DataError("ct_7: broken")
    assert what == "bug"
    raise IndexError("a bug of ours")


def _hang() -> None:
    # PyDLL keeps the interpreter's lock: no Python thread or handler of this process runs any more.
    while True:
        ctypes.PyDLL(None).sleep(600)


class Place:
    """A store, a recipe and a profile in a temporary folder, and `mimscale submit` on them."""

    def __init__(self, folder: Path, fake: str = "finish", **profile: Any) -> None:
        self.folder = folder
        self.run = RunDir(folder / "run")
        self.child_file = folder / "child.txt"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (folder / "store").mkdir()
        write_info(
            folder / "store",
            StoreInfo(
                chunk_voxels=32,
                codec="default",
                intensity=IntensityContract(),
                modality="mr",
                num_parts=1,
                ingest={},
                ingest_hash="",
                subject_key_fingerprint="",
            ),
        )
        recipe = {
            "steps": 20,
            "global_batch": 8,
            "micro_batch": 2,
            "crop_voxels": [32, 32, 32],
            "patch_voxels": [16, 16, 16],
            "store": "store",
            "run_dir": "run",
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.write_profile(fake, **profile)

    def write_profile(self, fake: str, **profile: Any) -> None:
        """Write the profile that the next submission uses."""
        variables = {"FAKE": fake, "FAKE_CHILD_FILE": str(self.child_file)}
        tree = {
            "executor": "local",
            "processes_per_node": 2,
            "threads_per_process": 3,
            "accelerator": "cpu",
            "lost_rank_grace_s": 0.5,
            "environment": variables,
            **profile,
        }
        (self.folder / "profile.yaml").write_text(yaml.safe_dump(tree))

    def command(self, *arguments: str) -> list[str]:
        """`mimscale submit pretrain recipe.yaml --profile profile.yaml ...`."""
        words = ["submit", "pretrain", "recipe.yaml", "--profile", "profile.yaml", *arguments]
        return [sys.executable, "-m", "mimscale.cli", *words]

    def environment(self, **more: str) -> dict[str, str]:
        """The submitting shell's variables."""
        paths = (self.folder / "site", TESTS, TESTS.parent)  # this checkout, wherever an installed one lies
        return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **more}

    def submit(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Submit and wait for `mimscale submit` to return."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start `mimscale submit` and return at once."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_ranks(self, count: int = 2) -> dict[int, int]:
        """Rank -> process id, once `count` ranks have registered themselves."""
        wait_until(lambda: len(self.run.living_ranks()) == count)
        return self.run.living_ranks()


def wait_until(probe: Any, timeout_s: float = 20.0) -> Any:
    """The first true answer of `probe`."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        answer = probe()
        if answer:
            return answer
        time.sleep(0.05)
    raise TimeoutError(f"{probe} stayed false for {timeout_s} s")
