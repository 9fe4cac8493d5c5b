"""A study's recipe -> its graph of runs: a pure function.

A node is named by a hash of all that decides its result: its verb, its config, and the nodes that it reads from. So
two experiments that need the same run share it, and a changed recipe makes new nodes and leaves finished ones alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mimscale.config import parse_yaml, recipe_text, tree_hash
from mimscale.errors import ConfigError
from mimscale.evaluate.config import EVALUATION
from mimscale.study.config import ArmConfig, ExperimentConfig, StudyConfig, merged
from mimscale.study.matched import is_matched, steps_in_time_of
from mimscale.train.method import predicts_voxels

Verb = Literal["cohort", "ingest", "pretrain", "finetune", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One verb with its config. In the config `@ID` stands for the folder of node ID."""

    id: str
    verb: Verb
    label: str  # for people
    config: dict[str, Any]
    parents: tuple[str, ...]
    needs: str = ""  # what a user must have for it, in words
    apart: bool = False  # an evaluation in another way than all others: its scores have a folder of their own
    missing: str = ""  # data that it reads and that the user has not given yet, in words

    @property
    def waits_for_results(self) -> bool:
        """Whether it can only be submitted after its parents have ended: its config follows from what they measure."""
        return is_matched(self.config)

    @property
    def folder_id(self) -> str:
        """The node in whose folder it writes: an evaluation writes into the run that it scores, unless it is apart."""
        return self.parents[0] if self.verb == "evaluate" and not self.apart else self.id


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fine-tuned network and its score: a point of an experiment."""

    experiment: str
    setting: str
    arm: str
    pretrain_seed: int | None  # None: from scratch
    finetune_seed: int
    pretrain: str | None  # node; None: from scratch, or from weights that no node of the study made
    finetune: str
    evaluate: str


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All nodes, parents first, and what they are for."""

    nodes: dict[str, Node]
    trials: tuple[Trial, ...]
    data: dict[str, str]  # name of data -> its node, or the path of what was there already
    reconstructions: tuple[str, ...]  # evaluations of pretraining runs

    def folder(self, study_dir: Path, node: Node) -> Path:
        """Where a node writes."""
        return study_dir / "nodes" / node.folder_id

    def config_of(self, study_dir: Path, node: Node) -> dict[str, Any]:
        """The config of a node with real folders in it."""
        tree: dict[str, Any] = _replaced(node.config, lambda node_id: str(study_dir / "nodes" / node_id))
        folder = str(self.folder(study_dir, node))
        if node.verb in ("cohort", "ingest"):
            return {**tree, "out": folder}
        if node.apart:
            return {**tree, "run_dir": str(self.folder(study_dir, self.nodes[node.parents[0]])), "out": folder}
        return {**tree, "run_dir": folder}

    def scores_folder(self, study_dir: Path, node: Node) -> Path:
        """Where an evaluation puts its scores."""
        folder = self.folder(study_dir, node)
        return folder if node.apart else folder / EVALUATION


@dataclass
class _Builder:
    config: StudyConfig
    nodes: dict[str, Node] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # name of data that the user must give -> what to say

    def add(
        self,
        verb: Verb,
        label: str,
        config: dict[str, Any],
        parents: tuple[str, ...] = (),
        *,
        needs: str = "",
        apart: bool = False,
    ) -> str:
        used = [name for name in _references(config) if name not in self.nodes]
        for name in used:
            self.add_data(name, label)
        missing = "; ".join(self.missing[name] for name in dict.fromkeys(used) if name in self.missing)
        tree: dict[str, Any] = _replaced(config, lambda name: self._place(name))
        parents = (*parents, *(p for p in dict.fromkeys(_references(tree)) if p not in parents))
        node_id = f"{verb}-{tree_hash({'verb': verb, 'config': tree, 'parents': list(parents)})}"
        if node_id not in self.nodes:
            self.nodes[node_id] = Node(
                id=node_id,
                verb=verb,
                label=label,
                config=tree,
                parents=parents,
                needs=needs,
                apart=apart,
                missing=missing,
            )
        return node_id

    def add_data(self, name: str, user: str) -> None:
        if name in self.data:
            return
        if name not in self.config.data:
            known = ", ".join(self.config.data)
            raise ConfigError(f"@{name}, which {user} needs: no such data; there are {known}")
        data = self.config.data[name]
        if data.path is not None:
            self.data[name] = str(data.path)
            return
        if data.verb is None:
            self.missing[name] = f"data.{name}.path: missing; needs {data.needs}"
            return
        self.data[name] = ""  # while it is made: a circle ends in a message
        tree = merged(_recipe(data.recipe), data.config)
        self.data[name] = self.add(data.verb, f"{data.verb} {name}", tree, needs=data.needs)

    def _place(self, name: str) -> str:
        if name in self.nodes:
            return f"@{name}"
        if name in self.missing:
            return f"data.{name}.path"
        place = self.data[name]
        if not place:
            raise ConfigError(f"data.{name}: is made from itself; see the @NAMEs in its config")
        return f"@{place}" if place in self.nodes else place


def expand(config: StudyConfig) -> Graph:
    """The graph of a study.

    Raises:
        ConfigError: a recipe that does not exist, or data that nobody names.
    """
    builder = _Builder(config)
    trials: list[Trial] = []
    pictured: dict[str, str] = {}  # pretraining without its seed -> the first such node
    for name, experiment in config.experiments.items():
        if config.only and name not in config.only:
            continue
        for setting, arm_name, pretrain_seed, finetune_seed in _points(config, experiment):
            keys = {**experiment.config, **experiment.points[setting]}
            arm = config.arms[arm_name]
            label = " ".join(filter(None, (arm_name, _setting_label(name, setting))))
            pretrain = None
            if arm.pretrain is not None:
                tree = _stage_tree(config, arm, keys, "pretrain", pretrain_seed)
                kind = tree_hash({**tree, "seed": None, "same_time_as": arm.same_time_as})
                if arm.same_time_as is not None:
                    tree["steps"] = _matched(builder, arm, keys, label, tree)
                pretrain = builder.add("pretrain", f"pretrain {label}, seed {pretrain_seed}", tree)
                pictured.setdefault(kind, pretrain)
            tree = _stage_tree(config, arm, keys, "finetune", finetune_seed)
            if pretrain is not None:
                tree["init_from"] = f"@{pretrain}"
            elif arm.weights is not None:
                tree["init_from"] = arm.weights.replace("{seed}", str(pretrain_seed))
            seeds = f"seed {finetune_seed}" if arm.from_scratch else f"seeds {pretrain_seed}, {finetune_seed}"
            finetune = builder.add("finetune", f"finetune {label}, {seeds}", tree)
            evaluation = _evaluation(config, keys)
            # One run may be scored in several ways, by settings of `evaluate`; each has its own scores.
            apart = evaluation != config.evaluate
            evaluate = builder.add("evaluate", f"evaluate {label}, {seeds}", evaluation, (finetune,), apart=apart)
            trials.append(
                Trial(
                    experiment=name,
                    setting=setting,
                    arm=arm_name,
                    pretrain_seed=pretrain_seed,
                    finetune_seed=finetune_seed,
                    pretrain=pretrain,
                    finetune=finetune,
                    evaluate=evaluate,
                )
            )
    pictures = []
    for node_id in pictured.values() if config.reconstructions else ():
        node = builder.nodes[node_id]
        if predicts_voxels(node.config):
            label = node.label.replace("pretrain", "reconstruct", 1)
            pictures.append(builder.add("evaluate", label, {"crops": 1, "pictures": 2}, (node_id,)))
    return Graph(nodes=builder.nodes, trials=tuple(trials), data=dict(builder.data), reconstructions=tuple(pictures))


def _matched(
    builder: _Builder, arm: ArmConfig, keys: dict[str, Any], label: str, tree: dict[str, Any]
) -> dict[str, Any]:
    """What stands for the steps of an arm that gets another one's time; adds the two runs that they follow from."""
    assert arm.same_time_as is not None, "the caller asks"
    other_arm = builder.config.arms[arm.same_time_as]
    other_tree = _stage_tree(builder.config, other_arm, keys, "pretrain", tree["seed"])
    other = builder.add("pretrain", f"pretrain {arm.same_time_as} (its time), seed {tree['seed']}", other_tree)
    own = builder.add("pretrain", f"pretrain {label} (its rate), seed {tree['seed']}", tree)
    return steps_in_time_of(other, own, tree["steps"])


def _points(config: StudyConfig, experiment: ExperimentConfig) -> Iterator[tuple[str, str, int | None, int]]:
    """Setting, arm, pretraining seed and fine-tuning seed of every trial; the first seed of all arms comes first."""
    pretrain_seeds = experiment.pretrain_seeds or config.pretrain_seeds
    finetune_seeds = experiment.finetune_seeds or config.finetune_seeds
    for place, pretrain_seed in enumerate(pretrain_seeds):
        for finetune_seed in finetune_seeds:
            for setting in experiment.points:
                for arm in experiment.arms:
                    if not config.arms[arm].from_scratch:
                        yield setting, arm, pretrain_seed, finetune_seed
                    elif place == 0:
                        yield setting, arm, None, finetune_seed


def _stage_tree(
    config: StudyConfig, arm: ArmConfig, keys: dict[str, Any], stage: Literal["pretrain", "finetune"], seed: int | None
) -> dict[str, Any]:
    base = config.pretrain if stage == "pretrain" else config.finetune
    own = arm.pretrain if stage == "pretrain" else arm.finetune
    tree = merged(base.config, own or {})
    for key, value in keys.items():
        which, _, rest = key.partition(".")
        if which in (stage, "both"):
            tree = merged(tree, _nested(rest, value))
    # Another encoder has other keys in `model`: then not only keys but the recipe below them is another one.
    recipe = tree.pop("recipe", base.recipe)
    return {**merged(_recipe(recipe), tree), "seed": seed}


def _evaluation(config: StudyConfig, keys: dict[str, Any]) -> dict[str, Any]:
    tree = config.evaluate
    for key, value in keys.items():
        which, _, rest = key.partition(".")
        if which == "evaluate":
            tree = merged(tree, _nested(rest, value))
    return dict(tree)


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


@lru_cache(maxsize=32)  # a study reads few recipes, hundreds of times; `merged` copies what it takes
def _recipe(recipe: str | None) -> dict[str, Any]:
    return {} if recipe is None else parse_yaml(recipe_text(recipe), recipe)


def _setting_label(experiment: str, setting: str) -> str:
    return f"{experiment}={setting}" if setting else ""


def _references(tree: Any) -> list[str]:
    """Names behind an @, in order."""
    if isinstance(tree, dict):
        return [name for value in tree.values() for name in _references(value)]
    if isinstance(tree, list | tuple):
        return [name for value in tree for name in _references(value)]
    return [tree[1:].partition("/")[0]] if isinstance(tree, str) and tree.startswith("@") else []


def _replaced(tree: Any, place: Any) -> Any:
    """The tree with every @NAME replaced by `place(NAME)`."""
    if isinstance(tree, dict):
        return {key: _replaced(value, place) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_replaced(value, place) for value in tree]
    if not (isinstance(tree, str) and tree.startswith("@")):
        return tree
    name, slash, rest = tree[1:].partition("/")
    return f"{place(name)}{slash}{rest}"
