"""The run directory: where everything of one run lies, and who may write to it.

    config.yaml        the resolved config                    metrics.jsonl   one object a logged step
    contract.json      what the weights expect of their input heartbeat.json  step and time, rewritten while alive
    outcome.json       how the last job of this run ended     checkpoints/    step_00000100/ ...
    pids/              one file a living rank                 jobs.jsonl      one object a submitted job
    lock.json          the one writer                         env.json        versions and settings of the newest job
    code/              copies of the code that jobs import    logs/, evaluate/, report/
    health.jsonl       what was wrong, one object an event    diagnostics/    batches of steps that went wrong

No torch here: `status`, `inspect` and `submit` read run directories on login nodes.
"""

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mimscale import durable
from mimscale.config import differing_keys
from mimscale.errors import ConfigError, DataError, MimscaleError
from mimscale.lock import refuse_if_held, sole_writer
from mimscale.world import Process

OutcomeName = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job of a run ended. Launchers change exit codes; this file does not."""

    outcome: OutcomeName
    exit_code: int
    step: int
    message: str = ""
    stopped_by: str = ""  # of an interrupted job: the signal that rank 0 got, or the limit that it kept


@dataclass(frozen=True)
class RunDir:
    """Paths of a run directory, and the small files that more than one stage reads."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        """Step and time, rewritten while the run is alive."""
        return self.path / "heartbeat.json"

    @property
    def outcome(self) -> Path:
        """How the last job ended."""
        return self.path / "outcome.json"

    @property
    def health(self) -> Path:
        """One JSON object an event; see `mimscale.train.health_log`."""
        return self.path / "health.jsonl"

    @property
    def diagnostics(self) -> Path:
        """Batches of steps that went wrong; see `mimscale.train.diagnostics`."""
        return self.path / "diagnostics"

    @property
    def checkpoints(self) -> Path:
        """One folder a committed checkpoint."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Standard output and error of the jobs."""
        return self.path / "logs"

    @property
    def pids(self) -> Path:
        """One file a living rank."""
        return self.path / "pids"

    @property
    def jobs(self) -> Path:
        """One JSON object a submitted job."""
        return self.path / "jobs.jsonl"

    @property
    def code(self) -> Path:
        """Copies of the code that the jobs import, one folder a version."""
        return self.path / "code"

    @property
    def environment(self) -> Path:
        """Versions, host and settings of the newest job."""
        return self.path / "env.json"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """What Weights & Biases writes, and the id under which a run continues."""
        return self.path / "wandb"

    @property
    def samples(self) -> Path:
        """Sample ids a rank and step, when `meter.record_samples` asks for them."""
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        """Scores, predictions and reconstructions."""
        return self.path / "evaluate"

    @property
    def report(self) -> Path:
        """The HTML page and its pictures."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """Who writes to this run directory now."""
        return self.path / "lock.json"

    def read_outcome(self) -> Outcome | None:
        """How the last job ended, or None when none has ended."""
        if not self.outcome.exists():
            return None
        return Outcome(**json.loads(self.outcome.read_text()))

    def write_outcome(self, outcome: Outcome) -> None:
        """Record how the job ended."""
        durable.write_json(self.outcome, vars(outcome))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every logged step. A last line cut short by a kill is left out."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def read_config_tree(self) -> dict[str, Any]:
        """The resolved config as a plain tree.

        Raises:
            ConfigError: the folder is no run directory.
        """
        if not self.config.is_file():
            raise ConfigError(f"{self.path}: no config.yaml, so this is no run directory; check run_dir=")
        tree = yaml.safe_load(self.config.read_text())
        assert isinstance(tree, dict)
        return tree

    def refuse_foreign(self, files: Iterable[Path], kind: type[MimscaleError]) -> None:
        """Refuse pickles and code that somebody else could have written: to read them is to run them.

        Args:
            files: in the run directory; they and the folders above them are looked at, up to the run directory.
            kind: the error to raise.

        Raises:
            MimscaleError: one belongs to another user than this one or root, or everybody may write to it.
        """
        for path in {self.path, *(place for file in files for place in (file, *file.parents))}:
            if path != self.path and self.path not in path.parents:
                continue
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue  # nothing is read from it
            if status.st_uid not in (os.geteuid(), 0):
                raise kind(
                    f"{path}: belongs to user {status.st_uid}, and what a run directory holds is executed (code, "
                    "pickles); continue only runs of your own, or take the weights out with `mimscale export`"
                )
            if status.st_mode & stat.S_IWOTH:
                raise kind(
                    f"{path}: everybody may write to it, and what a run directory holds is executed (code, pickles); "
                    f"if you trust what is in it: chmod -R o-w {self.path}"
                )

    def living_ranks(self) -> dict[int, int]:
        """Rank -> process id of the ranks on this host that are alive."""
        alive = {}
        for file in sorted(self.pids.glob("rank*.json")):
            process = Process(**json.loads(file.read_text()))
            if process.is_alive():
                alive[int(file.stem.removeprefix("rank"))] = process.pid
        return alive

    @contextmanager
    def registered(self, rank: int) -> Iterator[None]:
        """Keep this process's id in `pids/` while the block runs, so that it can be signalled.

        Raises:
            DataError: the disk is full or not writable.
        """
        file = self.pids / f"rank{rank:05d}.json"
        with durable.explained(DataError, file, "choose another run_dir or free space"):
            durable.write_json(file, vars(Process.this()))
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def move_aside(self) -> None:
        """Keep an existing run under a name with the time in it, and leave the directory free.

        Raises:
            LaunchError: a job is writing to it.
        """
        if self.path.exists():
            refuse_if_held(self.lock)
            aside = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            with durable.explained(DataError, self.path, "move it aside by hand, or use another run_dir"):
                self.path.rename(aside)

    def open(self, tree: dict[str, Any], text: str, *, free_keys: frozenset[str]) -> None:
        """Make the run directory, or check that this config may continue the run that is in it.

        Args:
            tree: the new config, plain.
            text: the same config as YAML, written to config.yaml.
            free_keys: keys (or prefixes ending in a dot) that may change between jobs of one run.

        Raises:
            ConfigError: the run in the directory was made with another config; every differing key is named.
        """
        # A run that has saved nothing has nothing to protect: it failed, and its config is being put right.
        if self.config.exists() and any(self.checkpoints.glob("step_*")):
            differing = [
                line
                for line in differing_keys(self.read_config_tree(), tree)
                if not any(line.startswith(f"{key}:") or (key[-1] == "." and line.startswith(key)) for key in free_keys)
            ]
            if differing:
                raise ConfigError(
                    f"{self.path}: holds a run with another config; these may not change when it continues:\n  "
                    + "\n  ".join(differing)
                    + "\nUse another run_dir, put the old values back, or start over with --fresh; --fresh-data "
                    "accepts another seed, modality, global_batch and stream.*, and other values in a table of targets"
                )
        durable.write_text(self.config, text)

    def locked(self, job_id: str, owner: str | None = None) -> AbstractContextManager[None]:
        """Hold the run directory's lock. A job waits for what an earlier one of the same owner has left.

        Raises:
            LaunchError: another job is writing here.
        """
        return sole_writer(self.lock, f"job {job_id}", owner)
