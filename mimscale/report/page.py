"""Facts of runs -> the plain tree that `page.html` shows, and the page itself. All formatting happens here."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mimscale.evaluate.metrics import foreground_names
from mimscale.evaluate.slices import cut_planes, grey_levels, load_planes
from mimscale.report.charts import dice_chart, loss_chart, throughput_chart, yardstick_chart
from mimscale.report.data import StoreFacts
from mimscale.report.facts import WARM_UP_STEPS, RunFacts
from mimscale.report.pictures import legend, reconstruction_picture, segmentation_picture
from mimscale.report.targets import target_tiles, targets_view
from mimscale.train.method import predicts_voxels, segments

NOTHING = "n/a"


def number(value: float | None, digits: int = 3) -> str:
    """A number for the page; what is not there is said to be so."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def spread(mean: dict[str, Any], digits: int = 3) -> str:
    """Mean +/- standard deviation."""
    if mean["mean"] is None or mean["std"] is None:
        return number(mean["mean"], digits)
    return f"{number(mean['mean'], digits)} +/- {number(mean['std'], digits)}"


def percent(value: float | None) -> str:
    """A percentage for the page."""
    return NOTHING if value is None else f"{value:.1f} %"


def write_page(runs: Sequence[RunFacts], stores: Sequence[StoreFacts], folder: Path, footer: str) -> dict[str, Any]:
    """Write charts and pictures into `folder`; the tree for `render`."""
    pretrain = [run for run in runs if run.kind == "pretrain"]
    finetune = [run for run in runs if run.kind == "finetune" and segments(run.config)]
    of_targets = [run for run in runs if run.kind == "finetune" and not segments(run.config)]
    origins = {volume.id: volume.origin for store in stores for volume in store.volumes}
    return {
        "title": "mimscale report: " + ", ".join(run.name for run in runs),
        "subtitle": _subtitle(pretrain, [*finetune, *of_targets]),
        "tiles": [*_tiles(pretrain, finetune), *target_tiles(of_targets)],
        "warm_up_steps": WARM_UP_STEPS,
        "runs": [_run_row(run) for run in runs],
        "stores": [store.view() for store in stores],
        "pretrain": _pretrain_view(pretrain, origins, folder) if pretrain else None,
        "finetune": _finetune_view(finetune, origins, folder) if finetune else None,
        "targets": targets_view(of_targets, _loss_chart(of_targets, folder / "targets_loss.png"))
        if of_targets
        else None,
        "throughput": _throughput_view(runs, folder),
        "jobs": [{"run": run.name, **job} for run in runs for job in run.jobs],
        "versions": _versions(runs),
        "footer": footer,
    }


def render(view: dict[str, Any]) -> str:
    """The HTML page."""
    from jinja2 import Environment, StrictUndefined

    template, style = ((resources.files("mimscale.report") / name).read_text() for name in ("page.html", "style.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(view | {"style": style})


def _subtitle(pretrain: Sequence[RunFacts], finetune: Sequence[RunFacts]) -> str:
    parts = [f"{len(pretrain)} pretraining"] if pretrain else []
    parts += [f"{len(finetune)} fine-tuning"] if finetune else []
    return " and ".join(parts) + f" run{'s' if len(pretrain) + len(finetune) > 1 else ''}"


def _tiles(pretrain: Sequence[RunFacts], finetune: Sequence[RunFacts]) -> list[dict[str, str]]:
    tiles = []
    for run in pretrain:
        if run.scores and run.scores["mean"]["network"] is not None:
            mean = run.scores["mean"]
            tiles.append(
                {
                    "value": f"{number(mean['network'])} vs {number(mean['baseline'])}",
                    "label": f"{run.name}: {run.scores['error']} of hidden voxels, network vs {run.scores['baseline']}",
                }
            )
    for run in finetune:
        if run.scores:
            value = run.scores["mean"]["without_background"]["dice"]
            tiles.append(
                {
                    "value": number(value),
                    "label": f"{run.name}: Dice without background, {len(run.scores['cases'])} whole volume(s)",
                }
            )
    return tiles


def _run_row(run: RunFacts) -> dict[str, Any]:
    return {
        "name": run.name,
        "kind": run.kind,
        "state": run.state,
        "message": run.outcome.message if run.outcome and run.state != "finished" else "",
        "last_step": run.last_step,
        "steps": run.config["steps"],
        "loss": number(run.last("loss"), 4),
        "val_loss": number(run.last("val_loss"), 4),
        "samples_per_s": number(run.percentile("samples_per_s", 50), 2),
        "data_wait": percent(run.data_wait_percent),
        "substituted": run.substituted,
        "health": _health(run),
        "config_text": run.config_text,
        "environment_text": yaml.safe_dump(run.environment, sort_keys=True) if run.environment else "",
    }


def _pretrain_view(runs: Sequence[RunFacts], origins: dict[str, str | None], folder: Path) -> dict[str, Any]:
    return {
        "losses": _loss_chart(runs, folder / "pretrain_loss.png"),
        "yardsticks": _yardstick_chart(runs, folder / "pretrain_yardsticks.png"),
        "runs": [
            {
                "name": run.name,
                "path": run.run.path,
                "reconstructs": predicts_voxels(run.config),
                "reconstruction": _reconstruction(run.scores) if run.scores else None,
                "pictures": reconstruction_pictures(run, origins, folder),
            }
            for run in runs
        ],
    }


def _reconstruction(scores: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "volume": crop["volume"],
            "crop": crop["crop"],
            "hidden": crop["hidden_voxels"],
            "network": number(crop["network"], 4),
            "baseline": number(crop["baseline"], 4),
            "ratio": number(crop["network"] / crop["baseline"] if crop["baseline"] else None, 3),
        }
        for crop in scores["crops"]
    ]
    mean = scores["mean"]
    return {
        "sentence": (
            f"Checkpoint {scores['checkpoint']}, {scores['split']} volumes, fixed crops and masks. Error: "
            f"{scores['error']} over hidden voxels, {scores['unit']}. Beside it the error of {scores['baseline']}."
        ),
        "rows": rows,
        "count": len(rows),
        "network": number(mean["network"], 4),
        "baseline": number(mean["baseline"], 4),
        "ratio": number(mean["network"] / mean["baseline"] if mean["baseline"] else None, 3),
    }


def reconstruction_pictures(run: RunFacts, origins: dict[str, str | None], folder: Path) -> list[dict[str, str]]:
    """Draw the reconstructions of a run into `folder`: {"file", "volume", "caption"} each."""
    import numpy as np

    if not run.scores:
        return []
    pictures = []
    for crop in run.scores["crops"]:
        if crop.get("file") is None:
            continue
        with np.load(run.evaluation / crop["file"], allow_pickle=False) as arrays:
            original, reconstruction, hidden = (arrays[key] for key in ("original", "reconstruction", "hidden"))
            spacing_mm = tuple(float(edge) for edge in arrays["spacing_mm"])
        low, high = np.percentile(original, [0.5, 99.5])
        layers = {
            "original": grey_levels(original, low, high),
            "reconstruction": grey_levels(reconstruction, low, high),
            "hidden": hidden.astype(np.uint8),
        }
        z, y, x = (edge // 2 for edge in original.shape)
        name = f"{run.name}_reconstruction_{crop['volume']}_{crop['crop']}.png"
        assert len(spacing_mm) == 3
        reconstruction_picture(cut_planes(layers, (z, y, x), spacing_mm), folder / name)
        caption = (
            f"{_described(crop['volume'], origins)}, crop {crop['crop']}, the one with most to find: middle slices."
        )
        caption += " Coloured: hidden."
        pictures.append({"file": name, "volume": crop["volume"], "caption": caption})
    return pictures


def _finetune_view(runs: Sequence[RunFacts], origins: dict[str, str | None], folder: Path) -> dict[str, Any]:
    with_dice = [run for run in runs if any(line.get("val_dice") is not None for line in run.validations)]
    if with_dice:
        dice_chart(with_dice, folder / "validation_dice.png")
    scored = [run for run in runs if run.scores]
    return {
        "losses": _loss_chart(runs, folder / "finetune_loss.png"),
        "dice": "validation_dice.png" if with_dice else None,
        "comparison": _comparison(scored) if len(scored) > 1 else None,
        "scored": bool(scored),
        "runs": [
            {
                "name": run.name,
                "path": run.run.path,
                "segmentation": _segmentation(run.scores, origins) if run.scores else None,
                "pictures": segmentation_pictures(run, origins, folder),
            }
            for run in runs
        ],
    }


def _comparison(runs: Sequence[RunFacts]) -> dict[str, Any]:
    classes = list(dict.fromkeys(name for run in runs if run.scores for name in run.scores["classes"]))
    rows = []
    for run in runs:
        assert run.scores is not None
        per_class = run.scores["per_class"]
        mean = run.scores["mean"]
        start = run.config.get("init_from")
        rows.append(
            {
                "name": run.name,
                "encoder": f"from {start}" if start else "from scratch",
                "dice": [number(per_class[name]["dice"]["mean"]) if name in per_class else NOTHING for name in classes],
                "without_background": number(mean["without_background"]["dice"]),
                "with_background": number(mean["with_background"]["dice"]),
                "cases": len(run.scores["cases"]),
            }
        )
    return {"classes": classes, "rows": rows}


def _segmentation(scores: dict[str, Any], origins: dict[str, str | None]) -> dict[str, Any]:
    per_class, mean, store = scores["per_class"], scores["mean"], scores.get("store_grid")
    best, foreground = scores.get("best"), foreground_names(scores)
    rows = [
        {
            "name": name,
            "mean": False,
            "dice": spread(entry["dice"]),
            "hd95": spread(entry["hd95_mm"], 2),
            "nsd": spread(entry["nsd"]),
            "cases": entry["dice"]["cases"],
            "undefined": entry["dice"]["undefined"],
            "hd95_undefined": entry["hd95_mm"]["undefined"] if name in foreground else NOTHING,
            "store_dice": spread(store["per_class"][name]["dice"]) if store else "",
            "best_dice": spread(best["per_class"][name]["dice"]) if best else "",
        }
        for name, entry in per_class.items()
    ]
    for key, label in (("without_background", "mean, no background"), ("with_background", "mean, with background")):
        rows.append(
            {
                "name": label,
                "mean": True,
                "dice": number(mean[key]["dice"]),
                "hd95": number(mean[key]["hd95_mm"], 2) if key == "without_background" else NOTHING,
                "nsd": number(mean[key]["nsd"]) if key == "without_background" else NOTHING,
                "cases": len(scores["cases"]),
                "undefined": "",
                "hd95_undefined": "",
                "store_dice": number(store["mean"][key]["dice"]) if store else "",
                "best_dice": number(best["mean"][key]["dice"]) if best else "",
            }
        )
    cases = [
        {
            "volume": case["volume"],
            "origin": origins.get(case["volume"]),
            "name": name,
            "dice": number(score["dice"]),
            "hd95": number(score["hd95_mm"], 2),
            "nsd": number(score["nsd"]),
            "truth_voxels": score["truth_voxels"],
            "predicted_voxels": score["predicted_voxels"],
        }
        for case in scores["cases"]
        for name, score in case["scores"].items()
    ]
    derived = sum(origins.get(case["volume"]) == "derived" for case in scores["cases"])
    settings = scores["settings"]
    return {
        "sentence": (
            f"Checkpoint {scores['checkpoint']}, {len(scores['cases'])} whole {scores['split']} volume(s)"
            + (f", {derived} of them derived" if derived else "")
            + f", windows of {' x '.join(map(str, settings['crop_voxels']))} voxels with {settings['overlap']:g} "
            "overlap. Scored on the grid of the source files."
        ),
        "tolerance": f"{settings['nsd_tolerance_mm']:g}",
        "store_grid": store is not None,
        "rows": rows,
        "cases": cases,
        "best": _best_sentence(scores),
        "legend": legend(foreground_names(scores)),
    }


def _best_sentence(scores: dict[str, Any]) -> str:
    """What the second column of Dice is, and what it is not; empty where there is none."""
    best = scores.get("best")
    if best is None:
        return ""
    return (
        f"Dice, best on validation: of {best['checkpoint']}, which had the best {best['metric']} "
        f"({number(best['value'])}) of all that were saved. The headline is the last checkpoint: of many, the best on "
        "validation looks better there than it is."
    )


def segmentation_pictures(run: RunFacts, origins: dict[str, str | None], folder: Path) -> list[dict[str, str]]:
    """Draw truth and prediction of a run's scored volumes into `folder`: {"file", "volume", "caption"} each."""
    if not run.scores:
        return []
    pictures = []
    for case in run.scores["cases"]:
        if case.get("slices") is None:
            continue
        name = f"{run.name}_segmentation_{case['volume']}.png"
        segmentation_picture(load_planes(run.evaluation / case["slices"]), folder / name)
        dice = ", ".join(f"{key} {number(case['scores'][key]['dice'])}" for key in foreground_names(run.scores))
        caption = f"{_described(case['volume'], origins)}. Dice of the whole volume: {dice}."
        pictures.append({"file": name, "volume": case["volume"], "caption": caption})
    return pictures


def _described(volume: str, origins: dict[str, str | None]) -> str:
    origin = origins.get(volume)
    return f"{volume} ({origin})" if origin else volume


def _loss_chart(runs: Sequence[RunFacts], path: Path) -> str | None:
    logged = [run for run in runs if run.steps]
    if not logged:
        return None
    loss_chart(logged, path)
    return path.name


def _yardstick_chart(runs: Sequence[RunFacts], path: Path) -> str | None:
    compared = [run for run in runs if any("val_loss_vs_mean_voxel" in line for line in run.validations)]
    if not compared:
        return None
    yardstick_chart(compared, path)
    return path.name


def _health(run: RunFacts) -> str:
    """What went wrong, in a sentence; empty when nothing did."""
    if not run.health:
        return ""
    names = [str(event["event"]).replace("_", " ") for event in run.health]
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return f"{counts}. The last: {run.health[-1]['message']}"


def _throughput_view(runs: Sequence[RunFacts], folder: Path) -> dict[str, Any]:
    logged = [run for run in runs if run.steps]
    if logged:
        throughput_chart(logged, folder / "throughput.png")
    return {
        "chart": "throughput.png" if logged else None,
        "rows": [
            {
                "name": run.name,
                "global_batch": run.config["global_batch"],
                "samples_per_s": number(run.percentile("samples_per_s", 50), 2),
                "p50": f"{number(run.percentile('step_s', 50), 2)} s",
                "p95": f"{number(run.percentile('step_s', 95), 2)} s",
                "data_wait": percent(run.data_wait_percent),
                "steps": len(run.warm_steps),
            }
            for run in logged
        ],
    }


def _versions(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    return [
        {"what": f"evaluation of {run.name}", "libraries": run.scores["versions"]}
        for run in runs
        if run.scores and run.scores.get("versions")
    ]
