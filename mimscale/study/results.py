"""What the finished nodes of a study have measured: read from their run directories, never from elsewhere.

P pretraining seeds | F fine-tuning seeds | N cases
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.evaluate.metrics import foreground_names
from mimscale.report.facts import RunFacts, read_run
from mimscale.study.config import StudyConfig
from mimscale.study.graph import Graph, Trial
from mimscale.study.matched import compute_s
from mimscale.study.statistics import (
    Floats,
    Spread,
    Time,
    spread,
    time_to_target,
)

METRICS = ("dice", "hd95_mm", "nsd")
# The validation Dice that each run is to reach. Runs without one have no time to a target.
Targets = Mapping[Trial, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A trial that has been trained, and its scores once it has been scored."""

    trial: Trial
    run: RunFacts
    pretraining: RunFacts | None
    scores: dict[str, Any] | None

    @cached_property
    def curve(self) -> list[tuple[int, float]]:
        """Step and validation Dice, without background."""
        lines = self.run.validations
        return [(int(line["step"]), float(line["val_dice"])) for line in lines if line.get("val_dice") is not None]

    @property
    def last_validation(self) -> float | None:
        """Validation Dice at the last validation: the headline is never the best."""
        return self.curve[-1][1] if self.curve else None

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """Step and value of the highest validation Dice."""
        return max(self.curve, key=lambda point: point[1]) if self.curve else None

    def mean(self, metric: str, *, background: bool = False) -> float | None:
        """A score's mean over classes, of the last checkpoint on the test volumes."""
        if self.scores is None:
            return None
        value = self.scores["mean"]["with_background" if background else "without_background"][metric]
        return None if value is None else float(value)

    def best_mean(self, *, background: bool = False) -> float | None:
        """Dice of the checkpoint that was best on validation; None where it was not scored."""
        best = self.scores.get("best") if self.scores else None
        value = best["mean"]["with_background" if background else "without_background"]["dice"] if best else None
        return None if value is None else float(value)

    def same_in(self, keys: Sequence[str]) -> str:
        """What its fine-tuning has under these keys, as a text that is equal where they are."""
        found: list[Any] = []
        for key in keys:
            value: Any = self.run.config
            for name in key.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            found.append(value)
        return json.dumps(found, default=str)

    def class_mean(self, name: str, metric: str) -> float | None:
        """A score's mean over the cases, of one class."""
        if self.scores is None or name not in self.scores["per_class"]:
            return None
        value = self.scores["per_class"][name][metric]["mean"]
        return None if value is None else float(value)

    @property
    def case_dice(self) -> dict[str, float]:
        """Volume -> Dice, the mean over those classes but the background, or regions, that it has a score of."""
        if self.scores is None:
            return {}
        found = {}
        for case in self.scores["cases"]:
            dice = [case["scores"][name]["dice"] for name in foreground_names(self.scores)]
            values = [value for value in dice if value is not None]
            if values:
                found[str(case["volume"])] = float(np.mean(values))
        return found

    @property
    def finetune_s(self) -> float | None:
        """Computing time of fine-tuning: median step x steps."""
        return compute_s(self.run)

    @property
    def pretrain_s(self) -> float | None:
        """Computing time of its pretraining, 0 from scratch; None where it is not known, as of weights from outside."""
        if self.pretraining is None:
            return 0.0 if self.run.config.get("init_from") is None else None
        return compute_s(self.pretraining)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All trials of one arm under one setting of an experiment."""

    experiment: str
    setting: str
    arm: str
    planned: int
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        """Of the arm, with its setting."""
        return f"{self.arm}, {self.setting}" if self.setting else self.arm

    def spread(self, metric: str, *, background: bool = False) -> Spread:
        """Over the runs, each with its own seeds."""
        return spread([result.mean(metric, background=background) for result in self.results])

    def best(self, *, background: bool = False) -> Spread:
        """Dice of the checkpoints that were best on validation, over the runs that have one scored."""
        return spread([result.best_mean(background=background) for result in self.results])

    def class_spread(self, name: str, metric: str) -> Spread:
        """Of one class, over the runs."""
        return spread([result.class_mean(name, metric) for result in self.results])

    @property
    def last_validation(self) -> Spread:
        """Over the runs."""
        return spread([result.last_validation for result in self.results])

    def timed(self, targets: Targets) -> list[tuple[Trial, Time]]:
        """Every run that has a target, with the step at which its validation Dice reached it."""
        return [
            (result.trial, time_to_target(result.curve, targets[result.trial], int(result.run.config["steps"])))
            for result in self.results
            if result.trial in targets
        ]

    def timed_s(self, targets: Targets) -> list[tuple[Trial, Time]]:
        """The same in seconds of computing, pretraining included; without runs whose seconds are not known."""
        found = []
        racing = [result for result in self.results if result.trial in targets]
        for result, (trial, time) in zip(racing, self.timed(targets), strict=True):
            step_s, before_s = result.run.percentile("step_s", 50), result.pretrain_s
            if step_s is not None and before_s is not None:
                found.append((trial, Time(value=before_s + step_s * time.value, censored=time.censored)))
        return found

    def times(self, targets: Targets) -> list[Time]:
        """Of every run that has a target the step at which it reached it."""
        return [time for _, time in self.timed(targets)]

    def seconds_to(self, targets: Targets) -> list[Time]:
        """The same in seconds of computing, pretraining included."""
        return [time for _, time in self.timed_s(targets)]

    @property
    def scored(self) -> list[Trial]:
        """The trials that have scores."""
        return [result.trial for result in self.results if result.scores]

    def scores(self, pretrain: Sequence[int | None], finetune: Sequence[int], cases: Sequence[str]) -> Floats:
        """[P, F, N] Dice of these seeds and cases; NaN where there is none."""
        table = np.full((len(pretrain), len(finetune), len(cases)), np.nan)
        for result in self.results:
            if result.trial.pretrain_seed not in pretrain or result.trial.finetune_seed not in finetune:
                continue
            where = pretrain.index(result.trial.pretrain_seed), finetune.index(result.trial.finetune_seed)
            dice = result.case_dice
            # Of folds several runs have these seeds, each with cases of its own.
            table[where] = [dice.get(case, before) for case, before in zip(cases, table[where], strict=True)]
        return table


def read_groups(config: StudyConfig, graph: Graph, study_dir: Path, done: Collection[str]) -> list[Group]:
    """What there is of every arm and setting, in the order of the recipe."""
    runs: dict[tuple[str, str | None], RunFacts] = {}

    def run_of(node_id: str, scored_by: str | None = None) -> RunFacts:
        if (node_id, scored_by) not in runs:
            scores = None if scored_by is None else graph.scores_folder(study_dir, graph.nodes[scored_by])
            runs[node_id, scored_by] = read_run(graph.folder(study_dir, graph.nodes[node_id]), scores)
        return runs[node_id, scored_by]

    def place(trial: Trial) -> tuple[str, str, str]:
        pooled = config.experiments[trial.experiment].pool_settings
        return trial.experiment, "" if pooled else trial.setting, trial.arm

    groups = []
    for experiment, setting, arm in dict.fromkeys(map(place, graph.trials)):
        trials = [trial for trial in graph.trials if place(trial) == (experiment, setting, arm)]
        results = [
            Result(
                trial=trial,
                run=run_of(trial.finetune, trial.evaluate),
                pretraining=run_of(trial.pretrain) if trial.pretrain is not None and trial.pretrain in done else None,
                scores=run_of(trial.finetune, trial.evaluate).scores if trial.evaluate in done else None,
            )
            for trial in trials
            if trial.finetune in done
        ]
        groups.append(
            Group(experiment=experiment, setting=setting, arm=arm, planned=len(trials), results=tuple(results))
        )
    return groups
