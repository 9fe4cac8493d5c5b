"""Whole volumes of a split through a network that predicts targets: means over windows and over volumes, scores.

B windows | K outputs of the network | N volumes | S subjects | C classes of a target
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale import durable
from mimscale.console import say, track
from mimscale.errors import CheckpointError, DataError
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.target_results import Scored, entry_of, subjects_csv, volumes_csv
from mimscale.evaluate.whole import AXES
from mimscale.evaluate.windowed import Source, Windowed, batches_of_windows, loaded_ahead, refuse_other_spacing
from mimscale.evaluate.windows import sliding_origins
from mimscale.store.layout import StoreInfo
from mimscale.store.manifest import Manifest
from mimscale.targets.config import TargetsConfig
from mimscale.targets.results import plain_name
from mimscale.targets.table import Target, TargetTable, Volumes
from mimscale.train.config import FinetuneConfig
from mimscale.train.target_losses import Task, tasks_of
from mimscale.train.target_values import Constants, constants_from

FOLDER = "targets"  # of the CSV files, below that of the results


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A network that predicts targets."""

    model: nn.Module  # on `device`, in eval mode
    device: torch.device
    tasks: Sequence[Task]
    constants: Sequence[Constants]
    flips: Sequence[int]  # axes of a window

    @torch.inference_mode()
    def answers(self, windows: Tensor) -> list[NDArray[np.float64]]:
        """[B, C, Z, Y, X] -> of each target probabilities [B, C], or numbers in its unit [B, 1].

        Raises:
            FloatingPointError: the network answered with a number that is not finite.
        """
        mirrored = [axes for count in range(len(self.flips) + 1) for axes in itertools.combinations(self.flips, count)]
        totals: list[Tensor] = []
        for axes in mirrored:
            outputs = self.model(windows.to(self.device).flip([axis + 2 for axis in axes])).double().cpu()  # [B, K]
            if not bool(torch.isfinite(outputs).all()):
                raise FloatingPointError("the network answered with numbers that are not finite")
            answers = [self._meant(outputs[:, task.outputs], number) for number, task in enumerate(self.tasks)]
            totals = [total + one for total, one in zip(totals, answers, strict=True)] if totals else answers
        return [(total / len(mirrored)).numpy() for total in totals]

    def _meant(self, own: Tensor, number: int) -> Tensor:
        known = self.constants[number]
        return own.softmax(dim=1) if self.tasks[number].classes else own * known.deviation + known.mean


def evaluate_targets(
    config: EvaluateConfig,
    run_config: FinetuneConfig,
    targets: TargetsConfig,
    networks: Mapping[str, nn.Module],
    contract: dict[str, Any],
    folder: Path,
    device: torch.device,
    store: Path,
    info: StoreInfo,
    manifest: Manifest,
    indices: NDArray[np.int64],
) -> dict[str, Any]:
    """Score networks on the volumes in rows `indices`; the part of scores.json that belongs to targets.

    Args:
        config: of the evaluation.
        run_config: of the run.
        targets: what the run was told of its table.
        networks: what results call them -> model; the first is the one whose predictions are written.
        contract: of its weights.
        folder: for results.
        device: where the models are.
        store: of the volumes.
        info: of the store.
        manifest: of the store.
        indices: [N].

    Raises:
        DataError: a table that does not have what the run predicts, or a volume that cannot be read.
        CheckpointError: weights without targets, or a network that answers with numbers that are not finite.
        ConfigError: voxels of another size than those that the run was trained on.
    """
    if not contract.get("targets"):
        raise CheckpointError(f"{config.run_dir}: the contract of its weights names no targets; train it again")
    own = config.targets
    constants = constants_from(contract["targets"])
    found = _read(config, targets, manifest, store, indices)
    target_mm = run_config.stream.target_spacing_mm
    if target_mm is None:
        max_ratio = run_config.stream.max_spacing_ratio
        refuse_other_spacing(manifest, indices, store, contract.get("spacing_mm"), max_ratio)
    source = Source(
        store=store,
        manifest=manifest,
        intensity=info.intensity,
        crop_voxels=run_config.crop_voxels,
        target_mm=target_mm,
        region=own.region,
    )
    tasks = tasks_of([(one.name, one.classes) for one in constants])
    flips = [AXES.index(axis) for axis in config.flips]
    ready = {
        name: _Network(model=model, device=device, tasks=tasks, constants=constants, flips=flips)
        for name, model in networks.items()
    }
    predicted, windows = _predict(config, source, ready, indices.tolist())
    ids, subjects = (manifest.column(name)[indices].astype(str) for name in ("id", "subject"))
    entries = []
    for number, (target, known) in enumerate(zip(found, constants, strict=True)):
        said = {name: answers[number] for name, answers in predicted.items()}
        scored = Scored(target=target, constants=known, ids=ids, subjects=subjects, windows=windows, predicted=said)
        entry = entry_of(scored, own)
        for unit, text in (("volumes", volumes_csv(scored)), ("subjects", subjects_csv(scored))):
            entry[f"{unit}_file"] = f"{FOLDER}/{unit}_{plain_name(number, target.name)}.csv"
            durable.write_text(folder / entry[f"{unit}_file"], text)
        entries.append(entry)
    return {
        "targets": entries,
        "volumes": len(indices),
        "intervals": f"{own.level:g}, percentiles of {own.replicates} bootstrap draws of subjects",
        "calibration": f"of the likeliest class, {own.bins} equally wide bins",
    }


def _read(
    config: EvaluateConfig, targets: TargetsConfig, manifest: Manifest, store: Path, indices: NDArray[np.int64]
) -> list[Target]:
    """The truth: rows are places among `indices`."""
    other = {
        name: value
        for name in ("table", "key", "journal", "unmatched")
        if (value := getattr(config.targets, name)) is not None
    }
    asked = replace(targets, **other)
    volumes = Volumes(
        ids=manifest.column("id").tolist(), subjects=manifest.column("subject").tolist(), where=str(store)
    )
    found = TargetTable(asked.table, asked).match(volumes, asked.classes, rows=indices)
    if not any(len(target.rows) for target in found):
        raise DataError(
            f"{asked.table}: says nothing of the {len(indices)} {config.split} volumes of {store} in "
            f"{', '.join(asked.columns)}; give another split=, or targets.table=FILE with their values"
        )
    for target in found:
        if not len(target.rows):
            say(f"target {target.name}: none of the {len(indices)} volumes has a value, so it gets no score")
    return [replace(target, rows=np.searchsorted(indices, target.rows)) for target in found]


def _predict(
    config: EvaluateConfig, source: Source, networks: Mapping[str, _Network], indices: Sequence[int]
) -> tuple[dict[str, list[NDArray[np.float64]]], list[int]]:
    """Network -> of each target its predictions [N, ...], and the number of windows of each volume [N]."""
    answers: dict[str, list[list[NDArray[np.float64]]]] = {name: [] for name in networks}
    counts = []
    volumes = track(loaded_ahead(source, indices), f"evaluate {len(indices)} volumes", len(indices))
    for row, load in volumes:
        loaded = load()
        origins = sliding_origins(loaded.start, loaded.stop, source.crop_voxels, config.overlap)
        counts.append(len(origins))
        for name, network in networks.items():
            try:
                answers[name].append(_of_volume(network, loaded, origins, source, config.batch))
            except FloatingPointError as error:
                raise CheckpointError(
                    f"{config.run_dir}: volume {row.id}: {error}; evaluate an earlier checkpoint=step_..."
                ) from None
    stacked = {name: [np.stack(each) for each in zip(*of_volumes, strict=True)] for name, of_volumes in answers.items()}
    return stacked, counts


def _of_volume(
    network: _Network, loaded: Windowed, origins: Sequence[tuple[int, int, int]], source: Source, batch: int
) -> list[NDArray[np.float64]]:
    """The mean over windows: of each target probabilities [C], or a number [1]."""
    parts = [
        network.answers(windows) for windows in batches_of_windows(loaded.voxels, origins, source.crop_voxels, batch)
    ]
    return [np.concatenate(each).mean(axis=0) for each in zip(*parts, strict=True)]
