"""Conversion of volumes: whole, in pieces, against stock zarr-python, in bytes and in memory."""

import gzip
import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ingest_volumes import Kind, write_files

from mimscale.bench import measure
from mimscale.config import build_config
from mimscale.ingest import geometry, statistics
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats import ReadOptions, Scan, SourceFile, read_scan
from mimscale.ingest.run import ingest
from mimscale.store import shard
from mimscale.store.layout import CODECS
from mimscale.store.writer import PackWriter
from mimscale.train.environment import memory_peak_bytes

CHUNK_VOXELS = 32
SIZE_PRESETS = [*itertools.product(["zstd"], [1, 3, 9]), ("lz4", 5), ("lz4hc", 5)]
SHUFFLES = ("shuffle", "bitshuffle")


def conversion(folder: Path, kind: Kind, mb_a_run: float, repeats: int) -> dict[str, Any]:
    """`mimscale ingest` with one worker, in MB of raw voxels a second: everything from planning to the manifest."""
    count = max(2, math.ceil(mb_a_run / measure.megabytes(kind.voxels)))
    contenders = {}
    for suffix, codec in itertools.product((".nii", ".nii.gz"), CODECS):
        sources = write_files(kind, folder, count, suffix)
        contenders[f"{suffix} {codec}"] = lambda sources=sources, codec=codec: _ingest(folder, kind, sources, codec)
    runs = measure.interleaved(contenders, repeats)
    return {name: measure.rate(timed, count * measure.megabytes(kind.voxels)) for name, timed in runs.items()}


def _ingest(folder: Path, kind: Kind, sources: list[str], codec: str) -> dict[str, Any]:
    out = folder / "store"
    shutil.rmtree(out, ignore_errors=True)
    for beside in folder.glob("store.*"):
        beside.unlink()
    tree = {"sources": sources, "out": str(out), "modality": kind.modality, "codec": codec, "workers": 1}
    summary = ingest(build_config(IngestConfig, tree, "benchmark"))
    assert summary["stored"] == len(sources), summary
    return summary


def pieces(folder: Path, kind: Kind, repeats: int) -> dict[str, Any]:
    """Each step of a conversion alone, with its ceiling, and stock zarr-python for the same chunks."""
    plain, packed = (SourceFile(Path(path), Path(path).read_bytes()) for path in _both(kind, folder))
    scan = read_scan([plain], ReadOptions())
    volume = _turned(scan)
    fill = statistics.fill_value(volume, kind.modality)
    blosc = shard.choose_blosc(volume, fill, CHUNK_VOXELS, "zstd")
    fast = shard.choose_blosc(volume, fill, CHUNK_VOXELS, "fast")
    chunks = _stored_chunks(volume, fill)
    contenders = {
        "read .nii": lambda: read_scan([plain], ReadOptions()),
        "read .nii.gz": lambda: read_scan([packed], ReadOptions()),
        "ceiling: gzip of the standard library": lambda: gzip.decompress(packed.data),
        "turn to RAS+": lambda: _turned(scan),
        "statistics": lambda: statistics.describe(volume, kind.modality),
        "sha256 of the voxels": lambda: hashlib.sha256(volume.data).hexdigest(),
        "choose a shuffle": lambda: shard.choose_blosc(volume, fill, CHUNK_VOXELS, "zstd"),
        "encode zstd": lambda: _drain(shard.encode_shard(volume, fill, CHUNK_VOXELS, blosc)),
        "ceiling: Blosc of its chunks": lambda: _drain(map(blosc.compress, chunks)),
        "encode fast": lambda: _drain(shard.encode_shard(volume, fill, CHUNK_VOXELS, fast)),
        "pack zstd (encode, sha256, zip, fsync)": lambda: _write_pack(folder, volume, fill),
        "stock zarr-python, same chunks and codec": lambda: _write_with_zarr(folder, volume, fill, blosc),
        "ceiling: copy of the voxels": lambda: volume.copy(),
    }
    runs = measure.interleaved(contenders, repeats)
    return {name: measure.rate(timed, measure.megabytes(volume)) for name, timed in runs.items()}


def _both(kind: Kind, folder: Path) -> list[str]:
    return [write_files(kind, folder, 1, suffix)[0] for suffix in (".nii", ".nii.gz")]


def _drain(pieces: Any) -> int:
    return sum(len(piece) for piece in pieces)


def _turned(scan: Scan) -> np.ndarray:
    """As ingest does it: one copy, in the store's order [C, Z, Y, X]."""
    _, shape_zyx = geometry.store_grid(scan.affine, scan.voxels.shape[1:])
    volume = np.empty((len(scan.voxels), *shape_zyx), dtype=scan.voxels.dtype)
    for place, channel in zip(volume, scan.voxels, strict=True):
        place[...] = geometry.to_store_grid(channel, scan.affine)[0]
    return volume


def _stored_chunks(volume: np.ndarray, fill: float) -> list[np.ndarray]:
    corners = list(itertools.product(*map(range, shard.chunk_grid(volume.shape, CHUNK_VOXELS))))
    return [chunk.copy() for chunk in shard._chunks(volume, fill, CHUNK_VOXELS, corners) if chunk is not None]


def _write_pack(folder: Path, volume: np.ndarray, fill: float) -> None:
    with PackWriter(folder / "pack.zarr.zip", chunk_voxels=CHUNK_VOXELS, codec="zstd") as pack:
        pack.add("a", volume, fill_value=fill, spacing_mm=(1.0, 1.0, 1.0), attributes={})


def _write_with_zarr(folder: Path, volume: np.ndarray, fill: float, blosc: shard.Blosc) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    grid = shard.chunk_grid(volume.shape, CHUNK_VOXELS)
    array = zarr.create_array(
        folder / "stock.zarr",
        shape=volume.shape,
        dtype=volume.dtype,
        chunks=(1, *(CHUNK_VOXELS,) * 3),
        shards=(grid[0], *(edge * CHUNK_VOXELS for edge in grid[1:])),
        compressors=[BloscCodec(cname=blosc.compressor, clevel=blosc.level, shuffle=blosc.shuffle), Crc32cCodec()],
        fill_value=volume.dtype.type(fill),
        overwrite=True,
    )
    array[...] = volume


def sizes(volume: np.ndarray, modality: str) -> dict[str, Any]:
    """Bytes of each Blosc preset, and how far ours is from the smallest."""
    fill = statistics.fill_value(volume, modality)
    stored = {
        f"{compressor} {level} {shuffle}": _drain(
            shard.encode_shard(volume, fill, CHUNK_VOXELS, shard.Blosc(compressor, level, shuffle))
        )
        for (compressor, level), shuffle in itertools.product(SIZE_PRESETS, SHUFFLES)
    }
    best = min(stored.values())
    ours = {}
    for codec in CODECS:
        chosen = shard.choose_blosc(volume, fill, CHUNK_VOXELS, codec)
        name = f"{chosen.compressor} {chosen.level} {chosen.shuffle}"
        ours[codec] = {
            "settings": name,
            "ratio": round(volume.nbytes / stored[name], 3),
            "above_best_percent": round(100 * (stored[name] / best - 1), 2),
        }
    return {"raw_bytes": volume.nbytes, "stored_bytes": stored, "ours": ours}


def store_order(kind: Kind) -> np.ndarray:
    """The volume as a store holds it."""
    return np.ascontiguousarray(geometry.to_store_grid(kind.voxels, kind.affine)[0])[None]


def write_ct(folder: Path, voxels: np.ndarray, suffix: str, *, labelled: bool) -> list[Any]:
    """Write a CT, with a label map when asked; returns `sources`."""
    affine = np.diag([-0.8, -0.8, 1.5, 1.0])
    files = {"image": voxels}
    if labelled:
        files["label"] = np.digitize(voxels, [-500, 300]).astype(np.uint8)
    pair = {}
    for name, array in files.items():
        (folder / name).mkdir()
        (pair[name],) = write_files(Kind("ct", "ct", array, affine), folder / name, 1, suffix)
    return [pair] if labelled else [pair["image"]]


def memory_of_ingest(folder: str, sources: str) -> dict[str, int]:
    """Ingest one pair in this process, which must be a fresh one, and tell its peak."""
    tree = {
        "sources": json.loads(sources),
        "out": f"{folder}/store",
        "modality": "ct",
        "class_names": ["air", "tissue", "bone"],
        "workers": 1,
    }
    summary = ingest(build_config(IngestConfig, tree, "benchmark"))
    assert summary["stored"] == 1, summary
    return {"bytes": memory_peak_bytes()}
