"""What a study's nodes have measured -> the tables and sentences of its report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mimscale.config import config_yaml
from mimscale.errors import MimscaleError
from mimscale.report.facts import RunFacts, read_run
from mimscale.report.study import Curve, Point, Section, StudyView, Table, write_study_page
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.study.checks import VolumeUse, used_rows
from mimscale.study.config import ExperimentConfig, StudyConfig
from mimscale.study.graph import Graph
from mimscale.study.nodes import resolve, tested_on, use_of
from mimscale.study.results import (
    Comparison,
    Group,
    Result,
    comparisons,
    compute_s,
    read_groups,
    reference_setting,
    target_dice,
)
from mimscale.study.statistics import Interval, Ratio, Spread, Time, median_time, spread
from mimscale.train.run_dir import RunDir

NOTHING = "n/a"


@dataclass(frozen=True)
class NodeState:
    """What a node has come to: done, failed, left out, running, queued or to do."""

    name: str
    reason: str
    exit_code: int = 0


def write_study_report(view: StudyView, study_dir: Path) -> Path:
    """Write report/index.html of a study; returns its path.

    Raises:
        DataError: the disk is full or not writable.
    """
    return write_study_page(view, study_dir / "report")


def study_view(config: StudyConfig, graph: Graph, study_dir: Path, states: Mapping[str, NodeState]) -> StudyView:
    """All that the report of a study shows, from what its finished nodes have written."""
    done = {node_id for node_id, state in states.items() if state.name == "done"}
    groups = read_groups(config, graph, study_dir, done)
    sections, shown = [], []
    for experiment in dict.fromkeys(group.experiment for group in groups):
        section = _section(config, experiment, groups)
        sections.append(section)
        shown += section.tables[:2]
    results = list({r.trial.finetune: r for group in groups for r in group.results}.values())
    uses = _Uses()
    provenance = [_trials_table(graph, study_dir, groups, uses)]
    pictured = [graph.folder(study_dir, graph.nodes[node]) for node in graph.reconstructions if node in done]
    return StudyView(
        title=config.title,
        question=" ".join(dict.fromkeys(config.experiments[section.name].question for section in sections[:1])),
        notes=_notes(config, graph, states),
        nodes=_node_table(graph, states),
        sections=sections,
        costs=_costs(groups),
        provenance=provenance,
        pictures=_pictures(graph, groups, [RunDir(path) for path in pictured]),
        classes=next((list(r.scores["classes"]) for r in results if r.scores), []),
        volumes=uses.listed(),
        configs=[("the study's recipe, resolved", config_yaml(config)), *_run_configs(graph, groups)],
        footer=f"mimscale {version('mimscale')}, written {time.strftime('%Y-%m-%d %H:%M %Z')}.",
        tables=shown,
    )


def _section(config: StudyConfig, experiment: str, everything: list[Group]) -> Section:
    recipe = config.experiments[experiment]
    groups = [group for group in everything if group.experiment == experiment]
    found = comparisons(config, experiment, everything)
    settings = list(dict.fromkeys(group.setting for group in groups))
    targets = {group.setting: target_dice(config, everything, group) for group in groups}
    points = {
        arm: [
            Point(setting=g.setting, mean=s.mean, std=s.std)
            for g in groups
            if g.arm == arm and (s := g.spread("dice")).mean
        ]
        for arm in recipe.arms
    }
    curves = [curve for group in groups if (curve := _curve(group)) is not None]
    tables = [
        _score_table(groups),
        _comparison_table(config, found),
        _time_table(groups, targets),
        _class_table(groups),
    ]
    return Section(
        name=experiment,
        question=_question(recipe),
        answers=[_answer(one) for one in found] or ["One arm under one setting: there is nothing to compare."],
        tables=tables,
        curves=curves,
        target=targets[reference_setting(recipe)],
        points={arm: line for arm, line in points.items() if line} if len(settings) > 1 else {},
        settings=settings,
    )


def _question(recipe: ExperimentConfig) -> str:
    if not recipe.claim:
        return recipe.question
    value = "" if recipe.paper_value is None else f" ({recipe.paper_value:g})"
    return f"{recipe.question} The paper: {recipe.claim}{value}."


def _score_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        best = [result.best_validation for result in group.results if result.best_validation is not None]
        rows.append(
            [
                group.arm,
                group.setting,
                f"{sum(result.scores is not None for result in group.results)} of {group.planned}",
                _spread(group.spread("dice")),
                _spread(group.spread("dice", background=True)),
                _spread(group.spread("hd95_mm"), 2),
                _spread(group.spread("nsd")),
                _spread(group.last_validation),
                _spread(spread([value for _, value in best])),
            ]
        )
    return Table(
        title="Test scores of the last checkpoint",
        columns=[
            "arm",
            "setting",
            "runs",
            "Dice",
            "Dice with background",
            "HD95, mm",
            "NSD",
            "validation Dice, last",
            "validation Dice, best",
        ],
        rows=rows,
        note="Mean +/- standard deviation over runs, which differ by their seeds. Each run is scored on whole volumes, "
        "on the grid and against the labels of the source files; a mean over classes leaves out the background unless "
        "it says otherwise. Validation Dice is that of fixed crops; the best of it chose nothing.",
        text_columns=2,
    )


def _comparison_table(config: StudyConfig, found: Sequence[Comparison]) -> Table:
    rows = [
        [
            one.ours.name,
            one.theirs.name,
            _signed(one.dice.difference),
            _range(one.dice),
            f"{one.dice.pretrain_seeds} x {one.dice.finetune_seeds}, {one.dice.cases} cases",
            _ratio(one.steps),
            _ratio(one.seconds),
        ]
        for one in found
    ]
    return Table(
        title="Differences",
        columns=[
            "arm",
            "against",
            "difference in Dice",
            f"{100 * config.bootstrap.level:g} % interval",
            "seeds and cases",
            "sooner at the target, steps",
            "sooner, pretraining included",
        ],
        rows=rows,
        note=f"Paired percentile bootstrap, {config.bootstrap.replicates} replicates: pretraining seeds are drawn, "
        "fine-tuning seeds within them, and cases, the same for both arms. Sooner: steps (or seconds of computing) of "
        "the other arm over those of this one until validation Dice reaches the target, medians over runs; at least "
        "and at most where one of them never did.",
        text_columns=2,
    )


def _time_table(groups: Sequence[Group], targets: Mapping[str, float | None]) -> Table:
    rows = []
    for group in groups:
        target = targets[group.setting]
        if target is None:
            continue
        times = group.times(target)
        rows.append(
            [
                group.arm,
                group.setting,
                f"{target:.3f}",
                _time(median_time(times)),
                _time(median_time(group.seconds_to(target))),
                f"{sum(time.censored for time in times)} of {len(times)}",
                ", ".join(_time(time) for time in times),
            ]
        )
    return Table(
        title="Steps to the target",
        columns=["arm", "setting", "target", "steps, median", "seconds, median", "never reached", "each run"],
        rows=rows,
        note="The first validation at which Dice is at least the target; > marks a run that ended before. Seconds: of "
        "computing, pretraining included.",
        text_columns=2,
    )


def _class_table(groups: Sequence[Group]) -> Table:
    names = list(
        dict.fromkeys(name for group in groups for r in group.results if r.scores for name in r.scores["classes"])
    )
    rows = [
        [
            name,
            group.name,
            *(_spread(group.class_spread(name, m), d) for m, d in (("dice", 3), ("hd95_mm", 2), ("nsd", 3))),
        ]
        for name in names
        for group in groups
        if any(result.scores for result in group.results)
    ]
    return Table(title="Each class", columns=["class", "arm", "Dice", "HD95, mm", "NSD"], rows=rows, text_columns=2)


def _answer(one: Comparison) -> str:
    interval = one.dice
    if interval.difference is None:
        return f"{one.ours.name} against {one.theirs.name}: not measured yet."
    said = {
        "higher": "higher",
        "lower": "lower",
        "nothing": "not shown to differ: the interval holds 0" if interval.low is not None else "of unknown certainty",
    }[interval.shows]
    text = f"{one.ours.name} against {one.theirs.name}: Dice {_signed(interval.difference)} {_range(interval)}, {said}"
    if one.steps.value is not None:
        text += f"; the target is reached {_ratio(one.steps)} times as fast, {_ratio(one.seconds)} with pretraining"
    elif one.target is not None:
        text += "; neither reaches the target"
    return text + "."


def _curve(group: Group) -> Curve | None:
    curves = [result.curve for result in group.results if result.curve]
    if not curves:
        return None
    steps = [step for step, _ in max(curves, key=len)]
    runs = [[value for _, value in curve] for curve in curves if [step for step, _ in curve] == steps]
    return Curve(name=group.name, steps=steps, runs=runs)


def _costs(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        pretraining = list({r.trial.pretrain: r.pretraining for r in group.results if r.pretraining}.values())
        rows.append(
            [
                group.experiment,
                group.arm,
                group.setting,
                _cost([float(run.last_step) for run in pretraining], 0),
                _cost([float(run.last_step * run.config["global_batch"]) for run in pretraining], 0),
                _cost([run.percentile("samples_per_s", 50) for run in pretraining], 2),
                _cost([compute_s(run) for run in pretraining], 0),
                _cost([float(result.run.last_step) for result in group.results], 0),
                _cost([result.finetune_s for result in group.results], 0),
                _cost([r.scores.get("seconds") for r in group.results if r.scores], 0),
            ]
        )
    return Table(
        title="",
        columns=[
            "experiment",
            "arm",
            "setting",
            "pretraining steps",
            "samples",
            "samples/s",
            "pretraining, s",
            "fine-tuning steps",
            "fine-tuning, s",
            "scoring, s",
        ],
        rows=rows,
        note="Means over the runs. Seconds of training are the median step times the steps; start, validation and "
        "saves are not in them. Nodes that ran at the same time on one machine slowed each other down.",
        text_columns=3,
    )


def _trials_table(graph: Graph, study_dir: Path, groups: Sequence[Group], uses: "_Uses") -> Table:
    rows = []
    for group in groups:
        for result in group.results:
            trial = result.trial
            run = resolve(graph, study_dir, graph.nodes[trial.finetune])
            evaluation = resolve(graph, study_dir, graph.nodes[trial.evaluate])
            pretraining = None if trial.pretrain is None else resolve(graph, study_dir, graph.nodes[trial.pretrain])
            rows.append(
                [
                    group.experiment,
                    group.name,
                    str(trial.pretrain_seed) if trial.pretrain else "",
                    str(trial.finetune_seed),
                    _three(result.mean("dice")),
                    result.scores["checkpoint"] if result.scores else NOTHING,
                    trial.pretrain or "",
                    trial.finetune,
                    _commit(result),
                    uses.name(use_of(pretraining, "train")) if pretraining else "",
                    uses.name(use_of(run, "train")),
                    uses.name(use_of(run, "val")),
                    uses.name(tested_on(run, evaluation)),
                ]
            )
    return Table(
        title="Runs",
        columns=[
            "experiment",
            "arm",
            "pretraining seed",
            "fine-tuning seed",
            "test Dice",
            "checkpoint",
            "pretraining",
            "fine-tuning",
            "commit",
            "pretrained on",
            "trained on",
            "validated on",
            "tested on",
        ],
        rows=rows,
        note="Folders are nodes/NAME in the study's folder: config.yaml, metrics.jsonl, jobs.jsonl and env.json of "
        "each run, its scores in evaluate/scores.json and evaluate/cases.csv. The volumes of each use stand below.",
        text_columns=2,
    )


class _Uses:
    """Names of sets of volumes, and what is in them."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, ...], str] = {}
        self._manifests: dict[Path, Manifest] = {}

    def name(self, use: VolumeUse) -> str:
        """The name of a set of volumes; the same volumes have one name."""
        try:
            manifest = self._manifests.setdefault(use.store, load_manifest(use.store))
            ids = tuple(sorted(manifest.column("id")[used_rows(use, manifest)]))
        except MimscaleError:
            return "its store is gone"
        return self._ids.setdefault(ids, f"set {len(self._ids) + 1}")

    def listed(self) -> list[tuple[str, list[str]]]:
        """Every named set."""
        return [(name, list(ids)) for ids, name in self._ids.items()]


def _commit(result: Result) -> str:
    commits = {
        str(run.environment.get("commit") or "unknown")[:12]
        for run in (result.run, result.pretraining)
        if run is not None and run.environment
    }
    return ", ".join(sorted(commits)) or "unknown"


def _node_table(graph: Graph, states: Mapping[str, NodeState]) -> Table:
    return Table(
        title="",
        columns=["node", "what", "state", "reason"],
        rows=[[node.id, node.label, states[node.id].name, states[node.id].reason] for node in graph.nodes.values()],
        text_columns=4,
    )


def _notes(config: StudyConfig, graph: Graph, states: Mapping[str, NodeState]) -> list[str]:
    notes = [config.caveat] if config.caveat else []
    if config.pretrain_on_validation is not None:
        notes.append(f"Pretraining may read volumes that are validated or tested on: {config.pretrain_on_validation}")
    for key, reason in config.may_differ.items():
        arms = [name for name, arm in config.arms.items() if arm.finetune]
        notes.append(f"{key} of fine-tuning differs in {', '.join(arms) or 'no arm'}: {reason}")
    counts: dict[str, int] = {}
    for state in states.values():
        counts[state.name] = counts.get(state.name, 0) + 1
    if counts.keys() - {"done"}:
        text = ", ".join(f"{count} {name}" for name, count in counts.items())
        notes.append(f"Not all {len(states)} nodes are done ({text}); what is missing is in no number below.")
    notes += [
        f"{graph.nodes[node_id].label} failed: {state.reason}"
        for node_id, state in states.items()
        if state.name == "failed"
    ]
    return notes


def _pictures(graph: Graph, groups: Sequence[Group], reconstructed: Sequence[RunDir]) -> list[tuple[str, RunFacts]]:
    labels = {node.folder_id: node.label for node in graph.nodes.values() if node.id in graph.reconstructions}
    found = [(labels[run.path.name], read_run(run.path)) for run in reconstructed]
    first = groups[0].experiment if groups else ""
    for group in groups:
        scored = [result for result in group.results if result.scores]
        if group.experiment == first and scored:
            seeds = f"fine-tuning seed {scored[0].trial.finetune_seed}"
            found.append((f"{group.name}, {seeds}: image, truth, prediction", scored[0].run))
    return found


def _run_configs(graph: Graph, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """The configs of the first run of each group."""
    texts: dict[str, str] = {}
    for group in groups:
        for result in group.results[:1]:
            for run in filter(None, (result.pretraining, result.run)):
                texts.setdefault(f"{run.name} ({graph.nodes[run.name].label})", run.config_text)
    return list(texts.items())


def _cost(values: Sequence[float | None], digits: int) -> str:
    mean = spread(values).mean
    return NOTHING if mean is None else f"{mean:.{digits}f}"


def _spread(value: Spread, digits: int = 3) -> str:
    if value.mean is None:
        return NOTHING
    return f"{value.mean:.{digits}f}" + ("" if value.std is None else f" +/- {value.std:.{digits}f}")


def _three(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.3f}"


def _range(interval: Interval) -> str:
    return NOTHING if interval.low is None else f"[{_signed(interval.low)}, {_signed(interval.high)}]"


def _ratio(ratio: Ratio) -> str:
    return NOTHING if ratio.value is None else f"{ratio.bound} {ratio.value:.2f}".strip()


def _time(time: Time | None) -> str:
    return NOTHING if time is None else f"{'> ' if time.censored else ''}{time.value:.0f}"
