"""Small stores, written by the real writer, for tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimscale.store import layout, shard
from mimscale.store.intensity import ChannelStats, IntensityContract
from mimscale.store.layout import OverlayInfo, StoreInfo
from mimscale.store.manifest import Manifest, load_manifest, write_manifest
from mimscale.store.rows import OverlayRow, VolumeRow
from mimscale.store.stage import Stage
from mimscale.store.writer import PackWriter
from mimscale.stream.config import StreamConfig
from mimscale.stream.loader import StreamLoader
from mimscale.stream.plan import SamplePlan
from mimscale.stream.staging import Copier
from mimscale.world import World

AIR = -1000.0


def voxels_of(number: int, shape: Sequence[int] = (48, 40, 44), dtype: str = "int16", channels: int = 1) -> np.ndarray:
    """Voxels [C, Z, Y, X] of volume `number`: every voxel tells where it lies, and in which volume."""
    flat = np.arange(channels * int(np.prod(shape))).reshape(channels, *shape)
    return (flat % 97 + number * 100).astype(dtype)


def write_store(
    store: Path,
    shapes: Sequence[Sequence[int]],
    *,
    dtypes: Sequence[str] | None = None,
    channels: int = 1,
    labels: bool = True,
    chunk_voxels: int = 16,
    intensity: IntensityContract | None = None,
) -> Manifest:
    """Write a store with volumes vol_000, vol_001 ..., one part a volume, and return its manifest."""
    rows = []
    for number, shape in enumerate(shapes):
        dtype = "int16" if dtypes is None else dtypes[number]
        voxels = voxels_of(number, shape, dtype, channels)
        volume_id = f"vol_{number:03d}"
        fill = AIR if np.dtype(dtype).kind != "u" else 0.0
        overlays = {}
        with PackWriter(layout.pack_path(store, number), chunk_voxels=chunk_voxels, codec="zstd") as pack:
            place = pack.add(volume_id, voxels, fill_value=fill, spacing_mm=(1.0, 1.0, 1.0), attributes={})
        if labels:
            label = (voxels[:1] % 3).astype(np.uint8)
            with PackWriter(
                layout.overlay_path(store, "label", number), chunk_voxels=chunk_voxels, codec="zstd"
            ) as pack:
                at = pack.add(volume_id, label, fill_value=0.0, spacing_mm=(1.0, 1.0, 1.0), attributes={})
            overlays["label"] = OverlayRow(
                part=number,
                offset_bytes=at.offset_bytes,
                length_bytes=at.length_bytes,
                sha256=at.sha256,
                source_sha256="0" * 64,
                class_voxels=tuple(np.bincount(label.ravel(), minlength=3).tolist()),
            )
        stats = ChannelStats(
            p0_5=number * 100.0,
            p50=number * 100 + 48.0,
            p99_5=number * 100 + 90.0,
            mean=number * 100 + 48.0,
            std=28.0,
            foreground_mean=number * 100 + 50.0,
            foreground_std=25.0,
        )
        z, y, x = shape
        rows.append(
            VolumeRow(
                id=volume_id,
                subject=f"subject_{number}",
                dataset="test",
                licence="CC0",
                modality="ct",
                split="train",
                shape=(channels, z, y, x),
                spacing_mm=(1.0, 1.0, 1.0),
                affine=tuple(np.eye(4).ravel().tolist()),
                dtype=dtype,
                part=number,
                offset_bytes=place.offset_bytes,
                length_bytes=place.length_bytes,
                fill_value=fill,
                sha256=place.sha256,
                voxels_sha256=f"{number:064x}",
                source_sha256=f"{number:064x}",
                source_orientation="RAS",
                source_affine=tuple(np.eye(4).ravel().tolist()),
                source_shape=(x, y, z),
                stats=(stats,) * channels,
                foreground_box=((0, z), (0, y), (0, x)),
                overlays=overlays,
            )
        )
    layout.write_info(
        store,
        StoreInfo(
            chunk_voxels=chunk_voxels,
            codec="zstd",
            intensity=intensity or IntensityContract(kind="zscore"),
            modality="ct",
            num_parts=len(rows),
            ingest={},
            ingest_hash="0" * 16,
            subject_key_fingerprint="0" * 16,
            overlays={"label": OverlayInfo(class_names=("a", "b", "c"))} if labels else {},
        ),
    )
    write_manifest(store, rows)
    return load_manifest(store)


def open_loader(
    store: Path,
    *,
    crop_voxels: tuple[int, int, int] = (16, 16, 16),
    workers: int = 1,
    crops_per_volume: int = 2,
    global_batch: int = 3,
    overlay: str | None = None,
    stage: Stage | None = None,
    copier: Copier | None = None,
) -> StreamLoader:
    """A loader of all volumes of a store, in one process and in one order."""
    manifest = load_manifest(store)
    indices = np.arange(len(manifest))
    config = StreamConfig(workers=workers, crops_per_volume=crops_per_volume)
    plan = SamplePlan.of(manifest, indices, seed=1, crop_voxels=crop_voxels, config=config, global_batch=global_batch)
    return StreamLoader(
        store=store,
        manifest=manifest,
        indices=indices,
        plan=plan,
        world=World(),
        micro_batch=global_batch,
        accumulation=1,
        config=config,
        overlay=overlay,
        stage=stage,
        copier=copier,
    )


def damage(store: Path, manifest: Manifest, index: int) -> None:
    """Flip a bit in every chunk of a volume's shard, and leave its index as it is."""
    row = manifest.row(index)
    path = layout.pack_path(store, row.part)
    data = bytearray(path.read_bytes())
    chunk_voxels = layout.read_info(store).chunk_voxels
    start = row.offset_bytes + row.length_bytes - shard.index_bytes(row.shape, chunk_voxels)
    entries = bytes(data[start : row.offset_bytes + row.length_bytes])
    for offset, _ in shard.parse_index(entries, start - row.offset_bytes).tolist():
        if offset != shard.EMPTY:
            data[row.offset_bytes + offset] ^= 1
    path.write_bytes(data)
