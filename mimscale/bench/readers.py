"""Contenders that need nothing but mimscale: its reader, what limits it, and stock zarr-python."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np

from mimscale.bench.contender import Crops, Job
from mimscale.bench.crops import chunks_of
from mimscale.store import layout, shard
from mimscale.store.files import Files, ReadBy
from mimscale.store.reader import ShardReader
from mimscale.store.rows import SampleRow


class OwnReader:
    """`ShardReader`, into memory that is reused, as the loader uses it."""

    read_by: ReadBy = "auto"

    def __init__(self, job: Job) -> None:
        self._store, self._crops = Path(job.store), Crops(job)
        self._voxels_of_closed = self._bytes_of_closed = 0

    def open(self) -> None:
        """As `Contender`."""
        self._reader = ShardReader(self._store, self._crops.manifest, Files(read_by=self.read_by))
        calls = self._crops.mode.crops
        self._out = [np.empty((calls, row.shape[0], *self._crops.size), dtype=row.dtype) for row in self._crops.rows]

    def read(self, number: int) -> int:
        """As `Contender`."""
        volume, origins = self._crops.call(number)
        self._reader.read_crops(
            self._crops.rows[volume], origins, self._crops.size, out=list(self._out[volume][: len(origins)])
        )
        return self._crops.mode.crops

    def close(self) -> None:
        """As `Contender`."""
        self._voxels_of_closed += self._reader.voxels_decoded
        self._bytes_of_closed += self._reader.bytes_mapped
        self._reader.close()

    @property
    def voxels_decoded(self) -> int:
        """As `Contender`."""
        return self._voxels_of_closed + self._reader.voxels_decoded

    @property
    def bytes_mapped(self) -> int:
        """As `Contender`."""
        return self._bytes_of_closed + self._reader.bytes_mapped


class OwnReaderByCalls(OwnReader):
    """The same without mappings: as it reads from a parallel file system."""

    read_by: ReadBy = "pread"


class Ceiling:
    """Nothing but Blosc: the encoded chunks lie in memory, and what is decoded is overwritten by the next chunk."""

    bytes_mapped = 0

    def __init__(self, job: Job) -> None:
        self._store, self._crops = Path(job.store), Crops(job)
        self.voxels_decoded = 0

    def open(self) -> None:
        """As `Contender`."""
        self._chunks = [self._encoded_chunks(number) for number in range(len(self._crops.rows))]

    def read(self, number: int) -> int:
        """As `Contender`."""
        volume, origins = self._crops.call(number)
        edge = self._crops.chunk_voxels
        channels, grid = self._crops.rows[volume].shape[0], self._chunks[volume]
        decoded = bytearray(edge**3 * np.dtype(self._crops.rows[volume].dtype).itemsize)
        for corner in chunks_of(origins, self._crops.size, edge):
            for channel in range(channels):
                if (data := grid.get((channel, *corner))) is not None:
                    imagecodecs.blosc_decode(data, out=decoded, numthreads=1)
                    self.voxels_decoded += edge**3
        return self._crops.mode.crops

    def close(self) -> None:
        """As `Contender`."""
        self._chunks = []

    def _encoded_chunks(self, volume: int) -> dict[tuple[int, ...], bytes]:
        row = self._crops.rows[volume]
        with layout.pack_path(self._store, row.part).open("rb") as file:
            file.seek(row.offset_bytes)
            data = file.read(row.length_bytes)
        size = shard.index_bytes(row.shape, self._crops.chunk_voxels)
        index = shard.parse_index(data[-size:], len(data) - size)
        grid = shard.chunk_grid(row.shape, self._crops.chunk_voxels)
        return {
            tuple(map(int, np.unravel_index(number, grid))): data[offset : offset + length - shard.CRC_BYTES]
            for number, (offset, length) in enumerate(index.tolist())
            if offset != shard.EMPTY
        }


class ZarrPython:
    """Stock zarr-python, on unzipped copies: inside a zip it reads whole volumes."""

    bytes_mapped = 0

    def __init__(self, job: Job) -> None:
        self._folder, self._crops = Path(job.folder), Crops(job)
        self.voxels_decoded = 0

    def open(self) -> None:
        """As `Contender`."""
        import zarr

        self._arrays = [zarr.open_array(array_folder(self._folder, row.id), mode="r") for row in self._crops.rows]

    def read(self, number: int) -> int:
        """As `Contender`."""
        volume, origins = self._crops.call(number)
        for z, y, x in origins:
            dz, dy, dx = self._crops.size
            np.asarray(self._arrays[volume][:, z : z + dz, y : y + dy, x : x + dx])
            self.voxels_decoded += self._crops.touched_voxels(volume, [(z, y, x)])
        return self._crops.mode.crops

    def close(self) -> None:
        """As `Contender`."""
        self._arrays = []


def unzip_volumes(store: Path, rows: Sequence[SampleRow], folder: Path) -> None:
    """Copy volumes out of their packs, file by file: what the other Zarr readers open."""
    for row in rows:
        with zipfile.ZipFile(layout.pack_path(store, row.part)) as pack:
            pack.extractall(folder / "zarr", [name for name in pack.namelist() if name.startswith(f"{row.id}/")])


def array_folder(folder: Path, volume_id: str) -> Path:
    """Where `unzip_volumes` put the array of a volume."""
    return folder / "zarr" / volume_id / "0"
