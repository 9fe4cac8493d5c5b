"""`mimscale evaluate run_dir=DIR [store=STORE] [key=value ...]`: score a run on whole volumes of a split.

A fine-tuning run is scored on segmentation or on the targets of its table, a pretraining run on reconstruction; the
run's own config says which. Results go to run_dir/evaluate, or to `out`: scores.json, and cases.csv, predictions/,
slices/, targets/ or reconstructions/. The headline is the last checkpoint; with `best`, the one that was best on
validation is scored too, beside it.
"""

import shutil
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.config import config_tree, config_yaml, load_verb_config, verb_parser
from mimscale.console import print_json, print_table, say
from mimscale.errors import ConfigError, DataError
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.metrics import foreground_names
from mimscale.evaluate.target_results import table_rows
from mimscale.train.environment import this_commit

LIBRARIES = ("mimscale", "torch", "monai", "numpy")


def main(argv: list[str]) -> int:
    """The verb `evaluate`."""
    parser = verb_parser("evaluate", "Score a run on whole volumes: segmentation, targets or reconstruction.")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.add_argument("--check", action="store_true", help="print the resolved config and stop")
    arguments = parser.parse_args(argv)
    config = load_verb_config(EvaluateConfig, arguments.words, needs_recipe=False)
    if arguments.check:
        sys.stdout.write(config_yaml(config))
        return 0
    scores = evaluate(config)
    _show(scores)
    if arguments.json:
        shared = ("kind", "checkpoint", "step", "split", "seconds")
        keys = (*shared, "classes", "regions", "per_class", "mean", "best", "error", "baseline", "targets")
        print_json({key: scores[key] for key in keys if key in scores})
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a run and write its results; returns what scores.json holds.

    Raises:
        ConfigError: no run directory, a store that the weights were not made for, or a method without a prediction.
        CheckpointError: no usable checkpoint.
        DataError: a volume that cannot be read or has no label.
    """
    import numpy as np

    from mimscale.evaluate.checkpoints import find_best, find_checkpoint
    from mimscale.evaluate.reconstruction import evaluate_reconstruction
    from mimscale.evaluate.segmentation import best_column, cases_csv, evaluate_segmentation
    from mimscale.evaluate.targets import evaluate_targets
    from mimscale.evaluate.weights import check_contract, choose_device, cpu_threads, load_model
    from mimscale.models.reconstruction import Reconstructor
    from mimscale.store.layout import read_info
    from mimscale.store.manifest import load_manifest
    from mimscale.stream.select import parse_filter
    from mimscale.stream.subjects import in_split
    from mimscale.train.config import FinetuneConfig, PretrainConfig, load_run_config
    from mimscale.train.heads.targets import targets_of
    from mimscale.train.run_dir import RunDir

    started_s = time.perf_counter()
    run_config = load_run_config(config.run_dir)
    if isinstance(run_config, PretrainConfig) and run_config.target is None:
        raise ConfigError(
            f"{config.run_dir}: a run of method={run_config.method} predicts no voxels, so there is nothing to score; "
            "fine-tune it (init_from=RUN_DIR), or see val_cosine_views and val_cosine_crops in its metrics.jsonl"
        )
    if isinstance(run_config, PretrainConfig) and config.best:
        raise ConfigError(f"{config.run_dir}: best=true: is for fine-tuning runs, this one pretrains")
    run = RunDir(config.run_dir)
    best = find_best(run, run_config) if config.best else None
    store = config.store or run_config.store
    info, manifest = read_info(store), load_manifest(store)
    wanted = {"split": config.split}
    if run_config.modality is not None:
        wanted["modality"] = run_config.modality
    selected = manifest.equal(**wanted)
    if run_config.stream.fold is not None and store == run_config.store:
        wanted["stream.fold"] = run_config.stream.fold
        selected = in_split(manifest, config.split, run_config.stream)
        if run_config.modality is not None:
            selected &= manifest.equal(modality=run_config.modality)
    if run_config.stream.filter is not None:
        wanted["stream.filter"] = run_config.stream.filter
        selected &= parse_filter(run_config.stream.filter).select(manifest)
    if isinstance(run_config, PretrainConfig) and run_config.exclude_overlay is not None:
        wanted["exclude_overlay"] = run_config.exclude_overlay
        selected &= manifest.overlay_parts(run_config.exclude_overlay) >= 0
    indices = np.flatnonzero(selected)
    if not len(indices):
        raise DataError(f"{store}: no volume with {wanted}; see `mimscale inspect {store}` for what there is")
    tag = find_checkpoint(run, config.checkpoint)
    device = choose_device(config.device)
    channels = manifest.row(int(indices[0])).shape[0]
    model, contract = load_model(run_config, tag, channels, device)
    overlay = run_config.overlay if isinstance(run_config, FinetuneConfig) else None
    check_contract(contract, info, store, overlay)
    say(f"{run_config.kind} run {config.run_dir}, {tag.name}, {len(indices)} volumes of {store} on {device}")
    way_out = "free some space, then give the same command again; pictures=0 save_predictions=false need less"
    with cpu_threads(config.threads), durable.explained(DataError, config.folder, way_out):
        _clear(config.folder)
        data = (device, store, info, manifest, indices)
        if isinstance(run_config, FinetuneConfig) and not run_config.network.segments:
            networks = {"network": model}
            if best is not None:
                networks["network, best on validation"], _ = load_model(run_config, best.tag, channels, device)
            scores = evaluate_targets(
                config, run_config, targets_of(run_config), networks, contract, config.folder, *data
            )
            if best is not None:
                say(f"{best.tag.name} was best on validation: {best.metric} {best.value:.4f}")
                scores["best"] = {"checkpoint": best.tag.name, "metric": best.metric, "value": best.value}
        elif isinstance(run_config, FinetuneConfig):
            scores = evaluate_segmentation(config, run_config, model, *data)
            if best is not None:
                say(f"{best.tag.name} was best on validation: {best.metric} {best.value:.4f}")
                other = scores
                if best.tag != tag:
                    model, _ = load_model(run_config, best.tag, channels, device)
                    numbers_alone = replace(config, save_predictions=False, pictures=0, store_grid=False)
                    other = evaluate_segmentation(numbers_alone, run_config, model, *data)
                scores["best"] = best_column(best, other)
            durable.write_text(config.folder / "cases.csv", cases_csv(scores))
        else:
            assert isinstance(model, Reconstructor)
            scores = evaluate_reconstruction(config, run_config, model, device, store, manifest, indices)
        tree = {
            "kind": run_config.kind,
            "checkpoint": tag.name,
            "step": contract["step"],
            "split": config.split,
            "store": str(store),
            "settings": {**config_tree(config), "crop_voxels": list(run_config.crop_voxels)},
            **scores,
            "versions": {name: version(name) for name in LIBRARIES},
            "commit": this_commit() or None,
            "device": str(device),
            "seconds": round(time.perf_counter() - started_s, 2),
        }
        durable.write_json(config.folder / "scores.json", tree)
    say(f"scores: {config.folder / 'scores.json'} ({tree['seconds']:.0f} s)")
    return tree


def _clear(folder: Path) -> None:
    """Remove what an earlier evaluation wrote, so that no file of other weights stands beside new scores."""
    for name in ("scores.json", "cases.csv"):
        (folder / name).unlink(missing_ok=True)
    for name in ("predictions", "slices", "reconstructions", "targets"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _show(scores: dict[str, Any]) -> None:
    if scores["kind"] == "pretrain":
        rows = [
            [crop["volume"], str(crop["crop"]), _text(crop["network"]), _text(crop["baseline"])]
            for crop in scores["crops"]
        ]
        rows.append(["mean", "", _text(scores["mean"]["network"]), _text(scores["mean"]["baseline"])])
        title = f"{scores['error']} of hidden voxels; baseline: {scores['baseline']}"
        print_table(title, ["volume", "crop", "network", "baseline"], rows)
        return
    if "targets" in scores:
        for target in scores["targets"]:
            title = f"{target['name']}: {target['volumes']} {scores['split']} volumes with a value"
            print_table(title, *table_rows(target))
        return
    columns = ["class", "dice", "hd95 mm", "nsd", "cases", "no dice", "no hd95"]
    best = scores.get("best")
    columns += ["dice, best on validation"] if best else []
    with_surfaces = foreground_names(scores)
    rows = []
    for name, entry in scores["per_class"].items():
        dice, hd95, nsd = entry["dice"], entry["hd95_mm"], entry["nsd"]
        row = [name, _text(dice["mean"]), _text(hd95["mean"]), _text(nsd["mean"]), str(dice["cases"])]
        row += [str(dice["undefined"]), str(hd95["undefined"]) if name in with_surfaces else ""]
        rows.append(row + ([_text(best["per_class"][name]["dice"]["mean"])] if best else []))
    for key in ("without_background", "with_background"):
        mean = scores["mean"][key]
        row = [key.replace("_", " "), *(_text(mean[metric]) for metric in mean), "", "", ""]
        rows.append(row + ([_text(best["mean"][key]["dice"])] if best else []))
    print_table(f"{len(scores['cases'])} whole {scores['split']} volumes, source grid", columns, rows)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
