"""Small sources and stores for tests."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from mimscale.ingest.config import IngestConfig
from mimscale.ingest.run import ingest
from mimscale.store import shard
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import VolumeRow


def phantom(seed: int, shape: tuple[int, ...] = (40, 37, 21)) -> NDArray[np.int16]:
    """A bright body in noisy air, with exact zeros at one end."""
    random = np.random.RandomState(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in shape), indexing="ij")
    body = sum(axis**2 for axis in grid) < 0.6
    voxels = (random.rand(*shape) * 20 + body * (300 + 100 * random.rand(*shape))).astype(np.int16)
    voxels[:3] = 0
    return voxels


def write_nifti(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.5, 2.0, 1.0]) if affine is None else affine), path)
    return path


def write_pairs(folder: Path, count: int, shape: tuple[int, ...] = (40, 37, 21)) -> dict[str, str]:
    """Images with labels 0, 1, 2; returns `sources`."""
    for number in range(count):
        voxels = phantom(number, shape)
        write_nifti(folder / "images" / f"case_{number:02d}.nii.gz", voxels)
        write_nifti(folder / "labels" / f"case_{number:02d}.nii.gz", np.digitize(voxels, [200, 350]).astype(np.uint8))
    return {"images": str(folder / "images" / "*.nii.gz"), "labels": str(folder / "labels" / "*.nii.gz")}


def write_key(path: Path) -> str:
    """A subject key, for stores that must hide subjects in the same way."""
    path.write_text("5a" * 32)
    path.chmod(0o600)
    return str(path)


def config_of(sources: Any, out: Path, **options: Any) -> IngestConfig:
    from mimscale.config import build_config

    tree = {"class_names": ["air", "dark", "bright"], "workers": 1, "modality": "mr", "val_fraction": 0.3}
    return build_config(IngestConfig, {**tree, "sources": sources, "out": str(out), **options}, "test")


def make_store(folder: Path, count: int = 3, **options: Any) -> Path:
    """A store of `count` labelled volumes in two parts."""
    sources = write_pairs(folder / "sources", count)
    ingest(config_of(sources, folder / "store", **{"parts": 2, "chunk_voxels": 16, **options}))
    return folder / "store"


def opened(store: Path) -> tuple[Manifest, ShardReader]:
    manifest = load_manifest(store)
    return manifest, ShardReader(store, manifest)


def rows_of(store: Path) -> list[VolumeRow]:
    manifest = load_manifest(store)
    return [manifest.row(index) for index in range(len(manifest))]


def shard_index(pack: Path, row: VolumeRow, chunk_voxels: int) -> NDArray[np.uint64]:
    """Offset in its shard and length of every chunk of a volume: [chunks, 2]."""
    size = shard.index_bytes(row.shape, chunk_voxels)
    end = row.offset_bytes + row.length_bytes
    return shard.parse_index(pack.read_bytes()[end - size : end], row.length_bytes - size)
