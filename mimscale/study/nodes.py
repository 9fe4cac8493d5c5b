"""A node's config as its verb reads it, and what the data must be like before it may start. No torch here."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimscale.config import build_config
from mimscale.errors import ConfigError
from mimscale.evaluate.config import EvaluateConfig
from mimscale.ingest.config import CohortConfig, IngestConfig
from mimscale.study.checks import VolumeUse, seen_in_pretraining, store_problems
from mimscale.study.config import StudyConfig
from mimscale.study.graph import Graph, Node
from mimscale.study.matched import is_matched, with_steps
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig
from mimscale.train.verbs import check_run

NAMED = 3  # volumes that a message names
VERB_CONFIGS: dict[str, type[Any]] = {
    "cohort": CohortConfig,
    "ingest": IngestConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
}


def resolve(graph: Graph, study_dir: Path, node: Node) -> Any:
    """The config of a node, checked.

    Raises:
        ConfigError: naming every mistake.
    """
    if node.missing:
        raise ConfigError(f"{node.label}: {node.missing}")
    tree = graph.config_of(study_dir, node)
    try:
        config = build_config(VERB_CONFIGS[node.verb], with_steps(tree) if is_matched(tree) else tree, node.label)
    except ConfigError as error:
        raise ConfigError(f"{error}\n  needs {node.needs}" if node.needs else str(error)) from None
    if isinstance(config, RunConfig):
        check_run(config)
    if isinstance(config, EvaluateConfig) and config.best:
        trained = graph.config_of(study_dir, graph.nodes[node.parents[0]])
        if trained.get("checkpoint", {}).get("keep_best") is None:
            raise ConfigError(
                f"{node.label}: best=true, but its run keeps no checkpoint for that; set checkpoint.keep_best=val_dice "
                "in finetune.config"
            )
    return config


def data_problems(config: StudyConfig, graph: Graph, study_dir: Path, node_id: str | None = None) -> list[str]:
    """How stores differ from what the study expects: of one node, or of those that were there already.

    Raises:
        DataError: no store.
    """
    problems = []
    for name, place in graph.data.items():
        expect = config.data[name].expect
        made = place in graph.nodes
        if expect is None or (place != node_id if made else node_id is not None):
            continue
        store = study_dir / "nodes" / place if made else Path(place)
        problems += [f"data.{name}: {problem}" for problem in store_problems(store, expect)]
    return problems


def absent_data(graph: Graph) -> list[str]:
    """What the user has given by path, and weights of a seed in it, that are not here; one sentence each."""
    users = {place: f"data.{name}.path" for name, place in graph.data.items() if place not in graph.nodes}
    for node in graph.nodes.values():
        weights = node.config.get("init_from")
        if isinstance(weights, str) and not weights.startswith("@") and not node.missing:
            users.setdefault(weights, f"{node.label}: init_from")
    absent = {place: user for place, user in users.items() if not Path(place).exists()}
    # What lies in a folder that is not there needs no line of its own.
    return [
        f"{user}={place}: no such file or folder"
        for place, user in absent.items()
        if not any(str(folder) in absent for folder in Path(place).parents)
    ]


def leaks(config: StudyConfig, graph: Graph, study_dir: Path, node: Node) -> str:
    """Why a pretraining may not start: it would read what is validated or tested on. Empty when it may.

    Raises:
        DataError: a store is not there.
        ConfigError: the config of the pretraining is wrong.
    """
    if config.pretrain_on_validation is not None:
        return ""
    held_out = []
    for trial in graph.trials:
        if trial.pretrain == node.id:
            with suppress(ConfigError):  # its own node will say so
                held_out += _held_out(graph, study_dir, trial.finetune, trial.evaluate)
    found = seen_in_pretraining(use_of(resolve(graph, study_dir, node), "train"), list(dict.fromkeys(held_out)))
    if not found:
        return ""
    some = ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
    return (
        f"pretraining would read {len(found)} volume(s) that are validated or tested on ({some}); leave them out, or "
        "say in pretrain_on_validation why it may"
    )


def _held_out(graph: Graph, study_dir: Path, finetune: str, evaluate: str) -> list[VolumeUse]:
    run = resolve(graph, study_dir, graph.nodes[finetune])
    return [use_of(run, "val"), tested_on(run, resolve(graph, study_dir, graph.nodes[evaluate]))]


def use_of(run: RunConfig, split: str) -> VolumeUse:
    """What a run reads of its own store."""
    overlay = run.overlay if isinstance(run, FinetuneConfig) else None
    return VolumeUse(store=run.store, split=split, stream=run.stream, modality=run.modality, overlay=overlay)


def tested_on(run: FinetuneConfig, evaluation: EvaluateConfig) -> VolumeUse:
    """What a run is scored on: all volumes of the split, whatever part of it the run is trained on."""
    use = use_of(run, evaluation.split)
    use = replace(use, stream=replace(use.stream, train_fraction=1.0))
    if evaluation.store is None or evaluation.store == run.store:
        return use
    return replace(use, store=evaluation.store, stream=replace(use.stream, fold=None))  # folds are of the own store
