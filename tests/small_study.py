"""A study of seconds: a phantom, its derived subjects, tiny networks."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from store_samples import phantom, write_nifti

NETWORK = {
    "crop_voxels": [16, 16, 16],
    "patch_voxels": [8, 8, 8],
    "model": {"dim": 24, "depth": 2, "heads": 2},
    "global_batch": 2,
    "micro_batch": 2,
    "stream": {"workers": 0},
    "engine": {"zero_stage": 0},
    "meter": {"tensorboard": False},
    "checkpoint": {"every_steps": 100, "keep": 1},
}


def study_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """From scratch against MAE, one seed each: 7 nodes."""
    return {
        "title": "A study of seconds",
        "run_dir": str(folder / "study"),
        "data": {
            "phantoms": {
                "verb": "cohort",
                "config": {
                    "image": str(folder / "image.nii.gz"),
                    "label": str(folder / "label.nii.gz"),
                    "subjects": 5,
                    "validation": 1,
                    "workers": 1,
                },
            },
            "store": {
                "verb": "ingest",
                "config": {"sources": "@phantoms/dataset.json", "workers": 1, "modality": "mr"},
                "expect": {"train": 4, "val": 2, "channels": 1, "class_names": ["background", "class_1"]},
            },
        },
        "pretrain": {
            "config": {
                **NETWORK,
                "store": "@store",
                "steps": 4,
                "mae": {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2},
                "validation": {"every_steps": 0},
            }
        },
        "finetune": {
            "config": {
                **NETWORK,
                "store": "@store",
                "steps": 6,
                "unetr": {"num_classes": 2, "feature_size": 4},
                "validation": {"every_steps": 2, "crops_per_volume": 1},
            }
        },
        "evaluate": {"save_predictions": False, "store_grid": False, "pictures": 1, "overlap": 0, "batch": 8},
        "reconstructions": False,
        "arms": {"scratch": {}, "mae": {"pretrain": {}}},
        "experiments": {"main": {"question": "Does pretraining help?", "arms": ["scratch", "mae"]}},
        "target": {"arm": "scratch"},
        "bootstrap": {"replicates": 200},
        **changes,
    }


def write_study(folder: Path, **changes: Any) -> Path:
    """The recipe of `study_tree` and the phantom that it reads; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    voxels = phantom(0, (32, 28, 30))
    write_nifti(folder / "image.nii.gz", voxels, np.diag([3.0, 3.0, 3.0, 1.0]))
    write_nifti(folder / "label.nii.gz", (voxels > 200).astype(np.uint8), np.diag([3.0, 3.0, 3.0, 1.0]))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(study_tree(folder, **changes), sort_keys=False))
    return recipe
