"""What a run directory says about a run. Every number of the report comes from here, and so from a file of the run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.errors import ConfigError
from mimscale.train.health_log import HealthLog
from mimscale.train.run_dir import Outcome, RunDir

# The first steps of a job fill caches and queues; they are no measure of how fast the run is.
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run, read from its files. What has not been written is None or empty."""

    run: RunDir
    name: str  # the folder's name
    config: dict[str, Any]  # config.yaml
    steps: list[dict[str, Any]]  # lines of metrics.jsonl with a training loss; of a step that was done twice, the last
    validations: list[dict[str, Any]]  # lines of metrics.jsonl with a validation score
    costs: list[dict[str, Any]]  # lines of metrics.jsonl with memory and wall clock; none of a run of older code
    outcome: Outcome | None
    evaluation: Path  # folder of the scores and their pictures
    scores: dict[str, Any] | None  # its scores.json
    environment: dict[str, Any] | None  # env.json
    jobs: list[dict[str, Any]]  # jobs.jsonl
    health: list[dict[str, Any]]  # health.jsonl

    @property
    def kind(self) -> str:
        """Pretrain or finetune."""
        return str(self.config["kind"])

    @property
    def last_step(self) -> int:
        """Optimizer steps that are done: as the last job says, else as far as the metrics go."""
        logged = max((int(line["step"]) for line in self.steps + self.validations), default=0)
        return max(logged, self.outcome.step if self.outcome else 0)

    @property
    def state(self) -> str:
        """How the last job ended, in a word."""
        return self.outcome.outcome if self.outcome else "not ended"

    @property
    def config_text(self) -> str:
        """The resolved config as YAML."""
        return self.run.config.read_text()

    @property
    def warm_steps(self) -> list[dict[str, Any]]:
        """Steps after warm-up, or all of a run that is shorter than that."""
        return self.steps[WARM_UP_STEPS:] or self.steps

    @property
    def data_wait_percent(self) -> float | None:
        """Part of the time after warm-up in which a step waited for data."""
        lines = [line for line in self.warm_steps if "data_wait_s" in line and "step_s" in line]
        total_s = sum(float(line["step_s"]) for line in lines)
        return 100 * sum(float(line["data_wait_s"]) for line in lines) / total_s if total_s else None

    @property
    def substituted(self) -> int:
        """Samples that could not be read and were replaced."""
        return round(sum(float(line.get("substituted", 0)) for line in self.steps))

    @property
    def peak_memory_bytes(self) -> float | None:
        """The most that a rank of any of its jobs held: on its GPU, or as a process on a CPU."""
        return max((float(line["peak_memory_bytes"]) for line in self.costs), default=None)

    @property
    def wall_s(self) -> float | None:
        """From start to end, of all jobs together; of one that was killed, to its last save."""
        return max((float(line["wall_s"]) for line in self.costs), default=None)

    def last(self, key: str) -> float | None:
        """The last logged value of a number."""
        values = [float(line[key]) for line in self.steps + self.validations if line.get(key) is not None]
        return values[-1] if values else None

    def percentile(self, key: str, percent: int) -> float | None:
        """A percentile of a logged number over the steps after warm-up."""
        values = sorted(float(line[key]) for line in self.warm_steps if line.get(key) is not None)
        return values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def read_run(path: Path, evaluation: Path | None = None) -> RunFacts:
    """Read a run directory.

    Args:
        path: of the run.
        evaluation: folder of its scores; None: that in the run directory.

    Raises:
        ConfigError: the folder is no run directory, or a file of it is damaged.
    """
    run = RunDir(path)
    config = run.read_config_tree()
    if config.get("kind") not in ("pretrain", "finetune"):
        raise ConfigError(f"{run.config}: kind={config.get('kind')!r}, expected pretrain or finetune")
    lines = run.read_metrics()
    return RunFacts(
        run=run,
        name=path.resolve().name,
        config=config,
        steps=_last_of_each_step([line for line in lines if "loss" in line]),
        validations=_last_of_each_step([line for line in lines if any(key.startswith("val_") for key in line)]),
        costs=[line for line in lines if "wall_s" in line],
        outcome=run.read_outcome(),
        evaluation=evaluation or run.evaluation,
        scores=_read_json((evaluation or run.evaluation) / "scores.json"),
        environment=_read_json(path / "env.json"),
        health=HealthLog(run.health).read(),
        jobs=[json.loads(line) for line in _lines(run.jobs)],
    )


def _last_of_each_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A killed job's last steps are done again by the next one: keep what the run went on from."""
    by_step = {int(line["step"]): line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); remove it, or make it again") from None
    assert isinstance(tree, dict)
    return tree
