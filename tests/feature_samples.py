"""A store of two anatomies, balls and shells, some subjects with two scans; and features without any store."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from store_samples import config_of, write_key, write_nifti

from mimscale import durable
from mimscale.features.layout import VERSION, FeatureFolder, Features, schema_of, write_table
from mimscale.ingest.run import ingest

KINDS = ("ball", "shell")
SHAPE = (20, 18, 22)
INTENSITY = {"kind": "window", "window": [0.0, 1000.0]}  # as of the runs of `small_segmentation`


def anatomy(kind: str, seed: int) -> np.ndarray:
    """A ball or a hollow ball, of another size and at another place for each seed, in noise: [X, Y, Z]."""
    random = np.random.default_rng([seed, KINDS.index(kind)])
    grid = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in SHAPE), indexing="ij")
    centre = random.uniform(-0.15, 0.15, 3)
    radius = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)))
    outer = random.uniform(0.7, 0.85)
    inside = radius < outer if kind == "ball" else (radius < outer) & (radius > outer - 0.25)
    return (inside * 500.0 + random.normal(0, 25, SHAPE) + 60).clip(0).astype(np.int16)


def make_cohort(folder: Path, subjects: int = 6, **options) -> Path:
    """A store of `subjects` of each kind, the first two of them scanned twice; returns the store."""
    rows = []
    for kind in KINDS:
        for number in range(subjects):
            for scan in range(2 if number < 2 else 1):
                name = f"{kind}{number:02d}_{scan}.nii.gz"
                voxels = anatomy(kind, 10 * number + scan)
                write_nifti(folder / "scans" / name, voxels, np.diag([1.0, 1.5, 2.0, 1.0]))
                split = "val" if number % 3 == 0 else "train"
                rows.append({"image": f"scans/{name}", "subject": f"{kind}{number:02d}", "split": split, "kind": kind})
    write_csv(folder / "scans.csv", rows)
    key = write_key(folder / "subject_key")
    defaults = {"parts": 3, "chunk_voxels": 16, "intensity": INTENSITY, "subject_key": key, "class_names": []}
    ingest(config_of(str(folder / "scans.csv"), folder / "store", **{**defaults, **options}))
    return folder / "store"


def write_csv(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def journal_of(store: Path) -> list[dict]:
    return [json.loads(line) for line in store.with_name(f"{store.name}.sources.jsonl").read_text().splitlines()]


def write_features(
    folder: Path, vectors: np.ndarray, *, subjects=None, splits=None, weights="trained", ids=None, **contract
) -> Features:
    """A folder as `mimscale extract` leaves it, with these features [N, D]."""
    num, dim = vectors.shape
    ids = ids or [f"v{index:03d}" for index in range(num)]
    subjects = list(subjects) if subjects is not None else [f"s{index:03d}" for index in range(num)]
    splits = list(splits) if splits is not None else ["val" if index % 3 == 0 else "train" for index in range(num)]
    tree = {
        "version": VERSION,
        "weights": weights,
        "encoder_sha256": weights,
        "store_sha256": "0",
        "ids_sha256": "0",
        "dim": dim,
        "settings": {"weights": "trained", "pool": "mean", "crops": None},
        **contract,
    }
    place = FeatureFolder(folder)
    rows = [
        {
            "id": ids[index],
            "subject": subjects[index],
            "split": splits[index],
            "spacing_mm": [1.0, 1.0, 1.0],
            "windows": 1,
            "origin_zyx": None,
            "feature": vectors[index].astype(np.float32),
        }
        for index in range(num)
    ]
    schema = schema_of(dim, tree)
    write_table(place.table("features"), [pa.Table.from_pylist(rows, schema)], schema)
    path = place.table("features")
    files = {path.name: {"rows": num, "sha256": durable.sha256_of_file(path)}}
    durable.write_json(place.contract, {**tree, "files": files, "failed": []})
    return Features(
        folder=folder, name=weights, contract=tree, ids=ids, subjects=subjects, splits=splits, vectors=vectors
    )
