"""Whole volumes of a split through a fine-tuned network: scores, predictions on the source grid, slices for the report.

C channels | K outputs | Z Y X volume, voxels | x y z source file, voxels
"""

import csv
import io
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mimscale.console import track
from mimscale.errors import CheckpointError, DataError
from mimscale.evaluate.checkpoints import BestCheckpoint
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.metrics import METRICS, ClassScore, mean_over_classes, means_per_class
from mimscale.evaluate.outputs import Classes, outputs_of
from mimscale.evaluate.planes import Normalised
from mimscale.evaluate.slices import centre_of, cut_planes, grey_levels, save_planes
from mimscale.evaluate.volumes import read_source_labels, source_spacing_mm, write_nifti
from mimscale.evaluate.whole import Network, batches_of, normalised_for, segment, turned_to_source
from mimscale.ingest.geometry import to_source_grid
from mimscale.ingest.placement import Placement
from mimscale.store.intensity import normalisation
from mimscale.store.layout import StoreInfo
from mimscale.store.manifest import Manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import VolumeRow
from mimscale.train.committed import step_of
from mimscale.train.config import FinetuneConfig

DISK_WAY_OUT = "free some space, or evaluate with save_predictions=false"


def evaluate_segmentation(
    config: EvaluateConfig,
    run_config: FinetuneConfig,
    model: nn.Module,
    device: torch.device,
    store: Path,
    info: StoreInfo,
    manifest: Manifest,
    indices: NDArray[np.int64],
) -> dict[str, Any]:
    """Score `model` on the volumes in rows `indices`; the part of scores.json that belongs to segmentation.

    Raises:
        DataError: a volume without label, or one that cannot be read.
        CheckpointError: the network answers with numbers that are not finite.
    """
    outputs = outputs_of(run_config, info.overlays[run_config.overlay].class_names)
    rows = labelled_rows(config, run_config.overlay, manifest, indices)
    reader = ShardReader(store, manifest)
    folder = config.folder
    network = Network(
        model=model,
        device=device,
        crop_voxels=run_config.crop_voxels,
        target_mm=run_config.stream.target_spacing_mm,
    )
    total = sum(batches_of([network], row.shape[1:], row.spacing_mm, config) for row in rows)
    ticks = track(range(total), f"evaluate {len(rows)} volumes, batches of windows", total)
    cases: list[dict[str, Any]] = []
    source_scores: list[dict[str, ClassScore]] = []
    store_scores: list[dict[str, ClassScore]] = []
    for number, row in enumerate(rows):
        started_s = time.perf_counter()
        numbers = normalisation(info.intensity, row.stats)
        raw = reader.read_volume(row)
        image = normalised_for([network], raw, row.spacing_mm, row.fill_value, numbers)
        try:
            prediction, turned = segment(
                [network],
                image,
                row.spacing_mm,
                Placement.of_row(row),
                outputs,
                config,
                after_batch=lambda: next(ticks, None),
            )
        except FloatingPointError as error:
            raise CheckpointError(
                f"{config.run_dir}: volume {row.id}: {error}; evaluate an earlier checkpoint=step_..."
            ) from None
        predicted_s = time.perf_counter() - started_s
        on_source = turned_to_source(turned, row.source_orientation)
        truth = reader.read(row, (0, 0, 0), row.shape[1:], overlay=run_config.overlay)[0]
        source_truth = to_source_grid(read_source_labels(reader, row, run_config.overlay), row)
        source_scores.append(outputs.score(on_source, source_truth, source_spacing_mm(row), config.nsd_tolerance_mm))
        if config.store_grid:
            # Mostly the store's grid is the source's, turned: the same surfaces, which would only take as long again.
            store_scores.append(outputs.score(prediction, truth, row.spacing_mm, None))
        case: dict[str, Any] = {"volume": row.id, "subject": row.subject, "shape_zyx": list(row.shape[1:])}
        if config.save_predictions:
            files = outputs.files(row.id, on_source)
            case["predictions"] = [f"predictions/{path}" for path in files]
            for path, voxels in files.items():
                write_nifti(folder / "predictions" / path, voxels, row.source_affine, DISK_WAY_OUT)
        if number < config.pictures:
            case["slices"] = f"slices/{row.id}.npz"
            drawn = outputs.truth_drawn(truth), outputs.drawn(prediction)
            seen = Normalised(raw[:1], row.fill_value, numbers[:1], (0, 0, 0)).planes(0, row.shape[1])[0].numpy()
            _save_slices(folder / case["slices"], seen, *drawn, row)
        case["scores"] = {name: asdict(score) for name, score in source_scores[-1].items()}
        if config.store_grid:
            case["store_grid_scores"] = {name: asdict(score) for name, score in store_scores[-1].items()}
        case["predict_s"] = round(predicted_s, 3)
        case["total_s"] = round(time.perf_counter() - started_s, 3)
        cases.append(case)
    next(ticks, None)  # lets the progress bar end
    has_background = isinstance(outputs, Classes)
    return {
        "classes": outputs.names,
        "regions": run_config.regions,
        **_means(source_scores, has_background),
        "store_grid": _means(store_scores, has_background) if config.store_grid else None,
        "cases": cases,
    }


def labelled_rows(
    config: EvaluateConfig, overlay: str, manifest: Manifest, indices: NDArray[np.int64]
) -> list[VolumeRow]:
    """The volumes to score: all of `indices`, or those with a label when the others may be skipped.

    Raises:
        DataError: a volume has no label and may not be skipped, or none has one.
    """
    rows = [manifest.row(int(index)) for index in indices]
    labelled = [row for row in rows if overlay in row.overlays]
    bare = [row.id for row in rows if overlay not in row.overlays]
    if not labelled:
        raise DataError(
            f"{config.store}: none of the {len(rows)} volumes of split={config.split} has overlay {overlay!r}; "
            "choose another split, or ingest them with labels"
        )
    if bare and config.unlabelled == "refuse":
        raise DataError(
            f"{config.store}: {len(bare)} of {len(rows)} volumes of split={config.split} have no overlay {overlay!r}: "
            f"{', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}; leave them out with unlabelled=skip"
        )
    return labelled


def best_column(best: BestCheckpoint, scores: dict[str, Any]) -> dict[str, Any]:
    """What scores.json says of the checkpoint that was best on validation, from what scoring it gave."""
    return {
        "checkpoint": best.tag.name,
        "step": step_of(best.tag),
        "metric": best.metric,
        "value": best.value,
        "per_class": scores["per_class"],
        "mean": scores["mean"],
        "cases": [{key: case[key] for key in ("volume", "subject", "scores")} for case in scores["cases"]],
    }


def cases_csv(scores: dict[str, Any]) -> str:
    """One line a volume and class or region; a score that is not defined is an empty cell."""
    cases, best = scores["cases"], scores.get("best")
    columns = ["volume", "class", "truth_voxels", "predicted_voxels", *METRICS]
    columns += ["store_grid_dice"] if "store_grid_scores" in cases[0] else []
    columns += [f"best_{metric}" for metric in METRICS] if best else []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for number, case in enumerate(cases):
        for name, score in case["scores"].items():
            line = {"volume": case["volume"], "class": name}
            line |= {key: score[key] for key in ("truth_voxels", "predicted_voxels")}
            line |= {metric: score[metric] for metric in METRICS}
            if "store_grid_scores" in case:
                line["store_grid_dice"] = case["store_grid_scores"][name]["dice"]
            if best:
                line |= {f"best_{metric}": best["cases"][number]["scores"][name][metric] for metric in METRICS}
            writer.writerow(line)
    return text.getvalue()


def _means(scores: list[dict[str, ClassScore]], has_background: bool) -> dict[str, Any]:
    per_class = means_per_class(scores)
    means = {counted: mean_over_classes(per_class, background=counted) for counted in (False, True)}
    return {
        "per_class": {
            name: {metric: asdict(mean) for metric, mean in entry.items()} for name, entry in per_class.items()
        },
        "mean": {
            # Of regions none is the background.
            "without_background": means[not has_background],
            "with_background": means[True] if has_background else dict.fromkeys(METRICS),
        },
    }


def _save_slices(
    path: Path, image: NDArray[np.float32], truth: NDArray[Any], prediction: NDArray[np.uint8], row: VolumeRow
) -> None:
    low, high = np.percentile(image, [0.5, 99.5])
    layers = {"image": grey_levels(image, low, high), "truth": truth, "prediction": prediction}
    # Where there is something to segment, or else the middle.
    centre = centre_of((truth > 0) & (truth != 255))
    save_planes(path, cut_planes(layers, centre, row.spacing_mm))
