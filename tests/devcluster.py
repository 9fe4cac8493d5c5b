"""The Slurm of `slurm/devcluster`, for tests: bring it up, ask it, hurt it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml
from processes import kill_all
from stream_stores import write_store
from tiny_runs import SHAPES

from launch.attempts import Attempt, read_attempts
from launch.folder import JobFolder, job_folders
from mimscale.train.run_dir import RunDir

CHECKOUT = Path(__file__).parents[1]
SCRIPTS = CHECKOUT / "slurm" / "devcluster"
PROFILE = CHECKOUT / "slurm" / "profiles" / "devcluster.yaml"
PIDS = Path("/run/mimscale-devcluster/pids")  # one file a daemon
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "ip")
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
POLL_S = 0.2
START_S = 200.0  # how long a job may take to do what takes it fifteen seconds on an idle machine
T = TypeVar("T")


def why_not_here() -> str | None:
    """What this machine lacks for a cluster, or None."""
    if os.getuid() != 0:
        return "slurm/devcluster needs root"
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"no {', '.join(missing)} on PATH; `make debian-packages` installs them" if missing else None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a cluster is brought up with."""

    nodes: int = 2
    preempt: str = "requeue-usr2"
    accounting: bool = True

    def words(self) -> list[str]:
        """The arguments of `up`."""
        words = ["--nodes", str(self.nodes), "--preempt", self.preempt]
        return words if self.accounting else [*words, "--no-accounting"]


class DevCluster:
    """One cluster in a folder. It changes its setup by going down and up again, which takes five seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.setup: Setup | None = None
        self.runs: list[RunDir] = []  # whose logs are shown when a wait takes too long

    def bring_up(self, setup: Setup) -> None:
        """Be up with this setup, every daemon alive and every node idle."""
        if self.setup not in (None, setup):
            self.take_down()
        self.setup = setup
        self.up()

    def up(self) -> "subprocess.CompletedProcess[str]":
        """Run `up`: the first time it starts the cluster, later it starts daemons that a test has killed."""
        assert self.setup is not None
        return self._run(str(SCRIPTS / "up"), "--dir", str(self.folder), *self.setup.words())

    def take_down(self) -> None:
        """Run `down`."""
        self._run(str(SCRIPTS / "down"))
        self.setup = None

    def _run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of a shell that uses this cluster, in the Python environment of the tests."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), **more}

    def command(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            words, env=self.environment(), capture_output=True, text=True, timeout=60, check=False, cwd=self.folder
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def mimscale(
        self, *words: str, variables: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run `mimscale WORDS` on the login host."""
        return subprocess.run(
            [sys.executable, "-m", "mimscale.cli", *words],
            env=self.environment(**(variables or {})),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    def state(self, job_id: str) -> str:
        """A job's state by its long name; empty when the controller does not know it."""
        return self.command("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T")

    def show(self, job_id: str) -> str:
        """What `scontrol show job` says, on one line."""
        return self.command("scontrol", "--oneliner", "show", "job", job_id)

    def pid(self, daemon: str) -> int:
        """Process of a daemon: munged, mariadbd, slurmdbd, slurmctld, or node1 for its slurmd."""
        return int((PIDS / daemon).read_text().split()[0])

    def kill(self, daemon: str) -> None:
        """kill -9 of a daemon; `up` starts it again."""
        os.kill(self.pid(daemon), signal.SIGKILL)

    def stop(self, daemon: str) -> None:
        """Let a daemon save its state and end, as an administrator does; `up` starts it again."""
        pid = self.pid(daemon)
        os.kill(pid, signal.SIGTERM)
        self.wait_for(f"{daemon} to end", lambda: not Path(f"/proc/{pid}").exists(), timeout_s=30)

    def kill_node(self, number: int) -> None:
        """kill -9 of all that runs on a node, as if its power failed; `up` starts its slurmd again."""
        kill_all(self.processes(number))

    def set_link(self, node: int, state: str) -> None:
        """Cut (`down`) or mend (`up`) a node's network link."""
        subprocess.run(["ip", "link", "set", f"msdev{node}", state], check=True)

    def processes(self, node: int) -> list[int]:
        """Every process that lives in a node's network: slurmd, the batch script, ranks, loader workers."""
        shown = subprocess.run(["ip", "netns", "pids", f"msdev{node}"], capture_output=True, text=True, check=True)
        return [int(pid) for pid in shown.stdout.split()]

    def wait_for(self, what: str, happened: Callable[[], T], *, timeout_s: float = START_S) -> T:
        """Wait until `happened` returns something true, and return it; otherwise fail with all that is known."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            answer = happened()
            if answer:
                return answer
            if time.monotonic() > deadline_s:
                raise AssertionError(f"after {timeout_s:.0f} s still waiting for {what}\n{self.describe()}")
            time.sleep(POLL_S)

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = START_S) -> str:
        """Wait until a job is in one of these states."""

        def reached() -> str:
            state = self.state(job_id)
            return state if state in states else ""

        return self.wait_for(f"job {job_id} to be {' or '.join(states)}", reached, timeout_s=timeout_s)

    def cancel_all(self) -> None:
        """End every job, and see to it that every node is free."""
        self.command("scancel", "--user=root")
        self.wait_for(
            "every job to be gone", lambda: not self.command("squeue", "--noheader", "--format=%i"), timeout_s=60
        )
        self.runs.clear()

    def describe(self) -> str:
        """Queue, jobs, nodes, and the end of every log."""
        parts = []
        for words in (("squeue", "--states=all"), ("scontrol", "show", "job"), ("sinfo", "--Node", "--long")):
            done = subprocess.run(words, env=self.environment(), capture_output=True, text=True, check=False)
            parts.append(f"$ {' '.join(words)}\n{done.stdout}{done.stderr}")
        logs = {path for run in self.runs for path in run.path.parent.rglob("*") if path.suffix in (".out", ".log")}
        for path in [*sorted(logs), self.folder / "log" / "slurmctld.log"]:
            parts.append(f"--- end of {path}\n{path.read_text(errors='replace')[-3000:]}")
        for run in self.runs:
            if run.outcome.exists():
                parts.append(f"--- {run.outcome}\n{run.outcome.read_text()}")
        return "\n".join(parts)


STEPS = 100  # of most runs
RECIPE = {
    "store": "store",
    "global_batch": 4,
    "micro_batch": 1,
    "crop_voxels": [32, 32, 32],
    "patch_voxels": [16, 16, 16],
    "model": {"dim": 24, "depth": 1, "heads": 2},
    "mae": {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2},
    "engine": {"zero_stage": 2},
    "optim": {"min_lr_ratio": 1.0},  # the rate does not depend on `steps`, so runs of different length can be compared
    "stream": {"workers": 1},
    "meter": {"record_samples": True, "tensorboard": False},
    "validation": {"every_steps": 0},
}


class Site:
    """A folder that a user submits from: a store, a recipe, and a copy of the profile."""

    def __init__(self, folder: Path, cluster: DevCluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.job_id = ""  # of the first submission
        self.accounts: list[str] = []  # what sacct said of it: JobID|State|ExitCode
        self.variables: dict[str, str] = {}  # of the shell that submits
        write_store(folder / "store", SHAPES)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        self.profile()

    def profile(self, **changes: Any) -> None:
        """Write the profile of the next submissions: that of the repository, with changes; `slurm` is merged."""
        tree = yaml.safe_load(PROFILE.read_text())
        tree["slurm"].update(changes.pop("slurm", {}))
        (self.folder / "profile.yaml").write_text(yaml.safe_dump({**tree, **changes}))

    def run(self, name: str = "run") -> RunDir:
        """A run directory of this site."""
        return RunDir(self.folder / name)

    def try_submit(self, verb: str, *words: str, nodes: int | str = 2) -> "subprocess.CompletedProcess[str]":
        """`mimscale submit VERB ...` on the profile."""
        words = ("submit", verb, *words, "--profile", "profile.yaml", "--nodes", str(nodes), "--json")
        return self.cluster.mimscale(*words, cwd=self.folder, variables=self.variables)

    def let_pretrain_be(self, function: str) -> None:
        """Let `pretrain` be MODULE:FUNCTION of tests/, where it is submitted and in every rank."""
        customs = self.folder / "customs"  # Python imports the module in it at each start
        customs.mkdir()
        text = f"from mimscale import cli\ncli.VERBS['pretrain'] = ({function!r}, 'of a test')\n"
        (customs / "sitecustomize.py").write_text(text)
        self.variables["PYTHONPATH"] = os.pathsep.join(map(str, (customs, CHECKOUT / "tests", CHECKOUT)))

    def submit(self, name: str = "run", *words: str, steps: int, nodes: int = 2) -> str:
        """Submit a pretraining; returns the job's id."""
        done = self.try_submit("pretrain", "recipe.yaml", f"run_dir={name}", f"steps={steps}", *words, nodes=nodes)
        assert done.returncode == 0, done.stderr
        self.cluster.runs.append(self.run(name))
        job_id = json.loads(done.stdout)["job_id"]
        assert isinstance(job_id, str)
        return job_id

    def wait_for_step(self, job_id: str, step: int, name: str = "run", *, timeout_s: float = START_S) -> None:
        """Wait until a run has logged this step."""
        run = self.run(name)

        def reached() -> bool:
            state = self.cluster.state(job_id)
            assert state not in ("FAILED", "CANCELLED"), f"job {job_id} has {state}\n{self.cluster.describe()}"
            return any(line["step"] >= step for line in run.read_metrics()[-1:])

        self.cluster.wait_for(f"{run.path} to reach step {step}", reached, timeout_s=timeout_s)

    def logged_steps(self, name: str = "run") -> list[int]:
        """Every step of metrics.jsonl, in the order of its lines."""
        return [line["step"] for line in self.run(name).read_metrics() if "loss" in line]

    def losses(self, name: str = "run") -> dict[int, float]:
        """Step -> loss of each logged step."""
        return {line["step"]: line["loss"] for line in self.run(name).read_metrics() if "loss" in line}

    def sample_ids(self, name: str = "run") -> dict[int, list[int]]:
        """Step -> the samples of all ranks, sorted."""
        steps: dict[int, dict[str, list[int]]] = {}
        for path in sorted(self.run(name).samples.iterdir()):
            for line in map(json.loads, path.read_text().splitlines()):
                steps.setdefault(line["step"], {})[path.name] = line["sample_ids"]
        return {step: sorted(chain.from_iterable(ranks.values())) for step, ranks in steps.items()}

    def wait_until_finished(self, name: str = "run", *, timeout_s: float = START_S) -> None:
        """Wait until a run has finished, in however many jobs; a run that fails ends the wait."""
        run = self.run(name)

        def finished() -> bool:
            outcome = run.read_outcome()
            stopped = outcome is not None and outcome.outcome == "failed"
            assert not stopped or self.newest(name).read_outcome() is None, f"{outcome}\n{self.cluster.describe()}"
            return outcome is not None and outcome.outcome == "finished"

        self.cluster.wait_for(f"{run.path} to finish", finished, timeout_s=timeout_s)

    def newest(self, name: str = "run", place: int = 1) -> JobFolder:
        """The newest submission of a run, or the one that stands at this place from the end."""
        return job_folders(self.run(name).logs)[-place]

    def attempts(self, name: str = "run") -> list[Attempt]:
        """Each start of the newest submission."""
        return read_attempts(self.newest(name).attempts_file())

    def kill_rank(self, rank: int, name: str = "run") -> None:
        """kill -9 of a rank, wherever it runs: nodes of one machine share their process ids."""
        tree = json.loads((self.run(name).pids / f"rank{rank:05d}.json").read_text())
        os.kill(tree["pid"], signal.SIGKILL)

    def newest_step(self, name: str = "run") -> int:
        """The newest logged step; 0 before the first."""
        return max(self.logged_steps(name), default=0)

    def is_finished(self, name: str = "run") -> bool:
        """Has the run finished?"""
        outcome = self.run(name).read_outcome()
        return outcome is not None and outcome.outcome == "finished"

    def is_settled(self, name: str = "run") -> bool:
        """Has the newest submission ended, so that it will not start again by itself?"""
        return self.newest(name).read_outcome() is not None

    def job_name(self, name: str = "run") -> str:
        """What Slurm calls the newest submission."""
        return self.newest(name).read().job_name

    def status(self, *names: str) -> list[dict[str, Any]]:
        """`mimscale status --json` of runs of this site."""
        done = self.cluster.mimscale("status", "--json", *(names or ["run"]), cwd=self.folder)
        assert done.returncode == 0, done.stderr
        statuses = json.loads(done.stdout)
        assert isinstance(statuses, list)
        return statuses
