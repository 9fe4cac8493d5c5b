"""What grows with the number of volumes: merging receipts, and opening the manifest of a large store."""

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mimscale.config import build_config, config_tree
from mimscale.ingest import merge
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.plan import Plan, PlannedSource, Round
from mimscale.ingest.receipts import write_receipt
from mimscale.ingest.subjects import subject_key
from mimscale.store import layout
from mimscale.store.intensity import ChannelStats
from mimscale.store.manifest import TRAINING_COLUMNS, load_manifest, write_manifest
from mimscale.store.rows import OverlayRow, VolumeRow, row_tree
from mimscale.train.environment import memory_peak_bytes

SOURCES_A_PART = 500
PLAN_COLUMNS = ("id", "modality", "split", "shape", "foreground_box")


def merge_receipts(store: Path, count: int) -> dict[str, Any]:
    """Write plan and receipts of a store of `count` volumes, then time `merge` on them."""
    parts = -(-count // SOURCES_A_PART)
    config = build_config(IngestConfig, {"sources": "unused", "out": str(store), "modality": "ct"}, "benchmark")
    store.mkdir()
    key = subject_key(store, None)
    layout.write_info(store, store_info(parts))
    planned = [planned_source(number, number % parts) for number in range(count)]
    by_part: dict[int, list[dict[str, Any]]] = {part: [] for part in range(parts)}
    for number, source in enumerate(planned):
        row = row_tree(volume_row(number, source.part))
        line = {"source": source.receipt_key(key), "outcome": "stored", "id": row["id"], "row": row, "warnings": {}}
        by_part[source.part].append(line)
    for part, lines in by_part.items():
        for path in (layout.pack_path(store, part), layout.overlay_path(store, "label", part)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        write_receipt(store, part, lines)
    round_ = Round(
        first_part=0, num_parts=parts, config=config_tree(config), class_names=("a", "b"), sources=tuple(planned)
    )
    start = time.perf_counter()
    summary = merge.merge(store, Plan((round_,)), config, key)
    seconds = time.perf_counter() - start
    assert summary["stored"] == count, summary
    return {"receipts": count, "parts": parts, "seconds": round(seconds, 2)}


def write_large_manifest(store: Path, count: int) -> dict[str, Any]:
    """A manifest of `count` rows whose ids and hashes all differ, half of them with a label map."""
    store.mkdir()
    layout.write_info(store, store_info(parts=6000))
    rows = [volume_row(number, number % 100) for number in range(2)]
    rows[1] = dataclasses.replace(rows[1], overlays={})
    write_manifest(store, rows)
    table = load_manifest(store)._table.take(pa.array(np.arange(count) % 2))
    random = np.random.default_rng(0)
    for name in ("id", "subject", "sha256", "voxels_sha256", "source_sha256"):
        digits = len(table.column(name)[0].as_py())
        hexadecimal = random.bytes(count * digits // 2).hex()
        values = [hexadecimal[start : start + digits] for start in range(0, len(hexadecimal), digits)]
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(sorted(values)))
    pq.write_table(table, layout.manifest_path(store), compression="zstd", row_group_size=32_768)
    return {"rows": count, "file_bytes": layout.manifest_path(store).stat().st_size}


def open_manifest(store: str, columns: str) -> dict[str, Any]:
    """Open it in this process, which must be a fresh one: seconds and peak memory."""
    chosen = {"plan": PLAN_COLUMNS, "training": TRAINING_COLUMNS, "all": None}[columns]
    start = time.perf_counter()
    manifest = load_manifest(Path(store), chosen)
    opened = time.perf_counter()
    result = {"seconds": round(opened - start, 3), "peak_mb": round(memory_peak_bytes() / 1e6)}
    if columns == "training":
        chosen_rows = np.random.default_rng(0).integers(0, len(manifest), 2000)
        start = time.perf_counter()
        for index in chosen_rows.tolist():
            manifest.sample_row(index)
        result["row_us"] = round((time.perf_counter() - start) / len(chosen_rows) * 1e6, 1)
    return result


def imports_alone() -> dict[str, Any]:
    """The memory that Python, numpy and pyarrow take before any manifest is there."""
    return {"peak_mb": round(memory_peak_bytes() / 1e6)}


def describe(store: str) -> dict[str, Any]:
    """`mimscale inspect` of the large store, in a fresh process."""
    from mimscale.report.store_summary import describe_store

    start = time.perf_counter()
    tree = describe_store(Path(store))
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "volumes": tree["volumes"],
        "peak_mb": round(memory_peak_bytes() / 1e6),
    }


def planned_source(number: int, part: int) -> PlannedSource:
    """A source of a plan, as a folder of NIfTI files gives it."""
    image = f"/archive/sub-{number // 2:06d}/anat/sub-{number // 2:06d}_run-{number % 2}_T1w.nii.gz"
    return PlannedSource(
        channels=((image,),),
        label=(image.replace("T1w", "mask"),),
        subject=f"sub-{number // 2:06d}",
        modality=None,
        split=None,
        tags={"site": f"site_{number % 20}"},
        problem=None,
        part=part,
        size_bytes=6_000_000,
        image_stamp=_hex(number, 16),
        label_stamp=_hex(-number, 16),
    )


def volume_row(number: int, part: int) -> VolumeRow:
    """A row with everything in it."""
    stats = ChannelStats(
        p0_5=-1003.5, p50=-12.25, p99_5=812.0, mean=-310.123, std=480.7, foreground_mean=61.5, foreground_std=140.25
    )
    place = {"part": part, "offset_bytes": 10_000_000 * number, "length_bytes": 9_876_543}
    affine = tuple(float(value) for value in (-0.8, 0, 0, 120.5, 0, -0.8, 0, 130.25, 0, 0, 1.5, -900.75, 0, 0, 0, 1))
    shape = (1, 100 + number % 200, 512, 512)
    overlay = OverlayRow(**place, sha256=_hex(number, 64), source_sha256=_hex(number + 1, 64), class_voxels=(9, 8))
    return VolumeRow(
        id=_hex(number, 16),
        subject=_hex(number // 2, 16),
        dataset="archive",
        licence="CC-BY-4.0",
        modality="ct" if number % 2 else "mr",
        split="train",
        shape=shape,
        spacing_mm=(1.5, 0.8, 0.8),
        affine=affine,
        dtype="int16",
        **place,
        fill_value=-1024.0,
        sha256=_hex(number + 2, 64),
        voxels_sha256=_hex(number + 3, 64),
        source_sha256=_hex(number + 4, 64),
        source_orientation="LPS",
        source_affine=affine,
        source_shape=(512, 512, shape[1]),
        stats=(stats,),
        foreground_box=((3, 90), (40, 480), (30, 500)),
        overlays={"label": overlay},
        tags={"site": f"site_{number % 20}"},
        acquisition={"kvp": "120", "manufacturer": "maker"},
    )


def store_info(parts: int) -> layout.StoreInfo:
    """`store.json` of a store that was never written."""
    from mimscale.store.intensity import IntensityContract

    return layout.StoreInfo(
        chunk_voxels=32,
        codec="zstd",
        intensity=IntensityContract(),
        modality="ct",
        num_parts=parts,
        ingest={},
        ingest_hash="0" * 16,
        subject_key_fingerprint="0" * 16,
        overlays={"label": layout.OverlayInfo(class_names=("a", "b"))},
    )


def _hex(number: int, digits: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:digits]
