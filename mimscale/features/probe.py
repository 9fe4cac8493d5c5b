"""`mimscale probe features=DIR targets=TABLE`: what frozen features can tell of a table of targets.

Each target by nearest neighbours and logistic regression, or by ridge regression, beside a predictor that sees no
feature and, with `controls`, beside the same probes on features of other weights. Results go to out: results.json,
table.csv, and a CSV with each case's prediction for each target.

    N volumes | n of them with a target
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.config import config_tree, config_yaml, load_verb_config, verb_parser
from mimscale.console import print_json, print_table, say
from mimscale.errors import ConfigError, DataError
from mimscale.features.config import ProbeConfig
from mimscale.features.folds import Fold, cross_folds, split_folds
from mimscale.features.layout import Features, read_features
from mimscale.features.probes import BASELINE, OF_KIND, Answer, Cases, Name, answer
from mimscale.features.results import cases_csv, cases_name, table_csv, table_rows
from mimscale.targets.scores import COMPARED, Drawn, drawn_scores
from mimscale.targets.table import Target, TargetTable, Volumes

LIBRARIES = ("mimscale", "scikit-learn", "numpy")
# Must be the same for features that are compared: the weights alone differ.
SHARED = ("store_sha256", "ids_sha256", "crop_voxels", "target_spacing_mm", "settings")
FREE_SETTINGS = ("weights", "seed", "windows", "tokens", "tokens_as", "part_volumes", "max_spacing_ratio")


def main(argv: list[str]) -> int:
    """The verb `probe`."""
    parser = verb_parser("probe", "Nearest neighbours, logistic and ridge regression on frozen features.")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    arguments = parser.parse_intermixed_args(argv)
    config = load_verb_config(ProbeConfig, arguments.words, needs_recipe=False)
    if arguments.check:
        sys.stdout.write(config_yaml(config))
        return 0
    results = probe(config)
    for target in results["targets"]:
        columns, rows = table_rows(target)
        print_table(f"{target['name']}: {target['cases']} cases of {target['subjects']} subjects", columns, rows)
    if arguments.json:
        print_json(results)
    return 0


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Probe all targets and write the results; returns what results.json holds.

    Raises:
        ConfigError: scikit-learn is not installed, or controls that are no features of the same volumes.
        DataError: features or a table that cannot be used; the problems of all targets are named at once.
    """
    try:
        import sklearn
    except ImportError:
        raise ConfigError("scikit-learn, which fits probes, is not installed: pip install 'mimscale[probe]'") from None
    assert sklearn.__version__, "imported to know that it is there"
    features = read_features(config.features)
    sets = _named([features, *(_control(path, features) for path in config.controls)])
    volumes = Volumes(ids=features.ids, subjects=features.subjects, where=str(features.folder))
    targets = TargetTable(config.targets, config).match(volumes)
    folds = _all_folds(config, targets, features)
    out = config.out or config.features / "probe"
    tree: dict[str, Any] = {
        "features": [_said(one) for one in sets],
        "settings": config_tree(config),
        "split": f"{config.folds} folds" if config.folds else f"{config.train_split} -> {config.test_split}",
        "intervals": f"{config.level:g}, percentiles of {config.replicates} bootstrap draws of subjects",
        "calibration": f"of the likeliest class, {config.bins} equally wide bins",
        "targets": [],
        "versions": {name: version(name) for name in LIBRARIES},
    }
    with durable.explained(DataError, out, "free some space or choose another out"):
        for number, target in enumerate(targets):
            say(f"{target.name}: {len(target.rows)} volumes, {target.missing} without a value")
            rows = _rows(config, target, folds[target.name], sets)
            entry = _entry(config, target, folds[target.name], rows, features)
            entry["cases_file"] = cases_name(number, target.name)
            durable.write_text(out / entry["cases_file"], cases_csv(target, rows, features))
            tree["targets"].append(entry)
        durable.write_text(out / "table.csv", table_csv(tree["targets"]))
        durable.write_json(out / "results.json", tree)
    say(f"results: {out / 'results.json'}")
    return tree


@dataclass(frozen=True, kw_only=True)
class Row:
    """One probe on one set of features, or the predictor that sees none."""

    features: str
    probe: Name
    predicted: NDArray[np.float64]  # of the tested cases: [m, K] probabilities or [m] numbers
    cases: NDArray[np.int64]  # [m] of the target
    fold: NDArray[np.int64]  # [m]
    chosen: list[float | None]  # of each fold
    converged: bool
    scores: dict[str, Drawn]


def _control(path: Path, features: Features) -> Features:
    """Features to compare with.

    Raises:
        ConfigError: they are of other volumes or other settings, and not of other weights alone.
    """
    other = read_features(path)
    differing = [key for key in SHARED if _comparable(other.contract, key) != _comparable(features.contract, key)]
    if differing or other.ids != features.ids:
        raise ConfigError(
            f"controls: {path} differs from {features.folder} in {', '.join(differing) or 'its volumes'}, so a "
            "difference would not be the weights' alone; extract it with the same settings and weights=random"
        )
    if other.contract["encoder_sha256"] == features.contract["encoder_sha256"]:
        raise ConfigError(f"controls: {path} holds the features of the same weights; extract it with weights=random")
    return other


def _named(sets: Sequence[Features]) -> list[Features]:
    """The same with names that differ: two runs that were both trained are told apart by their folders."""
    names = [one.name for one in sets]
    return [
        one if names.count(one.name) == 1 else replace(one, name=f"{one.name} ({one.folder.name or one.folder})")
        for one in sets
    ]


def _comparable(contract: dict[str, Any], key: str) -> Any:
    value = contract.get(key)
    if key != "settings" or not isinstance(value, dict):
        return value
    # Random crops are drawn from the seed, which otherwise belongs to the weights.
    free = [name for name in FREE_SETTINGS if name != "seed" or value.get("crops") is None]
    return {name: setting for name, setting in value.items() if name not in free}


def _said(features: Features) -> dict[str, Any]:
    keys = ("run", "checkpoint", "step", "weights", "encoder_sha256", "store", "store_sha256", "dim", "settings")
    return {"folder": str(features.folder), **{key: features.contract.get(key) for key in keys}}


def _all_folds(config: ProbeConfig, targets: Sequence[Target], features: Features) -> dict[str, list[Fold]]:
    """Target -> its folds.

    Raises:
        DataError: of one or more targets there are none; all are named.
    """
    folds: dict[str, list[Fold]] = {}
    problems = []
    for target in targets:
        subjects = [features.subjects[row] for row in target.rows]
        try:
            if len(target.classes) == 1:
                raise DataError(
                    f"target {target.name}: all {len(target.rows)} cases are of class {target.classes[0]!r}; nothing "
                    "can be told apart"
                )
            if config.folds is None:
                splits = [features.splits[row] for row in target.rows]
                found = split_folds(target, splits, subjects, config.train_split, config.test_split)
            else:
                found = cross_folds(target, subjects, config.folds, config.seed)
            folds[target.name] = found
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join([f"{config.targets}: {len(problems)} target(s) cannot be probed", *problems]))
    return folds


def _rows(config: ProbeConfig, target: Target, folds: Sequence[Fold], sets: Sequence[Features]) -> list[Row]:
    """The main features first, then the controls, at last the predictor that sees none."""
    rows = [_row(config, target, folds, one, name) for one in sets for name in OF_KIND[target.kind]]
    return [*rows, replace(_row(config, target, folds, sets[0], BASELINE[target.kind]), features="none")]


def _row(config: ProbeConfig, target: Target, folds: Sequence[Fold], features: Features, name: Name) -> Row:
    vectors = features.vectors[target.rows].astype(np.float64)  # [n, D]
    subjects = np.array([features.subjects[row] for row in target.rows])
    answers: list[Answer] = []
    for fold in folds:
        train = Cases(
            vectors=vectors[fold.train],
            values=target.values[fold.train],
            subjects=subjects[fold.train],
            num_classes=len(target.classes),
        )
        answers.append(answer(name, train, vectors[fold.test], config))
    cases = np.concatenate([fold.test for fold in folds])
    number = np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])  # of each case's fold
    predicted = np.concatenate([one.predicted for one in answers])
    truth = target.values[cases]
    tested = subjects[cases].tolist()
    return Row(
        features=features.name,
        probe=name,
        predicted=predicted,
        cases=cases,
        fold=number,
        chosen=[one.chosen for one in answers],
        converged=all(one.converged for one in answers),
        scores=drawn_scores(
            target.kind,
            predicted,
            truth,
            tested,
            bins=config.bins,
            replicates=config.replicates,
            seed=config.seed,
            fold=number,
        ),
    )


def _entry(
    config: ProbeConfig, target: Target, folds: Sequence[Fold], rows: Sequence[Row], features: Features
) -> dict[str, Any]:
    """What results.json says of a target."""
    tested = np.concatenate([fold.test for fold in folds])
    main = [row for row in rows if row.features == rows[0].features]
    return {
        "name": target.name,
        "kind": target.kind,
        "classes": {name: int((target.values[tested] == number).sum()) for number, name in enumerate(target.classes)},
        "cases": len(tested),
        "subjects": len({features.subjects[target.rows[case]] for case in tested}),
        "training_cases": [len(fold.train) for fold in folds],
        "missing": target.missing,
        "not_listed": target.not_listed,
        "rows": [
            {
                "features": row.features,
                "probe": row.probe,
                "chosen": row.chosen,
                "converged": row.converged,
                "scores": {name: asdict(score.interval(config.level)) for name, score in row.scores.items()},
            }
            for row in rows
        ],
        # Of the same draws of subjects, so it is far surer than two intervals side by side say.
        "differences": [
            {
                "probe": row.probe,
                "features": row.features,
                "minus": {"features": other.features, "probe": other.probe},
                "scores": {
                    name: asdict(row.scores[name].minus(other.scores[name], config.level))
                    for name in COMPARED[target.kind]
                },
            }
            for row in main
            for other in rows
            if other.features != row.features and other.probe in (row.probe, BASELINE[target.kind])
        ],
    }
