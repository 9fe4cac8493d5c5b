"""Targets of a store's volumes as a run learns them: standardised, weighted, and refused where nothing can be learned.

N volumes of the store | n training volumes | T targets | K classes of one
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import CheckpointError, DataError
from mimscale.models.contract import CONTRACT_FILE, read_contract
from mimscale.store.manifest import Manifest
from mimscale.targets.config import TargetsConfig
from mimscale.targets.table import Kind, Target, TargetTable, Volumes
from mimscale.train.committed import tags
from mimscale.train.run_dir import RunDir

SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What the training volumes say of a target, and what its outputs mean: it travels with the weights."""

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    training_volumes: tuple[int, ...] = ()  # of each class; of a number one count
    mean: float = 0.0  # of a number
    deviation: float = 1.0

    @property
    def shares(self) -> NDArray[np.float64]:
        """Of the classes among the training volumes: [K]."""
        counts = np.asarray(self.training_volumes, dtype=np.float64)
        shares: NDArray[np.float64] = counts / counts.sum()
        return shares


def read_values(config: TargetsConfig, manifest: Manifest, where: str) -> list[Target]:
    """The targets of all volumes of a store.

    Raises:
        DataError: as `TargetTable`.
    """
    volumes = Volumes(ids=manifest.column("id").tolist(), subjects=manifest.column("subject").tolist(), where=where)
    return TargetTable(config.table, config).match(volumes, config.classes)


def labelled(targets: Sequence[Target], num_volumes: int) -> NDArray[np.bool_]:
    """Which volumes have a value for which target: [N, T]."""
    present = np.zeros((num_volumes, len(targets)), dtype=bool)
    for number, target in enumerate(targets):
        present[target.rows, number] = True
    return present


def usable_volumes(
    config: TargetsConfig, present: NDArray[np.bool_], subjects: Sequence[str], indices: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Of some volumes those that have a value for any target.

    Args:
        config: says whether others may be there.
        present: [N, T].
        subjects: [N].
        indices: of the volumes.

    Raises:
        DataError: some have none, and nobody said that these are to be left out.
    """
    has_any = present[indices].any(axis=1)
    if has_any.all() or config.unlabelled == "skip":
        return indices[has_any]
    without = sorted({subjects[index] for index in indices[~has_any]})
    named = ", ".join(without[:SHOWN]) + (", ..." if without[SHOWN:] else "")
    raise DataError(
        f"{config.table}: {int((~has_any).sum())} of {len(indices)} volumes have no value in any of "
        f"{', '.join(config.columns)} (subject {named}); add them, leave them out with targets.unlabelled=skip, or "
        "choose volumes with stream.filter"
    )


def constants_of(
    config: TargetsConfig,
    targets: Sequence[Target],
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
) -> list[Constants]:
    """What the training volumes say of each target.

    Args:
        config: of the run.
        targets: of all volumes of the store.
        train: rows of the training volumes.
        validation: rows of the volumes that training is validated on.

    Raises:
        DataError: of one or more targets nothing can be learned; all are named.
    """
    constants, problems = [], []
    for target in targets:
        of_training, of_validation = np.isin(target.rows, train), np.isin(target.rows, validation)
        values = target.values[of_training]
        if not len(values):
            problems.append(
                f"target {target.name}: no training volume has a value (of {len(target.rows)} volumes that have one); "
                "look at their splits, stream.filter and stream.train_fraction"
            )
        elif target.kind == "regress":
            mean, deviation = float(values.mean()), float(values.std())
            if deviation <= 1e-12 * max(1.0, abs(mean)):
                problems.append(
                    f"target {target.name}: all {len(values)} training volumes have the value {mean:g}; nothing can "
                    "be told apart"
                )
            constants.append(
                Constants(
                    name=target.name,
                    kind="regress",
                    training_volumes=(len(values),),
                    mean=mean,
                    deviation=deviation,
                )
            )
        else:
            counts = np.bincount(values, minlength=len(target.classes))
            problems += [
                f"target {target.name}: class {target.classes[number]!r} has no training volume, "
                f"{int((target.values[of_validation] == number).sum())} in validation and "
                f"{int((target.values == number).sum())} in the store; leave its cells empty, merge it with another "
                "class, or let a subject of it train"
                for number in np.flatnonzero(counts == 0)
            ]
            constants.append(
                Constants(
                    name=target.name,
                    kind="classify",
                    classes=target.classes,
                    training_volumes=tuple(counts.tolist()),
                )
            )
    if problems:
        raise DataError("\n".join([f"{config.table}: {len(problems)} problem(s)", *problems]))
    return constants


def saved_constants(run: RunDir) -> list[Constants] | None:
    """Those that stand with the weights of a run that has saved: what its outputs mean does not change any more.

    A contract that cannot be read is passed over here; whoever restores the checkpoint says what is wrong with it.
    """
    for tag in tags(run):
        with suppress(CheckpointError):
            said = read_contract(tag / CONTRACT_FILE).get("targets")
            if said is not None:
                return constants_from(said)
    return None


def constants_from(said: dict[str, Any]) -> list[Constants]:
    """What a contract says of its targets."""
    return [
        Constants(
            name=one["name"],
            kind=one["kind"],
            classes=tuple(one["classes"]),
            training_volumes=tuple(one["training_volumes"]),
            mean=one["mean"],
            deviation=one["deviation"],
        )
        for one in said["outputs"]
    ]


@dataclass(frozen=True)
class Expected:
    """What the network should say of some volumes."""

    values: NDArray[np.float32]  # [N, T] numbers of classes, numbers in standard deviations, 0 where there is none
    present: NDArray[np.bool_]  # [N, T]
    weights: NDArray[np.float32]  # [N, T] of a sample in its target's loss: 1, by class where classes are balanced


def expected_values(
    config: TargetsConfig, targets: Sequence[Target], constants: Sequence[Constants], num_volumes: int
) -> Expected:
    """The targets of all volumes of a store, as numbers that a loss takes."""
    values = np.zeros((num_volumes, len(targets)), dtype=np.float32)
    weights = np.ones_like(values)
    for number, (target, known) in enumerate(zip(targets, constants, strict=True)):
        values[target.rows, number] = target.values
        if target.kind == "regress":
            values[target.rows, number] = (target.values - known.mean) / known.deviation
        elif config.class_weights == "balanced":
            # Their mean over the training volumes is 1, so that the loss stays as large as it was.
            weights[target.rows, number] = (1 / (len(target.classes) * known.shares))[target.values]
    return Expected(values, labelled(targets, num_volumes), weights)
