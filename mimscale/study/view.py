"""What a study's nodes have measured -> the tables and sentences of its report."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from mimscale import durable
from mimscale.config import config_yaml
from mimscale.errors import DataError, MimscaleError
from mimscale.evaluate.metrics import foreground_names
from mimscale.report.facts import RunFacts, read_run
from mimscale.report.study import Curve, Point, Section, StudyView, Table, write_study_page
from mimscale.report.study_markdown import study_markdown
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.study.answers import answers, question
from mimscale.study.checks import VolumeUse, used_rows
from mimscale.study.comparisons import Comparison, comparisons, reference_setting
from mimscale.study.config import StudyConfig, dotted_keys
from mimscale.study.cost import cost_table
from mimscale.study.graph import Graph, Trial
from mimscale.study.matched import is_matched, measured_steps
from mimscale.study.nodes import resolve, tested_on, use_of
from mimscale.study.results import Group, Result, Targets, read_groups
from mimscale.study.statistics import median_time
from mimscale.study.tables import (
    NOTHING,
    class_tables,
    comparison_table,
    heading,
    score_table,
    three,
    time_table,
    time_text,
)
from mimscale.study.targets import race_targets
from mimscale.train.run_dir import RunDir

UNCORRECTED = 5  # differences from which on it is said that their intervals are not corrected for their number


@dataclass(frozen=True)
class NodeState:
    """What a node has come to: done, failed, left out, running, queued or to do."""

    name: str
    reason: str
    exit_code: int = 0


def write_study_report(view: StudyView, study_dir: Path) -> Path:
    """Write report/index.html of a study, and its tables alone as report/results.md; returns the page's path.

    Raises:
        DataError: the disk is full or not writable.
    """
    folder = study_dir / "report"
    page = write_study_page(view, folder)
    with durable.explained(DataError, folder, "free some space, then give the same command again"):
        durable.write_text(folder / "results.md", study_markdown(view))
    return page


def study_view(config: StudyConfig, graph: Graph, study_dir: Path, states: Mapping[str, NodeState]) -> StudyView:
    """All that the report of a study shows, from what its finished nodes have written."""
    done = {node_id for node_id, state in states.items() if state.name == "done"}
    groups = read_groups(config, graph, study_dir, done)
    sections, shown, compared = [], [], 0
    for experiment in dict.fromkeys(group.experiment for group in groups):
        found = comparisons(config, experiment, groups)
        compared += sum(one.dice.low is not None for one in found)
        section = _section(config, experiment, groups, found)
        sections.append(section)
        if section.measured:
            shown += [replace(table, title=f"{section.heading}: {table.title}") for table in section.tables[:2]]
    results = list({r.trial.finetune: r for group in groups for r in group.results}.values())
    uses = _Uses(study_dir)
    provenance = [_trials_table(graph, study_dir, groups, uses)]
    pictured = [graph.folder(study_dir, graph.nodes[node]) for node in graph.reconstructions if node in done]
    return StudyView(
        title=config.title,
        question=" ".join(dict.fromkeys(config.experiments[section.name].question for section in sections[:1])),
        notes=_notes(config, graph, study_dir, states, compared),
        nodes=_node_table(graph, states),
        sections=sections,
        costs=cost_table(groups),
        provenance=provenance,
        pictures=_pictures(graph, groups, [RunDir(path) for path in pictured]),
        classes=next((foreground_names(r.scores) for r in results if r.scores), []),
        volumes=uses.listed(),
        configs=[("the study's recipe, resolved", config_yaml(config)), *_run_configs(graph, groups)],
        footer=f"mimscale {version('mimscale')}, written {time.strftime('%Y-%m-%d %H:%M %Z')}.",
        tables=shown,
    )


def _section(config: StudyConfig, experiment: str, everything: list[Group], found: Sequence[Comparison]) -> Section:
    recipe = config.experiments[experiment]
    groups = [group for group in everything if group.experiment == experiment]
    settings = list(dict.fromkeys(group.setting for group in groups))
    targets: dict[Trial, float] = {}
    for group in groups:
        targets.update(race_targets(config, everything, group, group))
    of_reference = [
        targets[result.trial]
        for group in groups
        if group.setting == reference_setting(recipe)
        for result in group.results
        if result.trial in targets
    ]
    points = {
        arm: [
            Point(
                setting=g.setting,
                mean=s.mean,
                std=s.std,
                runs=[d for r in g.results if (d := r.mean("dice")) is not None],
            )
            for g in groups
            if g.arm == arm and (s := g.spread("dice")).mean is not None
        ]
        for arm in recipe.arms
    }
    folds = len(recipe.points) if recipe.pool_settings else None
    curves = [curve for group in groups if (curve := _curve(group, targets)) is not None]
    tables = [
        score_table(groups, folds),
        comparison_table(config, found, folds),
        time_table(groups, targets),
    ]
    return Section(
        name=experiment,
        heading=heading(experiment),
        question=question(recipe),
        answers=answers(found),
        tables=tables,
        classes=class_tables(groups),
        curves=curves,
        target=statistics.fmean(of_reference) if of_reference else None,  # of folds each has its own
        points={arm: line for arm, line in points.items() if line} if len(settings) > 1 else {},
        settings=settings,
        measured=any(result.scores for group in groups for result in group.results),
    )


def _curve(group: Group, targets: Targets) -> Curve | None:
    curves = [result.curve for result in group.results if result.curve]
    if not curves:
        return None
    steps = [step for step, _ in max(curves, key=len)]
    runs = [[value for _, value in curve] for curve in curves if [step for step, _ in curve] == steps]
    times = group.times(targets)
    reached = time_text(median_time(times)) if times else ""
    return Curve(arm=group.arm, setting=group.setting, steps=steps, runs=runs, reached=reached)


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
                    heading(group.experiment),
                    group.name,
                    "" if trial.pretrain_seed is None else str(trial.pretrain_seed),
                    str(trial.finetune_seed),
                    three(result.mean("dice")),
                    result.scores["checkpoint"] if result.scores else NOTHING,
                    trial.pretrain or "",
                    trial.finetune,
                    graph.scores_folder(Path(), graph.nodes[trial.evaluate]).name,
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
            "scores",
            "commit",
            "pretrained on",
            "trained on",
            "validated on",
            "tested on",
        ],
        rows=rows,
        note="Folders are nodes/NAME in the study's folder: config.yaml, metrics.jsonl, jobs.jsonl and env.json of "
        "each run, its scores in evaluate/scores.json and evaluate/cases.csv, or in the folder of an evaluation of "
        "their own. The volumes of each use stand below.",
        text_columns=2,
    )


class _Uses:
    """Names of sets of volumes, and what is in them."""

    def __init__(self, study_dir: Path) -> None:
        self._study_dir = study_dir
        self._sets: dict[tuple[str, ...], tuple[str, Path]] = {}  # volumes -> their name, and where they are
        self._manifests: dict[Path, Manifest] = {}

    def name(self, use: VolumeUse) -> str:
        """The name of a set of volumes; the same volumes have one name."""
        try:
            manifest = self._manifests.setdefault(use.store, load_manifest(use.store))
            ids = tuple(sorted(manifest.column("id")[used_rows(use, manifest)]))
        except MimscaleError:
            return "its store is gone"
        return self._sets.setdefault(ids, (f"set {len(self._sets) + 1}", use.store))[0]

    def listed(self) -> list[tuple[str, list[str]]]:
        """Every named set."""
        return [
            (f"{name}, {len(ids)} volume(s) of {self._short(store)}", list(ids))
            for ids, (name, store) in self._sets.items()
        ]

    def _short(self, store: Path) -> Path:
        return store.relative_to(self._study_dir) if store.is_relative_to(self._study_dir) else store


def _commit(result: Result) -> str:
    """Of the code that pretrained, trained and scored; -dirty where it was none that is committed."""
    said = [(run.environment or {}).get("commit") for run in (result.pretraining, result.run) if run is not None]
    if result.scores:
        said.append(result.scores.get("commit"))
    short = [str(commit or "unknown").partition("-") for commit in said]
    return ", ".join(sorted({f"{commit[:12]}{dash}{dirty}" for commit, dash, dirty in short}))


def _node_table(graph: Graph, states: Mapping[str, NodeState]) -> Table:
    labels = Counter(node.label for node in graph.nodes.values())

    def name(parent: str) -> str:
        label = graph.nodes[parent].label
        return label if labels[label] == 1 else f"{label} ({parent})"

    return Table(
        title="",
        columns=["node", "what", "after", "state", "reason"],
        rows=[
            [
                node.id,
                node.label,
                "; ".join(map(name, node.parents)),
                states[node.id].name,
                states[node.id].reason,
            ]
            for node in graph.nodes.values()
        ],
        note="After: the nodes whose results a node reads; it starts when they are done.",
        text_columns=5,
    )


def _notes(
    config: StudyConfig, graph: Graph, study_dir: Path, states: Mapping[str, NodeState], compared: int
) -> list[str]:
    notes = [config.caveat] if config.caveat else []
    if config.pretrain_on_validation is not None:
        notes.append(f"Pretraining may read volumes that are validated or tested on: {config.pretrain_on_validation}")
    used = {trial.arm for trial in graph.trials}
    for key, reason in config.may_differ.items():
        differing = [name for name, arm in config.arms.items() if name in used and key in dotted_keys(arm.finetune)]
        if differing:
            notes.append(f"{key} of fine-tuning differs in {'; '.join(differing)}: {reason}")
    notes += [
        f"{name} starts from weights that no run of this study made: what they were trained on was not looked at, and "
        "what that took is in no number."
        for name, arm in config.arms.items()
        if name in used and arm.weights is not None
    ]
    notes += _matched_notes(graph, study_dir)
    if compared > UNCORRECTED:
        by_chance = (1 - config.bootstrap.level) * compared
        notes.append(
            f"{compared} differences have an interval below, and none is corrected for the others: were there no "
            f"effect at all, about {by_chance:.0f} would still be called higher or lower if seeds were many. Of few "
            "seeds intervals are too narrow, and several times as many are: about every ninth against an arm that was "
            "not pretrained with 3 x 3 seeds, every third with 1 x 2 (in simulations with ten cases)."
        )
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


def _matched_notes(graph: Graph, study_dir: Path) -> list[str]:
    """How the steps came about of pretraining that got the time of another arm."""
    notes = []
    for node in graph.nodes.values():
        if not is_matched(node.config) or (found := measured_steps(graph.config_of(study_dir, node))) is None:
            continue
        other = graph.nodes[node.config["steps"]["in_the_time_of"].removeprefix("@")]
        notes.append(
            f"{node.label}: {found.steps} steps instead of {found.of_steps}, as many as fit into the "
            f"{found.time_s:.3g} s of {other.label} at {found.step_s:.3g} s a step."
        )
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
