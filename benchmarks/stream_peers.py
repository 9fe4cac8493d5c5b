"""Contenders of the stream benchmark that need other packages or files of their own."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from mimscale.bench.contender import Crops, Job
from mimscale.bench.readers import array_folder, unzip_volumes
from mimscale.store.manifest import SAMPLE_COLUMNS, load_manifest
from mimscale.store.reader import ShardReader

# nnU-Net 2.8's comp_blosc2_params for patches of 96^3 and 128^3, at its four bytes a voxel: blocks of 128 KiB,
# chunks of at most 6 MiB and 1.5 patches.
BLOSC2_BLOCK, BLOSC2_CHUNK = (1, 32, 32, 32), (1, 96, 128, 128)
SAMPLES_A_VOLUME = 4  # crops that MONAI and TorchIO cut from a volume that they have loaded


def prepare(store: Path, rows: list[int], folder: Path) -> dict[str, float]:
    """Write the same voxels in every peer's format; returns MB of each, for all volumes."""
    import blosc2

    manifest = load_manifest(store, SAMPLE_COLUMNS)
    reader = ShardReader(store, manifest)
    selected = [manifest.sample_row(row) for row in rows]
    unzip_volumes(store, selected, folder)
    sizes = {"mimscale": sum(row.length_bytes for row in selected) / 1e6}
    for row in selected:
        volume = reader.read_volume(row)
        np.save(folder / f"{row.id}.npy", volume)
        nibabel.save(nibabel.Nifti1Image(volume[0].T, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / f"{row.id}.nii.gz")
        _write_blosc2(blosc2, volume, folder / f"{row.id}.b2nd")
        # What nnU-Net writes are normalised floats.
        floats = (volume - volume.mean(dtype=np.float64)) / volume.std(dtype=np.float64)
        _write_blosc2(blosc2, floats.astype(np.float32), folder / f"{row.id}.float32.b2nd")
    for suffix in (".npy", ".nii.gz", ".b2nd", ".float32.b2nd"):
        sizes[suffix] = sum((folder / f"{row.id}{suffix}").stat().st_size for row in selected) / 1e6
    return {name: round(size, 1) for name, size in sizes.items()}


def _write_blosc2(blosc2: Any, volume: np.ndarray, path: Path) -> None:
    """As nnU-Net does: LZ4HC level 5, with the shuffle or none, whichever is smaller."""
    candidates = []
    for number, shuffle in enumerate((blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE)):
        candidate = path.with_suffix(f".{number}")
        candidates.append(candidate)
        blosc2.asarray(
            volume,
            chunks=tuple(map(min, BLOSC2_CHUNK, volume.shape)),
            blocks=BLOSC2_BLOCK,
            urlpath=str(candidate),
            mode="w",
            cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [shuffle], "nthreads": 1},
        )
    best, worst = sorted(candidates, key=lambda candidate: candidate.stat().st_size)
    best.rename(path)
    worst.unlink()


class _Arrays:
    """Contenders that hold one array a volume and are asked for boxes of it."""

    bytes_mapped = 0  # blosc2 and npy are mapped, and do not count

    def __init__(self, job: Job) -> None:
        self._folder, self._crops = Path(job.folder), Crops(job)
        self._arrays: list[Any] = []
        self.voxels_decoded = 0

    def open(self) -> None:
        self._arrays = [self._open(row.id) for row in self._crops.rows]

    def close(self) -> None:
        self._arrays = []

    def read(self, number: int) -> int:
        volume, origins = self._crops.call(number)
        size = np.array(self._crops.size)
        first = np.array(origins).min(axis=0)
        # Several crops of a region: the box around them is read once, and copied from.
        box = self._box(self._arrays[volume], first, np.array(origins).max(axis=0) + size)
        for origin in np.array(origins) - first:
            if len(origins) > 1:
                np.ascontiguousarray(box[(slice(None), *map(slice, origin, origin + size))])
        around = tuple(int(edge) for edge in np.array(origins).max(axis=0) + size - first)
        self.voxels_decoded += self._decoded(volume, tuple(map(int, first)), around)
        return self._crops.mode.crops

    def _open(self, volume_id: str) -> Any:
        raise NotImplementedError

    def _box(self, array: Any, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return np.asarray(array[(slice(None), *map(slice, first.tolist(), stop.tolist()))])

    def _decoded(self, volume: int, first: tuple[int, ...], size: tuple[int, ...]) -> int:
        """All of them read whole cubes of 32."""
        edge = self._crops.chunk_voxels
        sides = [-(-(start + side) // edge) - start // edge for start, side in zip(first, size, strict=True)]
        return int(np.prod(sides)) * edge**3


class Zarrs(_Arrays):
    """zarr-python with the pipeline of zarrs, one thread."""

    def _open(self, volume_id: str) -> Any:
        import zarr

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
        return zarr.open_array(array_folder(self._folder, volume_id), mode="r")


class TensorStore(_Arrays):
    """tensorstore without a cache, one thread that decodes; as many as it likes that read."""

    def _open(self, volume_id: str) -> Any:
        import tensorstore

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{array_folder(self._folder, volume_id)}/"},
            "context": {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}},
        }
        return tensorstore.open(spec, read=True).result()

    def _box(self, array: Any, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return array[(slice(None), *map(slice, first.tolist(), stop.tolist()))].read().result()


class Blosc2(_Arrays):
    """As nnU-Net's dataset class opens it: mapped, one thread."""

    suffix = ".b2nd"

    def _open(self, volume_id: str) -> Any:
        import blosc2

        blosc2.set_nthreads(1)
        path = str(self._folder / f"{volume_id}{self.suffix}")
        return blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})


class Blosc2Float(Blosc2):
    """The floats that nnU-Net writes, twice the bytes of the scanner's numbers."""

    suffix = ".float32.b2nd"


class Npy(_Arrays):
    """Uncompressed, mapped."""

    def _open(self, volume_id: str) -> Any:
        return np.load(self._folder / f"{volume_id}.npy", mmap_mode="r")

    def _box(self, array: Any, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return np.array(super()._box(array, first, stop))  # a copy: a mapped view has read nothing

    def _decoded(self, volume: int, first: tuple[int, ...], size: tuple[int, ...]) -> int:
        return int(np.prod(size))


class Nifti(_Arrays):
    """The whole compressed volume for each crop, as the simplest dataset class does."""

    def _open(self, volume_id: str) -> Any:
        return self._folder / f"{volume_id}.nii.gz"

    def _box(self, array: Any, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        volume = np.asanyarray(nibabel.load(array).dataobj).T
        return np.ascontiguousarray(volume[tuple(map(slice, first.tolist(), stop.tolist()))])[None]

    def _decoded(self, volume: int, first: tuple[int, ...], size: tuple[int, ...]) -> int:
        return int(np.prod(self._crops.rows[volume].shape))


class Monai:
    """PersistentDataset (whole volumes as tensors on disk) and four random crops of each that is loaded."""

    bytes_mapped = 0

    def __init__(self, job: Job) -> None:
        warnings.simplefilter("ignore")
        self._folder, self._crops = Path(job.folder), Crops(job)
        self.voxels_decoded = 0

    def open(self) -> None:
        import torch
        from monai.data import PersistentDataset
        from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropSamplesd

        torch.set_num_threads(1)
        crop = RandSpatialCropSamplesd(["image"], self._crops.size, SAMPLES_A_VOLUME, random_size=False)
        transform = Compose([LoadImaged(["image"], image_only=True), EnsureChannelFirstd(["image"]), crop])
        items = [{"image": str(self._folder / f"{row.id}.nii.gz")} for row in self._crops.rows]
        self._dataset = PersistentDataset(items, transform, cache_dir=self._folder / "monai")
        for number in range(len(items)):
            self._dataset[number]

    def read(self, number: int) -> int:
        volume, _ = self._crops.call(number)
        crops = self._dataset[volume]
        for crop in crops:
            crop["image"].contiguous()
        self.voxels_decoded += int(np.prod(self._crops.rows[volume].shape))
        return len(crops)

    def close(self) -> None:
        del self._dataset


class TorchIO:
    """Queue of whole NIfTI volumes, four uniform samples of each."""

    bytes_mapped = 0

    def __init__(self, job: Job) -> None:
        warnings.simplefilter("ignore")
        self._folder, self._crops = Path(job.folder), Crops(job)
        self.voxels_decoded = 0

    def open(self) -> None:
        import torch
        import torchio

        torch.set_num_threads(1)
        paths = [self._folder / f"{row.id}.nii.gz" for row in self._crops.rows]
        subjects = torchio.SubjectsDataset([torchio.Subject(image=torchio.ScalarImage(path)) for path in paths])
        sampler = torchio.UniformSampler(self._crops.size)
        # A queue of one volume: it hands out samples once it is full, and how many volumes it holds changes no rate.
        self._queue = torchio.Queue(subjects, SAMPLES_A_VOLUME, SAMPLES_A_VOLUME, sampler, num_workers=0)
        self._samples = self._endless(torchio)

    def _endless(self, torchio: Any) -> Iterator[Any]:
        while True:
            yield from torchio.SubjectsLoader(self._queue, batch_size=1, num_workers=0)

    def read(self, number: int) -> int:
        for _ in range(SAMPLES_A_VOLUME):
            next(self._samples)
        self.voxels_decoded += int(np.prod(self._crops.rows[0].shape))
        return SAMPLES_A_VOLUME

    def close(self) -> None:
        self._samples.close()
        del self._queue
