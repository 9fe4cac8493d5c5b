"""What a store holds, counted from the columns of its manifest: 400 000 volumes are no more work than their numbers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.report.data import read_receipts
from mimscale.store.files import files_below
from mimscale.store.layout import read_info
from mimscale.store.manifest import Manifest, load_manifest

MOST_COMMON = 20
_COLUMNS = ("subject", "modality", "split", "shape", "spacing_mm", "dtype", "length_bytes", "overlays")
_LISTED = ("id", "split", "shape", "spacing_mm", "dtype")


def describe_store(store: Path) -> dict[str, Any]:
    """Counts, grids and sizes of a store.

    Raises:
        DataError: no store, or one whose ingest has not ended.
    """
    info, manifest = read_info(store), load_manifest(store, _COLUMNS)
    stored_bytes, raw_bytes = int(manifest.column("length_bytes").sum()), _raw_bytes(manifest)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for receipt in read_receipts(store):
        outcomes[receipt["outcome"]] += 1
        if receipt.get("reason"):
            reasons[receipt["reason"]] += 1
    return {
        "format_version": info.format_version,
        "modality": info.modality,
        "codec": info.codec,
        "chunk_voxels": info.chunk_voxels,
        "parts": info.num_parts,
        "ingest_hash": info.ingest_hash,
        "overlays": {name: list(overlay.class_names) for name, overlay in info.overlays.items()},
        "volumes": len(manifest),
        "labelled": {name: int((manifest.overlay_parts(name) >= 0).sum()) for name in info.overlays},
        "splits": manifest.value_counts("split"),
        "modalities": manifest.value_counts("modality"),
        "subjects": len(manifest.value_counts("subject")),
        "shapes": _most_common(manifest.column("shape")[:, 1:]),
        "spacings_mm": _most_common(manifest.column("spacing_mm").round(4)),
        "dtypes": manifest.value_counts("dtype"),
        "sources": dict(outcomes),
        "reasons": dict(reasons),
        "raw_bytes": raw_bytes,
        "stored_bytes": stored_bytes,
        "compression": round(raw_bytes / stored_bytes, 3) if stored_bytes else None,
        "disk_bytes": sum(size for _, size in files_below(store)),
    }


def list_volumes(store: Path, count: int) -> tuple[list[list[str]], int]:
    """Id, split, shape, spacing and dtype of the first volumes as text, and how many there are."""
    manifest = load_manifest(store, _LISTED)
    first = manifest.take(np.arange(min(count, len(manifest))))
    columns = [first.column(name) for name in _LISTED]
    lines = [
        [volume_id, split, grid(shape[1:]), grid(spacing), dtype]
        for volume_id, split, shape, spacing, dtype in zip(*columns, strict=True)
    ]
    return lines, len(manifest)


def grid(edges: Any) -> str:
    """Three numbers as a person writes them: 1 x 0.5 x 0.5."""
    return " x ".join(f"{edge:g}" for edge in edges)


def _most_common(rows: NDArray[Any]) -> dict[str, int]:
    """How often each row [N, 3] occurs, as text, most first."""
    values, counts = np.unique(rows, axis=0, return_counts=True)
    first = np.argsort(-counts, kind="stable")[:MOST_COMMON]
    return {grid(values[place]): int(counts[place]) for place in first}


def _raw_bytes(manifest: Manifest) -> int:
    voxels = manifest.column("shape").astype(np.int64).prod(axis=1)
    dtypes = manifest.column("dtype")
    return sum(int(voxels[dtypes == name].sum()) * np.dtype(name).itemsize for name in manifest.value_counts("dtype"))
