"""The recipe of a study: arms, seeds, what is varied, and the one plan that all arms share. No torch here.

A value `@NAME` anywhere in a config stands for the folder of the data called NAME, `@NAME/dataset.json` for a file
in it. Keys of `settings`, `config` and `may_differ` are written with dots: `pretrain.mask.ratio`, `finetune.optim.lr`,
`evaluate.overlap`; `both.patch_voxels` means pretraining and fine-tuning, `finetune.recipe` puts another recipe below
all of them.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mimscale.config import apply_override, build_config, parse_yaml, recipe_text, require_positive, split_arguments
from mimscale.errors import ConfigError

STAGES = ("pretrain", "finetune", "evaluate")
Spacing = tuple[float, float, float]  # [Z, Y, X], mm


@dataclass(frozen=True, kw_only=True)
class ExpectConfig:
    """What a store must be like before anything is trained on it. What is null or empty is not checked."""

    train: int | None = None  # volumes of the split train
    val: int | None = None  # volumes of the split val
    volumes: int | None = None  # of both
    channels: int | None = None
    class_names: tuple[str, ...] = ()  # of `overlay`, background first
    every_class_in: float = 0.0  # least share of the labelled volumes that each class must appear in
    overlay: str = "label"
    spacing_mm: tuple[Spacing, Spacing] | None = None  # smallest and largest
    shape: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None  # smallest and largest, [Z, Y, X] voxels
    modality: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Volumes: files or a store that are there already, or a verb that makes it.

    With `needs` alone it is what the user must give by `path`; several stores may be made from it.
    """

    path: Path | None = None  # what is there: a store, or a download; nothing is made then
    verb: Literal["cohort", "ingest"] | None = None
    recipe: str | None = None  # of the verb
    config: dict[str, Any] = field(default_factory=dict)  # on top of the recipe
    expect: ExpectConfig | None = None  # of a store
    needs: str = ""  # what a user must have, and give, in words

    def __post_init__(self) -> None:
        if self.path is None and self.verb is None and not self.needs:
            raise ValueError("give path=FOLDER, a verb that makes it, or in `needs` what the user must give by path")
        if self.expect is not None and self.verb == "cohort":
            raise ValueError("expect: only a store can be checked; write it where the ingest is")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of every run: a recipe and what changes in it."""

    recipe: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One way to come to an encoder."""

    pretrain: dict[str, Any] | None = None  # on top of the study's pretraining; null: from scratch
    # In place of pretrain: weights from outside of the study, `{seed}` standing for the pretraining seed: @other/{seed}
    weights: str | None = None
    finetune: dict[str, Any] = field(default_factory=dict)  # what differs from the common plan: `may_differ` says why
    # Arm whose pretraining time this one gets, where others get as many crops: its steps follow from what that arm's
    # pretraining and its own with as many crops have measured; put both into the experiment
    same_time_as: str | None = None
    note: str = ""  # for the report

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if "{seed}" not in self.weights:
            raise ValueError(f"weights={self.weights}: must have {{seed}} in it; other seeds are other weights")
        if self.pretrain is not None or "init_from" in self.finetune:
            raise ValueError(f"weights={self.weights}: leave out pretrain and finetune.init_from, they stand for both")

    @property
    def from_scratch(self) -> bool:
        """Whether it has no pretraining, and so no pretraining seeds."""
        return self.pretrain is None and self.weights is None


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A question: arms that are compared, under one or more settings."""

    question: str
    claim: str = ""  # what the paper says about it
    paper_value: float | None = None  # the number that the paper gives; null where it is not at hand
    arms: tuple[str, ...]
    reference_arm: str | None = None  # the one that others are compared with; null: the first
    # name -> keys that it changes; null takes away one of the recipe that is extended
    settings: dict[str, dict[str, Any] | None] = field(default_factory=lambda: {"": {}})
    reference_setting: str | None = None  # null: the first
    pool_settings: bool = False  # settings are folds: an arm's scores are those of all of them together
    config: dict[str, Any] = field(default_factory=dict)  # keys that hold in every setting
    pretrain_seeds: tuple[int, ...] | None = None  # null: the study's
    finetune_seeds: tuple[int, ...] | None = None  # null: the study's

    def __post_init__(self) -> None:
        if not self.arms or not self.points:
            raise ValueError("arms and settings: there must be at least one of each")
        if self.reference_arm is not None and self.reference_arm not in self.arms:
            raise ValueError(f"reference_arm={self.reference_arm}: must be one of arms={list(self.arms)}")
        if self.reference_setting is not None and self.reference_setting not in self.points:
            raise ValueError(f"reference_setting={self.reference_setting}: must be one of {list(self.points)}")
        for keys in (self.config, *self.points.values()):
            _check_stages(keys)

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        """The settings that are there."""
        return {name: keys for name, keys in self.settings.items() if keys is not None}


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The validation Dice whose first step is looked for: a number, or what an arm ends at on average."""

    dice: float | None = None
    arm: str | None = None

    def __post_init__(self) -> None:
        if (self.dice is None) == (self.arm is None):
            raise ValueError("target: give dice, or the arm whose final Dice is meant")


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """How intervals are drawn."""

    replicates: int = 2_000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        require_positive("bootstrap", replicates=self.replicates)
        if not 0 < self.level < 1:
            raise ValueError(f"bootstrap.level={self.level}: must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """`mimscale study`."""

    run_dir: Path  # of the study: nodes/ and report/ come into it
    title: str
    workers: int = 1  # nodes at work at once on this machine
    processes: int = 1  # of each training node, on a node of the machine
    only: tuple[str, ...] = ()  # experiments to run; empty: all
    data: dict[str, DataConfig]
    pretrain: StageConfig = field(default_factory=StageConfig)
    finetune: StageConfig
    evaluate: dict[str, Any] = field(default_factory=dict)
    reconstructions: bool = True  # score and draw the reconstructions of the first pretraining of each kind
    arms: dict[str, ArmConfig]
    may_differ: dict[str, str] = field(default_factory=dict)  # key of fine-tuning -> why arms may differ in it
    pretrain_seeds: tuple[int, ...] = (0,)
    finetune_seeds: tuple[int, ...] = (0,)
    experiments: dict[str, ExperimentConfig]
    target: TargetConfig
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    # Why pretraining may read volumes that others are validated or tested on, in words; null: it may not
    pretrain_on_validation: str | None = None
    caveat: str = ""  # what the numbers do not say; stands first in the report

    def __post_init__(self) -> None:
        require_positive("study", workers=self.workers, processes=self.processes)
        if not self.pretrain_seeds or not self.finetune_seeds:
            raise ValueError("pretrain_seeds and finetune_seeds: there must be at least one of each")
        if unknown := [name for name in self.only if name not in self.experiments]:
            raise ValueError(f"only={unknown}: no such experiment; there are {', '.join(self.experiments)}")
        for name, experiment in self.experiments.items():
            if unknown := [arm for arm in experiment.arms if arm not in self.arms]:
                raise ValueError(f"experiments.{name}.arms={unknown}: no such arm; there are {', '.join(self.arms)}")
        if self.target.arm is not None and self.target.arm not in self.arms:
            raise ValueError(f"target.arm={self.target.arm}: no such arm; there are {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            other = self.arms.get(arm.same_time_as) if arm.same_time_as is not None else None
            if arm.same_time_as is not None and (
                arm.pretrain is None or other is None or other.pretrain is None or other.same_time_as is not None
            ):
                raise ValueError(
                    f"arms.{name}.same_time_as={arm.same_time_as}: this arm and that one must both be pretrained, and "
                    "that one without same_time_as"
                )
            if unexplained := sorted(set(dotted_keys(arm.finetune)) - self.may_differ.keys()):
                raise ValueError(
                    f"arms.{name}.finetune: {', '.join(unexplained)} differ(s) from the plan of the other arms; say "
                    "why in may_differ, or put it where it holds for all of them"
                )
        if self.pretrain_on_validation is not None and len(self.pretrain_on_validation.split()) < 3:
            raise ValueError(
                f"pretrain_on_validation={self.pretrain_on_validation!r}: say in words why; it stands in the report"
            )


def _check_stages(keys: Iterable[str]) -> None:
    for key in keys:
        stage, _, rest = key.partition(".")
        if stage not in (*STAGES, "both") or not rest:
            raise ValueError(f"{key}: a varied key starts with {', '.join(STAGES)} or both, as in pretrain.mask.ratio")


def dotted_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The leaves of a config: `optim.lr`, ..."""
    keys = []
    for name, value in tree.items():
        keys += dotted_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Trees laid over each other, later ones on top."""
    result: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            below = result.get(name)
            if isinstance(below, dict) and isinstance(value, dict):
                result[name] = merged(below, value)
            else:
                result[name] = copy.deepcopy(value)
    return result


def load_study(words: Sequence[str]) -> StudyConfig:
    """The study of a command line `RECIPE key=value ...`. A recipe may name another that it `extends`.

    Raises:
        ConfigError: naming every mistake.
    """
    positional, overrides = split_arguments(words)
    if len(positional) != 1:
        raise ConfigError(f"expected one RECIPE and key=value overrides, got {positional}; see `mimscale recipes`")
    tree = _recipe_tree(positional[0], ())
    for override in overrides:
        apply_override(tree, override)
    return build_config(StudyConfig, tree, positional[0])


def _recipe_tree(recipe: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if recipe in seen:
        raise ConfigError(f"{recipe}: extends itself ({' -> '.join((*seen, recipe))})")
    tree = parse_yaml(recipe_text(recipe), recipe)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{recipe}: extends={base!r}: must be the name or path of a recipe")
    below: dict[str, Any] = _recipe_tree(base, (*seen, recipe))
    return merged(below, tree)
