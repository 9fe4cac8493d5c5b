"""Volumes that differ in brightness, tables of what that is to mean, and runs of seconds that learn it."""

from pathlib import Path

from feature_samples import write_csv
from stream_stores import write_store

from mimscale.store.intensity import IntensityContract

SHAPE = (40, 36, 44)
ENCODERS = {
    "targets": ("patch_voxels=[4, 8, 8]", "model={dim: 24, depth: 2, heads: 2, drop_path: 0.2}"),
    "swin_targets": ("patch_voxels=[1, 2, 2]", "model={dim: 12, depths: [2, 1], heads: [2, 4], window: [2, 3, 3]}"),
    "resenc_targets": (
        "patch_voxels=[4, 8, 8]",
        "model={features: [4, 8, 8], blocks: [1, 2, 1], strides: [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}",
    ),
}


def bright_store(store: Path, volumes: int = 8) -> Path:
    """Volume vol_00N of subject_N is N x 100 bright, and a window keeps that: what a target may follow."""
    write_store(store, [SHAPE] * volumes, labels=False, intensity=IntensityContract(kind="window", window=(0, 1000)))
    return store


def bright_rows(volumes: int = 8, **cells: dict[int, str]) -> list[dict[str, str]]:
    """A line for each volume: dark or bright, one of three sites, an age of 20 and more; `cells` are others instead."""
    rows = []
    for number in range(volumes):
        row = {
            "id": f"vol_{number:03d}",
            "tone": "dark" if number < volumes / 2 else "bright",
            "site": "ABC"[number * 3 // volumes],
            "age": str(20 + 5 * number),
        }
        rows.append({name: cells.get(name, {}).get(number, text) for name, text in row.items()})
    return rows


def targets_table(folder: Path, volumes: int = 8, **cells: dict[int, str]) -> Path:
    return write_csv(folder / "targets.csv", bright_rows(volumes, **cells))


def target_words(store: Path, run_dir: Path, table: Path, *more: str, head: str = "targets") -> list[str]:
    """`mimscale finetune ...` for 20 steps of 8 crops, accumulation 2 on two ranks."""
    return [
        "finetune",
        "finetune_targets",
        f"store={store}",
        f"run_dir={run_dir}",
        f"targets.table={table}",
        "targets.classify=[tone, site]",
        "targets.regress=[age]",
        f"head={head}",
        *ENCODERS[head],
        "steps=20",
        "global_batch=8",
        "micro_batch=2",
        "crop_voxels=[16, 24, 32]",
        "optim={lr: 3e-3, warmup_steps: 2}",
        "stream={workers: 0, crops_per_volume: 2}",
        "augment={}",
        "checkpoint={every_steps: 100, keep: 2}",
        "meter={record_samples: true, tensorboard: false, log_every_steps: 1}",
        "validation={every_steps: 10}",
        "engine={zero_stage: 2, bucket_elements: 2000}",
        *more,
    ]
