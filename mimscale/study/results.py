"""What the finished nodes of a study have measured: read from their run directories, never from elsewhere.

P pretraining seeds | F fine-tuning seeds | N cases
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.evaluate.metrics import foreground_names
from mimscale.report.facts import RunFacts, read_run
from mimscale.study.config import ExperimentConfig, StudyConfig
from mimscale.study.graph import Graph, Trial
from mimscale.study.matched import compute_s
from mimscale.study.statistics import (
    Floats,
    Interval,
    Ratio,
    RatioInterval,
    Spread,
    Time,
    paired_bootstrap,
    ratio_bootstrap,
    spread,
    time_to_target,
)

METRICS = ("dice", "hd95_mm", "nsd")


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

    @property
    def best_mean(self) -> float | None:
        """Dice without background of the checkpoint that was best on validation; None where it was not scored."""
        best = self.scores.get("best") if self.scores else None
        value = best["mean"]["without_background"]["dice"] if best else None
        return None if value is None else float(value)

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

    @property
    def best(self) -> Spread:
        """Dice of the checkpoints that were best on validation, over the runs that have one scored."""
        return spread([result.best_mean for result in self.results])

    def class_spread(self, name: str, metric: str) -> Spread:
        """Of one class, over the runs."""
        return spread([result.class_mean(name, metric) for result in self.results])

    @property
    def last_validation(self) -> Spread:
        """Over the runs."""
        return spread([result.last_validation for result in self.results])

    def timed(self, target: float) -> list[tuple[Trial, Time]]:
        """Every run that was validated, with the step at which it reached a validation Dice."""
        return [
            (result.trial, time_to_target(result.curve, target, int(result.run.config["steps"])))
            for result in self.results
            if result.curve
        ]

    def timed_s(self, target: float) -> list[tuple[Trial, Time]]:
        """The same in seconds of computing, pretraining included; without runs whose seconds are not known."""
        found = []
        for result, (trial, time) in zip([r for r in self.results if r.curve], self.timed(target), strict=True):
            step_s, before_s = result.run.percentile("step_s", 50), result.pretrain_s
            if step_s is not None and before_s is not None:
                found.append((trial, Time(value=before_s + step_s * time.value, censored=time.censored)))
        return found

    def times(self, target: float) -> list[Time]:
        """Of every run the step at which it reached a validation Dice."""
        return [time for _, time in self.timed(target)]

    def seconds_to(self, target: float) -> list[Time]:
        """The same in seconds of computing, pretraining included."""
        return [time for _, time in self.timed_s(target)]

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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two groups that the same cases tell apart."""

    ours: Group
    theirs: Group
    dice: Interval
    target: float | None  # validation Dice; None where the arm that sets it has no run
    steps: RatioInterval  # how many times sooner ours reaches the target
    seconds: RatioInterval  # the same with what pretraining took


@dataclass(frozen=True, kw_only=True)
class SharedSeeds:
    """The seeds that a comparison draws: of pretraining each group's own, of fine-tuning those that both have."""

    ours: list[int | None]  # None: not pretrained
    theirs: list[int | None]
    finetune: list[int]

    @property
    def same_pretraining(self) -> bool:
        """Whether pretraining seeds are drawn for both groups together."""
        return self.ours == self.theirs

    @property
    def pretrained(self) -> int:
        """Pretraining seeds of the group that has fewer; 0 where none of the two was pretrained."""
        return min((len(seeds) for seeds in (self.ours, self.theirs) if seeds != [None]), default=0)


def shared_seeds(ours: Sequence[Trial], theirs: Sequence[Trial]) -> SharedSeeds | None:
    """The seeds of two groups of trials, in rising order; None where no fine-tuning seed is in both."""
    finetune = {trial.finetune_seed for trial in ours} & {trial.finetune_seed for trial in theirs}
    if not finetune:
        return None
    of_both = [[trial for trial in trials if trial.finetune_seed in finetune] for trials in (ours, theirs)]
    first, second = (sorted({t.pretrain_seed for t in ts}, key=lambda seed: seed or 0) for ts in of_both)
    return SharedSeeds(ours=first, theirs=second, finetune=sorted(finetune))


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


def target_dice(config: StudyConfig, groups: Sequence[Group], place: Group) -> float | None:
    """The validation Dice that a group is to reach; None while the arm that sets it has no run.

    It is what that arm ends at under the same setting, or, where it has no part in the experiment, in the first
    experiment in which it has.
    """
    if config.target.dice is not None:
        return config.target.dice
    by_target = [group for group in groups if group.arm == config.target.arm]
    own = [g for g in by_target if (g.experiment, g.setting) == (place.experiment, place.setting)]
    return next((group.last_validation.mean for group in (*own, *by_target)), None)


def compare(config: StudyConfig, ours: Group, theirs: Group, target: float | None) -> Comparison:
    """Two groups on the fine-tuning seeds, and for scores the cases, that both have: how high, and how soon."""
    seeds = shared_seeds(ours.scored, theirs.scored)
    cases = sorted(set(_cases(ours)) & set(_cases(theirs)))
    interval = Interval(difference=None, low=None, high=None, pretrain_seeds=0, finetune_seeds=0, cases=0)
    if seeds and cases:
        interval = paired_bootstrap(
            ours.scores(seeds.ours, seeds.finetune, cases),
            theirs.scores(seeds.theirs, seeds.finetune, cases),
            **asdict(config.bootstrap),
            same_pretraining=seeds.same_pretraining,
        )
        interval = replace(interval, pretrain_seeds=seeds.pretrained)
    none = RatioInterval(ratio=Ratio(value=None))
    return Comparison(
        ours=ours,
        theirs=theirs,
        dice=interval,
        target=target,
        steps=none if target is None else _sooner(config, ours.timed(target), theirs.timed(target)),
        seconds=none if target is None else _sooner(config, ours.timed_s(target), theirs.timed_s(target)),
    )


def _sooner(
    config: StudyConfig, ours: Sequence[tuple[Trial, Time]], theirs: Sequence[tuple[Trial, Time]]
) -> RatioInterval:
    """How many times sooner our trials reached the target, on the fine-tuning seeds that both have."""
    seeds = shared_seeds([trial for trial, _ in ours], [trial for trial, _ in theirs])
    if seeds is None:
        return RatioInterval(ratio=Ratio(value=None))
    found = ratio_bootstrap(
        _by_seed(ours, seeds.ours, seeds.finetune),
        _by_seed(theirs, seeds.theirs, seeds.finetune),
        **asdict(config.bootstrap),
        same_pretraining=seeds.same_pretraining,
    )
    return replace(found, pretrain_seeds=seeds.pretrained, finetune_seeds=len(seeds.finetune))


def _by_seed(
    timed: Sequence[tuple[Trial, Time]], pretrain: Sequence[int | None], finetune: Sequence[int]
) -> list[list[list[Time]]]:
    """The times of each pair of seeds, [P, F]: several where runs differ by their fold."""
    found: dict[tuple[int | None, int], list[Time]] = {}
    for trial, time in timed:
        found.setdefault((trial.pretrain_seed, trial.finetune_seed), []).append(time)
    return [[found.get((first, second), []) for second in finetune] for first in pretrain]


def _cases(group: Group) -> list[str]:
    return [case for result in group.results for case in result.case_dice]


def reference_setting(recipe: ExperimentConfig) -> str:
    """The setting that others are compared with."""
    return "" if recipe.pool_settings else recipe.reference_setting or next(iter(recipe.points))


def comparisons(config: StudyConfig, experiment: str, everything: Sequence[Group]) -> list[Comparison]:
    """Every arm against the reference arm of its setting, and every setting against the reference setting.

    Args:
        config: of the study.
        experiment: whose groups are compared.
        everything: the groups of all experiments.
    """
    groups = [group for group in everything if group.experiment == experiment]
    by_place: Mapping[tuple[str, str], Group] = {(group.setting, group.arm): group for group in groups}
    recipe = config.experiments[experiment]
    arm, setting = recipe.reference_arm or recipe.arms[0], reference_setting(recipe)
    found = []
    for group in groups:
        others = [(group.setting, arm)] if group.arm != arm else []
        others += [(setting, group.arm)] if group.setting != setting else []
        for place in others:
            found.append(compare(config, group, by_place[place], target_dice(config, everything, by_place[place])))
    return found
