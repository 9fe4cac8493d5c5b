"""Run directories as the stages write them, small and made up, for tests of what reads them."""

import json
from pathlib import Path

import numpy as np
import yaml

from mimscale.evaluate.slices import cut_planes, save_planes

VERSIONS = {"mimscale": "0.1.0", "monai": "1.6.1", "torch": "2.13.0"}
CLASSES = ["background", "grey", "white"]


def phantom(shape=(40, 48, 36)):
    """Image (0..1) and label map of nested balls: [Z, Y, X]."""
    axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes)) + 0.08 * np.sin(9 * axes[0]) * np.cos(7 * axes[1])
    label = (radius < 0.85).astype(np.uint8) + (radius < 0.55)
    noise = np.random.default_rng(0).normal(0, 0.03, shape)
    return np.clip(label * 0.4 + noise, 0, 1).astype(np.float32), label


def write_lines(path: Path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fake_run(folder: Path, kind="pretrain", steps=40, store="demo/store", outcome="finished", **config):
    folder.mkdir(parents=True)
    tree = {"kind": kind, "store": store, "run_dir": str(folder), "steps": steps, "global_batch": 8, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    noise = np.random.default_rng(1)
    lines = [
        {
            "step": step,
            "loss": float(0.25 + 0.7 * np.exp(-step / (steps / 4)) + noise.normal(0, 0.02)),
            "lr": 1e-3,
            "grad_norm": 1.0,
            "step_s": 0.5,
            "data_wait_s": 0.05 if step > 2 else 0.4,
            "samples_per_s": 16.0,
            "substituted": 0.0,
        }
        for step in range(1, steps + 1)
    ]
    for step in range(10, steps + 1, 10):
        scores = {"val_loss": 0.3 + 0.5 * float(np.exp(-step / 10))}
        if kind == "finetune":
            scores["val_dice"] = 0.9 - 0.6 * float(np.exp(-step / 12))
        else:
            scores["val_loss_vs_mean_voxel"] = scores["val_loss"] / 0.8
            scores["val_loss_vs_interpolated"] = scores["val_loss"] / 0.5
        lines.append({"step": step, **scores})
    write_lines(folder / "metrics.jsonl", sorted(lines, key=lambda line: line["step"]))
    codes = {"finished": 0, "interrupted": 75, "failed": 3}
    (folder / "outcome.json").write_text(
        json.dumps({"outcome": outcome, "exit_code": codes[outcome], "step": steps, "message": ""})
    )
    return folder


def add_segmentation_scores(folder: Path, volumes=("0123456789abcdef", "fedcba9876543210"), dice=0.8):
    evaluation = folder / "evaluate"
    image, label = phantom()
    prediction = np.roll(label, 1, axis=1)
    cases = []
    for volume in volumes:
        levels = (image * 255).astype(np.uint8)
        layers = {"image": levels, "truth": label, "prediction": prediction}
        save_planes(evaluation / "slices" / f"{volume}.npz", cut_planes(layers, (20, 24, 18), (1.0, 1.0, 1.0)))
        cases.append(
            {
                "volume": volume,
                "slices": f"slices/{volume}.npz",
                "scores": {
                    name: {
                        "dice": dice,
                        "hd95_mm": 2.0 if index else None,
                        "nsd": 0.9 if index else None,
                        "truth_voxels": 1000,
                        "predicted_voxels": 1100,
                    }
                    for index, name in enumerate(CLASSES)
                },
            }
        )
    mean = {"mean": dice, "std": 0.01, "cases": len(cases), "undefined": 0}
    none = {"mean": None, "std": None, "cases": 0, "undefined": len(cases)}
    per_class = {
        name: {"dice": mean, "hd95_mm": mean | {"mean": 2.0} if index else none, "nsd": mean if index else none}
        for index, name in enumerate(CLASSES)
    }
    over_classes = {
        key: {"dice": dice, "hd95_mm": 2.0, "nsd": dice} for key in ("with_background", "without_background")
    }
    scores = {
        "kind": "finetune",
        "checkpoint": "step_00000040",
        "step": 40,
        "split": "val",
        "store": "demo/store",
        "classes": CLASSES,
        "settings": {"split": "val", "crop_voxels": [64, 64, 64], "overlap": 0.5, "nsd_tolerance_mm": 2.0},
        "per_class": per_class,
        "mean": over_classes,
        "store_grid": {"per_class": per_class, "mean": over_classes},
        "cases": cases,
        "versions": VERSIONS,
    }
    (evaluation / "scores.json").write_text(json.dumps(scores))
    return scores


def add_reconstruction_scores(folder: Path, volumes=("0123456789abcdef",)):
    evaluation = folder / "evaluate"
    image, _ = phantom((32, 48, 48))
    hidden = np.zeros((4, 6, 6), bool)
    hidden.flat[np.random.default_rng(0).permutation(144)[:108]] = True
    hidden = hidden.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    blurred = (image + np.roll(image, 2, 1) + np.roll(image, 2, 2)) / 3
    crops = []
    for volume in volumes:
        name = f"reconstructions/{volume}_0.npz"
        (evaluation / "reconstructions").mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            evaluation / name, original=image, reconstruction=blurred, hidden=hidden, spacing_mm=np.ones(3)
        )
        crops.append(
            {
                "volume": volume,
                "crop": 0,
                "hidden_voxels": int(hidden.sum()),
                "network": 0.1234,
                "baseline": 0.4321,
                "file": name,
            }
        )
    scores = {
        "kind": "pretrain",
        "checkpoint": "step_00000040",
        "step": 40,
        "split": "val",
        "store": "demo/store",
        "error": "mean absolute error",
        "unit": "normalised intensity",
        "baseline": "the mean of the visible voxels",
        "crops": crops,
        "mean": {"network": 0.1234, "baseline": 0.4321},
        "versions": VERSIONS,
    }
    (evaluation / "scores.json").write_text(json.dumps(scores))
    return scores
