"""Boxes of voxels out of packs: only the chunks that the box touches, each checked against its crc32c.

    C channels | Z Y X box, voxels

Shard indices and open files are cached. There are no threads and no file positions: a reader may be used
after a fork.
"""

import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store import layout, shard
from mimscale.store.manifest import Manifest, OverlayRow, SampleRow, VolumeRow

# A gap this small costs less to read than another request to a parallel file system.
COALESCE_GAP_BYTES = 256 * 1024


@dataclass(frozen=True)
class _Shard:
    """One array inside a pack: what differs between a volume and its overlay."""

    volume_id: str
    path: Path
    offset_bytes: int
    length_bytes: int
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    fill_value: float
    outside_value: float

    def broken(self, what: str) -> DataError:
        return DataError(
            f"volume {self.volume_id}: {self.path}: {what}; see what else is damaged with "
            "`mimscale inspect STORE --verify`, then remove this pack with its receipt and ingest again"
        )


class ShardReader:
    """Reads boxes of the volumes of a store.

    `bytes_read` counts what came from files, `voxels_decoded` what was decompressed: against the voxels that were asked
    for, they are the read amplification.
    """

    def __init__(
        self, store: Path, manifest: Manifest, *, max_open_files: int = 64, max_cached_indices: int = 4096
    ) -> None:
        self.manifest = manifest  # for callers that hold nothing but the reader
        self._store = store
        self._info = layout.read_info(store)
        self._max_open_files = max_open_files
        self._max_cached_indices = max_cached_indices
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._indices: OrderedDict[tuple[Path, int], NDArray[np.uint64]] = OrderedDict()
        self.bytes_read = 0
        self.voxels_decoded = 0

    def close(self) -> None:
        """Close the open packs; the reader opens them again when asked."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def read(
        self,
        row: VolumeRow | SampleRow,
        start_zyx: tuple[int, int, int],
        size_zyx: tuple[int, int, int],
        overlay: str | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Voxels of a box: [C, *size_zyx], or [1, *size_zyx] uint8 of an overlay.

        The box may reach beyond the volume: there the volume's fill value stands, and the ignore value in an overlay.

        Args:
            row: the volume.
            start_zyx: first voxel of the box; may be negative.
            size_zyx: edges of the box, voxels.
            overlay: name of an overlay, or None for the volume itself.
            out: where to put the voxels, instead of a new array.

        Raises:
            DataError: a pack that is missing, truncated or damaged, or a volume without this overlay.
        """
        target = self._overlay_shard(row, overlay) if overlay is not None else self._volume_shard(row)
        channels, *volume_zyx = target.shape
        if out is None:
            out = np.empty((channels, *size_zyx), dtype=target.dtype)
        if out.shape != (channels, *size_zyx):
            raise ValueError(f"out has shape {out.shape}, the box needs {(channels, *size_zyx)}")
        stop_zyx = [start + size for start, size in zip(start_zyx, size_zyx, strict=True)]
        low = [max(0, start) for start in start_zyx]
        high = [max(start, min(edge, stop)) for edge, stop, start in zip(volume_zyx, stop_zyx, low, strict=True)]
        if [*low, *high] != [*start_zyx, *stop_zyx]:
            out[...] = target.outside_value
        if any(start >= stop for start, stop in zip(low, high, strict=True)):
            return out
        inside: tuple[slice, ...] = tuple(
            slice(a - start, b - start) for a, b, start in zip(low, high, start_zyx, strict=True)
        )
        view = out[(slice(None), *inside)]
        if self._info.codec in layout.CODECS:
            self._read_chunks(target, low, high, view)
        else:
            self._read_with_zarr(target, low, high, view)
        return out

    def read_volume(self, row: VolumeRow | SampleRow, overlay: str | None = None) -> NDArray[Any]:
        """All voxels of a volume [C, Z, Y, X], or of its overlay [1, Z, Y, X], which may have a grid of its own.

        Errors as `read`.
        """
        target = self._overlay_shard(row, overlay) if overlay is not None else self._volume_shard(row)
        z, y, x = target.shape[1:]
        return self.read(row, (0, 0, 0), (z, y, x), overlay)

    def check(self, row: VolumeRow | SampleRow, overlay: str | None = None) -> list[str]:
        """Read every chunk of a shard and compare it with its crc32c, without decoding.

        Returns:
            what is wrong with each bad chunk.

        Raises:
            DataError: as `read`, but for bad chunks.
        """
        target = self._overlay_shard(row, overlay) if overlay is not None else self._volume_shard(row)
        if self._info.codec not in layout.CODECS:
            self._read_with_zarr(target, [0, 0, 0], list(target.shape[1:]), np.empty(target.shape, target.dtype))
            return []
        index = self._index(target)
        grid = shard.chunk_grid(target.shape, self._info.chunk_voxels)
        bad = []
        for number, (offset, length) in enumerate(index.tolist()):
            if offset != shard.EMPTY:
                try:
                    shard.check_chunk(self._pread(target, offset, length))
                except ValueError as error:
                    corner = tuple(map(int, np.unravel_index(number, grid)))
                    bad.append(str(target.broken(f"chunk {corner}: {error}")))
        return bad

    def _volume_shard(self, row: VolumeRow | SampleRow) -> _Shard:
        path = layout.pack_path(self._store, row.part)
        dtype = np.dtype(row.dtype)
        return _Shard(
            row.id, path, row.offset_bytes, row.length_bytes, row.shape, dtype, row.fill_value, row.fill_value
        )

    def _overlay_shard(self, row: VolumeRow | SampleRow, name: str) -> _Shard:
        place: OverlayRow | None = row.overlays.get(name)
        if place is None:
            has = ", ".join(row.overlays) or "none"
            raise DataError(f"volume {row.id}: has no overlay {name!r} (it has: {has}); ingest it with a label file")
        path = layout.overlay_path(self._store, name, place.part)
        shape_zyx = row.shape[1:]
        if place.on_source_grid:
            if not isinstance(row, VolumeRow):
                raise DataError(
                    f"volume {row.id}: overlay {name!r} lies on the grid of the source, not on that of the stored "
                    f"volume; use overlay={layout.stored_overlay(name)}"
                )
            shape_zyx = row.source_zyx
        shape = (1, *shape_zyx)
        ignore = float(layout.IGNORE_VALUE)
        return _Shard(row.id, path, place.offset_bytes, place.length_bytes, shape, np.dtype(np.uint8), 0.0, ignore)

    def _read_chunks(self, target: _Shard, low: list[int], high: list[int], view: NDArray[Any]) -> None:
        """Decode the chunks that the box [low, high) touches into `view` [C, Z, Y, X]."""
        edge = self._info.chunk_voxels
        index = self._index(target)
        grid = shard.chunk_grid(target.shape, edge)
        corners = list(product(*(range(a // edge, -(-b // edge)) for a, b in zip(low, high, strict=True))))
        wanted = []
        for channel in range(grid[0]):
            for corner in corners:
                number = ((channel * grid[1] + corner[0]) * grid[2] + corner[1]) * grid[3] + corner[2]
                offset, length = index[number].tolist()
                box = [(max(a, c * edge), min(b, (c + 1) * edge)) for a, b, c in zip(low, high, corner, strict=True)]
                there = tuple(slice(a - start, b - start) for (a, b), start in zip(box, low, strict=True))
                place = view[channel][there]
                if offset == shard.EMPTY:
                    place[...] = target.fill_value
                else:
                    cut = tuple(slice(a - c * edge, b - c * edge) for (a, b), c in zip(box, corner, strict=True))
                    wanted.append((offset, length, (channel, *corner), cut, place))
        wanted.sort(key=lambda chunk: chunk[0])
        scratch = np.empty((edge, edge, edge), dtype=target.dtype.newbyteorder("<"))
        for start, stop, members in _runs(wanted):
            data = memoryview(self._pread(target, start, stop - start))
            for offset, length, corner4, cut, place in members:
                try:
                    shard.decode_chunk(data[offset - start : offset - start + length], scratch)
                except ValueError as error:
                    raise target.broken(f"chunk {corner4}: {error}") from None
                place[...] = scratch[cut]
                self.voxels_decoded += scratch.size

    def _index(self, target: _Shard) -> NDArray[np.uint64]:
        key = (target.path, target.offset_bytes)
        index = self._indices.get(key)
        if index is None:
            size = shard.index_bytes(target.shape, self._info.chunk_voxels)
            data_bytes = target.length_bytes - size
            if data_bytes < 0:
                raise target.broken(f"its shard has {target.length_bytes} bytes, its index alone needs {size}")
            try:
                index = shard.parse_index(self._pread(target, data_bytes, size), data_bytes)
            except ValueError as error:
                raise target.broken(str(error)) from None
            self._indices[key] = index
            if len(self._indices) > self._max_cached_indices:
                self._indices.popitem(last=False)
        else:
            self._indices.move_to_end(key)
        return index

    def _pread(self, target: _Shard, offset: int, length: int) -> bytes:
        """Bytes of a shard, `offset` counted from its start."""
        with durable.explained(DataError, target.path, f"volume {target.volume_id} lies in it; restore the pack"):
            file = self._open(target.path)
            position = target.offset_bytes + offset
            pieces = []
            missing = length
            while missing:
                piece = os.pread(file, missing, position)
                if not piece:
                    raise target.broken(f"truncated: ends at byte {position}, {missing} bytes early")
                pieces.append(piece)
                position += len(piece)
                missing -= len(piece)
        self.bytes_read += length
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _open(self, path: Path) -> int:
        file = self._files.get(path)
        if file is None:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[path] = file
            if len(self._files) > self._max_open_files:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(path)
        return file

    def _read_with_zarr(self, target: _Shard, low: list[int], high: list[int], view: NDArray[Any]) -> None:
        """Any codec chain that zarr-python knows, several times slower."""
        import zarr
        from zarr.storage import ZipStore

        box = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
        try:
            with ZipStore(target.path, mode="r") as files:
                array = zarr.open_array(store=files, path=f"{target.volume_id}/0", mode="r")
                voxels = np.asarray(array[box])
        except Exception as error:  # whatever a codec raises, the volume cannot be read
            raise target.broken(f"zarr-python cannot read it ({type(error).__name__}: {error})") from error
        view[...] = voxels
        self.bytes_read += math.prod(voxels.shape) * voxels.itemsize
        self.voxels_decoded += voxels.size


def _runs(chunks: list[tuple[int, int, Any, Any, Any]]) -> list[tuple[int, int, list[tuple[int, int, Any, Any, Any]]]]:
    """Group chunks, sorted by offset, into ranges that are read at once: (start, stop, chunks)."""
    runs: list[tuple[int, int, list[tuple[int, int, Any, Any, Any]]]] = []
    for chunk in chunks:
        start, stop = chunk[0], chunk[0] + chunk[1]
        if runs and start - runs[-1][1] <= COALESCE_GAP_BYTES:
            first, last, members = runs[-1]
            members.append(chunk)
            runs[-1] = (first, max(last, stop), members)
        else:
            runs.append((start, stop, [chunk]))
    return runs
