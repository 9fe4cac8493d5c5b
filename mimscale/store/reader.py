"""Boxes of voxels out of packs: only the chunks that the box touches, each checked against its crc32c.

    C channels | Z Y X box, voxels

Shard indices and open files are cached. There are no threads and no file positions: a reader may be used
after a fork, by one thread at a time.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store import layout, native, shard
from mimscale.store.files import Files, OpenFile, local_path, url_of
from mimscale.store.manifest import Manifest
from mimscale.store.pieces import Box, Triple, pieces_of
from mimscale.store.rows import OverlayRow, SampleRow, VolumeRow

# Chunks nearer than a gap are read at once, with what lies between them. How large a gap is worth that depends on what
# a request costs: a microsecond when the page cache has the data, a millisecond on a parallel file system. The reader
# measures it, and begins low: many requests tell more, and soon.
_BYTES_PER_S = 1e9  # of one stream of a parallel file system: what a byte costs besides the request
_SMALLEST_REQUEST_S, _FIRST_GUESS_S, _LARGEST_REQUEST_S = 4e-6, 30e-6, 1e-3
_STEP = 1.2  # up or down at each request: a running median, which a rare hiccup of a server does not move
_LARGEST_READ_BYTES = 4 * 1024 * 1024
_ADVISE_FROM_S = 50e-6  # from here on the kernel is told of all reads at once, to work on them side by side

_Chunk = tuple[int, int, int]  # its number in C order of the chunk grid, start and stop of its bytes in the shard


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

    @property
    def fill(self) -> bytes:
        """A voxel of air."""
        return np.array(self.fill_value, dtype=self.dtype).tobytes()

    def broken(self, what: str) -> DataError:
        return DataError(
            f"volume {self.volume_id}: {self.path}: {what}; see what else is damaged with "
            "`mimscale inspect STORE --verify`, then remove this pack with its receipt and ingest again"
        )


class ShardReader:
    """Reads boxes of the volumes of a store.

    `bytes_read` counts what came from files (`bytes_mapped` of them out of mappings), `voxels_decoded` what was
    decompressed: against the voxels that were asked for, they are the read amplification.
    """

    def __init__(
        self, store: Path, manifest: Manifest, files: Files | None = None, *, max_cached_indices: int = 4096
    ) -> None:
        self.manifest = manifest  # for callers that hold nothing but the reader
        self._store = store
        self._info = layout.read_info(store)
        self._max_cached_indices = max_cached_indices
        self._files = Files() if files is None else files
        self._indices: OrderedDict[tuple[Path, int], NDArray[np.uint64]] = OrderedDict()
        # The same objects again: comparing paths that are equal but not the same takes longer than finding a chunk.
        self._pack_path = lru_cache(max_cached_indices)(partial(layout.pack_path, store))
        self._overlay_path = lru_cache(max_cached_indices)(partial(layout.overlay_path, store))
        self._inside: set[Path] = set()  # packs that are known to lie in the store
        self._buffer = memoryview(bytearray())
        self._request_s = _FIRST_GUESS_S
        self.bytes_read = self.bytes_mapped = 0
        self.voxels_decoded = 0

    def close(self) -> None:
        """Close the open packs; the reader opens them again when asked."""
        self._files.close()

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
            DataError: a pack that is missing, truncated or damaged, a volume without this overlay, or an overlay on
                the grid of the source, where a box would lie elsewhere.
        """
        (crop,) = self.read_crops(row, [start_zyx], size_zyx, overlay, None if out is None else [out])
        return crop

    def read_crops(
        self,
        row: VolumeRow | SampleRow,
        starts_zyx: Sequence[tuple[int, int, int]],
        size_zyx: tuple[int, int, int],
        overlay: str | None = None,
        out: Sequence[NDArray[Any]] | None = None,
    ) -> Sequence[NDArray[Any]]:
        """Several crops of one volume, as `read` gives them; what they share is read and decoded once.

        Args:
            row: the volume.
            starts_zyx: first voxel of each crop; may be negative.
            size_zyx: edges of the crops, voxels.
            overlay: name of an overlay, or None for the volume itself.
            out: where to put the voxels of each crop, instead of new arrays.

        Raises:
            DataError: as `read`; all of `out` is then undefined.
        """
        if overlay is not None and overlay in row.overlays and row.overlays[overlay].source_zyx is not None:
            raise DataError(
                f"volume {row.id}: overlay {overlay!r} lies on the grid of the source, not on that of the stored "
                f"volume; use overlay={layout.stored_overlay(overlay)}"
            )
        return self._read(self._shard(row, overlay), starts_zyx, size_zyx, out)

    def _read(
        self,
        target: _Shard,
        starts_zyx: Sequence[tuple[int, int, int]],
        size_zyx: tuple[int, int, int],
        out: Sequence[NDArray[Any]] | None = None,
    ) -> Sequence[NDArray[Any]]:
        shape = (target.shape[0], *size_zyx)
        if out is None:
            out = list(np.empty((len(starts_zyx), *shape), dtype=target.dtype))
        boxes: list[Box] = []
        for start_zyx, crop in zip(starts_zyx, out, strict=True):
            if crop.shape != shape:
                raise ValueError(f"out has shape {crop.shape}, the box needs {shape}")
            low, stop = _clipped(start_zyx, size_zyx, target.shape[1:])
            is_inside = all(stop[axis] - low[axis] == size_zyx[axis] for axis in range(3))
            if not is_inside:
                crop[...] = target.outside_value
            if all(low[axis] < stop[axis] for axis in range(3)):
                z, y, x = (slice(a - start, b - start) for a, b, start in zip(low, stop, start_zyx, strict=True))
                boxes.append((low, stop, crop if is_inside else crop[:, z, y, x]))
        if self._info.codec in layout.CODECS:
            with self._explained(target):
                self._read_chunks(target, boxes)
        else:
            for low, stop, view in boxes:
                self._read_with_zarr(target, low, stop, view)
        return out

    def read_volume(self, row: VolumeRow | SampleRow, overlay: str | None = None) -> NDArray[Any]:
        """All voxels of a volume [C, Z, Y, X], or of its overlay [1, Z, Y, X], which may have a grid of its own.

        Raises:
            DataError: a pack that is missing, truncated or damaged, or a volume without this overlay.
        """
        target = self._shard(row, overlay)
        (volume,) = self._read(target, [(0, 0, 0)], target.shape[1:])
        return volume

    def check(self, row: VolumeRow | SampleRow, overlay: str | None = None) -> list[str]:
        """Read every chunk of a shard and compare it with its crc32c, without decoding.

        Returns:
            what is wrong with each bad chunk.

        Raises:
            DataError: as `read`, but for bad chunks.
        """
        target = self._shard(row, overlay)
        if self._info.codec not in layout.CODECS:
            self._read_with_zarr(target, (0, 0, 0), target.shape[1:], np.empty(target.shape, target.dtype))
            return []
        bad = []
        with self._explained(target):
            file = self._files.open(target.path)
            index = self._index(target, file)
            numbers = np.flatnonzero(index[:, 0] != shard.EMPTY)
            for number, data in self._encoded_chunks(target, file, numbers, index):
                try:
                    shard.check_chunk(data)
                except ValueError as error:
                    bad.append((number, str(target.broken(f"chunk {self._corner(target, number)}: {error}"))))
        return [what for _, what in sorted(bad)]

    def _shard(self, row: VolumeRow | SampleRow, overlay: str | None) -> _Shard:
        target = self._volume_shard(row) if overlay is None else self._overlay_shard(row, overlay)
        if target.path not in self._inside:
            layout.refuse_link_out(self._store, target.path)
            self._inside.add(target.path)
        return target

    def _volume_shard(self, row: VolumeRow | SampleRow) -> _Shard:
        path = self._pack_path(row.part)
        dtype = np.dtype(row.dtype)
        return _Shard(
            row.id, path, row.offset_bytes, row.length_bytes, row.shape, dtype, row.fill_value, row.fill_value
        )

    def _overlay_shard(self, row: VolumeRow | SampleRow, name: str) -> _Shard:
        place: OverlayRow | None = row.overlays.get(name)
        if place is None:
            has = ", ".join(row.overlays) or "none"
            raise DataError(f"volume {row.id}: has no overlay {name!r} (it has: {has}); ingest it with a label file")
        path = self._overlay_path(name, place.part)
        shape = (1, *(place.source_zyx or row.shape[1:]))
        ignore = float(layout.IGNORE_VALUE)
        return _Shard(row.id, path, place.offset_bytes, place.length_bytes, shape, np.dtype(np.uint8), 0.0, ignore)

    def _read_chunks(self, target: _Shard, boxes: list[Box]) -> None:
        """Decode the chunks that the boxes [low, stop) touch into their views [C, Z, Y, X]."""
        file = self._files.open(target.path)
        index = self._index(target, file)
        if native.read_boxes is not None and all(_is_plain(view, target.dtype) for _, _, view in boxes):
            self._read_chunks_in_c(native.read_boxes, target, boxes, file, index)
        else:
            self._read_chunks_in_python(target, boxes, file, index)

    def _read_chunks_in_c(
        self,
        read_boxes: Callable[..., Any],
        target: _Shard,
        boxes: list[Box],
        file: OpenFile,
        index: NDArray[np.uint64],
    ) -> None:
        edge = self._info.chunk_voxels

        def announce(ranges: list[tuple[int, int]]) -> None:
            file.will_read([(target.offset_bytes + start, length) for start, length in ranges])

        def decode(source: Any, ask: int = -1) -> tuple[int, bytes] | None:
            damaged: tuple[int, bytes] | None
            num_decoded, damaged, bytes_copied = read_boxes(
                index,
                shard.chunk_grid(target.shape, edge),
                edge,
                target.fill,
                boxes,
                self._gap_bytes(file),
                _LARGEST_READ_BYTES,
                announce if self._is_worth_announcing(file) else None,
                source,
                ask,
                target.offset_bytes,
            )
            self.voxels_decoded += num_decoded * edge**3
            self.bytes_read += bytes_copied
            self.bytes_mapped += bytes_copied
            return damaged

        window = self._files.window(target.path, target.offset_bytes, target.length_bytes)
        if window is not None and decode(*window) is None:
            return
        # Also after a mapping that cannot be read, or not at once, or has a damaged chunk: reading says what is wrong.
        damaged = decode(partial(self._pread, target, file))
        if damaged is not None:
            number, data = damaged
            self._decode(target, number, data, memoryview(bytearray(edge**3 * target.dtype.itemsize)))
            raise AssertionError("the loop in Python takes what the one in C refuses")

    def _read_chunks_in_python(
        self, target: _Shard, boxes: list[Box], file: OpenFile, index: NDArray[np.uint64]
    ) -> None:
        edge = self._info.chunk_voxels
        scratch = np.empty((edge, edge, edge), dtype=target.dtype.newbyteorder("<"))
        pieces = pieces_of(boxes, scratch, shard.chunk_grid(target.shape, edge))
        numbers = np.fromiter(pieces, dtype=np.int64, count=len(pieces))
        empty = index[numbers, 0] == shard.EMPTY
        scratch[...] = target.fill_value
        for number in numbers[empty].tolist():
            for crop, place, chunk, cut in pieces[number]:
                crop[place] = chunk[cut]
        numbers = numbers[~empty]
        decoded = scratch.reshape(-1).view(np.uint8).data
        for number, data in self._encoded_chunks(target, file, numbers, index):
            self._decode(target, number, data, decoded)
            for crop, place, chunk, cut in pieces[number]:
                crop[place] = chunk[cut]
        self.voxels_decoded += len(numbers) * scratch.size

    def _decode(self, target: _Shard, number: int, data: bytes | memoryview, decoded: memoryview) -> None:
        try:
            shard.decode_chunk(data, decoded)
        except ValueError as error:
            raise target.broken(f"chunk {self._corner(target, number)}: {error}") from None

    def _encoded_chunks(
        self, target: _Shard, file: OpenFile, numbers: NDArray[np.int64], index: NDArray[np.uint64]
    ) -> Iterator[tuple[int, memoryview]]:
        """Read the chunks `numbers` [n], sorted by where they lie; each is valid until the next."""
        if not len(numbers):
            return
        ranges = index[numbers].astype(np.int64)
        order = np.argsort(ranges[:, 0])
        starts, stops = ranges[order, 0], ranges[order].sum(axis=1)
        breaks = np.flatnonzero(starts[1:] - stops[:-1] > self._gap_bytes(file)) + 1
        chunks = list(zip(numbers[order].tolist(), starts.tolist(), stops.tolist(), strict=True))
        edges = [0, *breaks.tolist(), len(chunks)]
        runs = [run for first, last in pairwise(edges) for run in _cut_run(chunks[first:last])]
        if len(runs) > 1 and self._is_worth_announcing(file):
            file.will_read([(target.offset_bytes + run[0][1], run[-1][2] - run[0][1]) for run in runs])
        for run in runs:
            base = run[0][1]
            data = self._pread(target, file, base, run[-1][2] - base)
            for number, start, stop in run:
                yield number, data[start - base : stop - base]

    def _gap_bytes(self, file: OpenFile) -> int:
        """Chunks nearer than this are read at once."""
        return int(self._request_s * _BYTES_PER_S) if file.gap_bytes is None else file.gap_bytes

    def _is_worth_announcing(self, file: OpenFile) -> bool:
        return self._request_s > _ADVISE_FROM_S or file.gap_bytes is not None

    def _corner(self, target: _Shard, number: int) -> tuple[int, ...]:
        grid = shard.chunk_grid(target.shape, self._info.chunk_voxels)
        return tuple(map(int, np.unravel_index(number, grid)))

    def _index(self, target: _Shard, file: OpenFile) -> NDArray[np.uint64]:
        key = (target.path, target.offset_bytes)
        index = self._indices.get(key)
        if index is None:
            size = shard.index_bytes(target.shape, self._info.chunk_voxels)
            data_bytes = target.length_bytes - size
            if data_bytes < 0:
                raise target.broken(f"its shard has {target.length_bytes} bytes, its index alone needs {size}")
            try:
                index = shard.parse_index(self._pread(target, file, data_bytes, size), data_bytes)
            except ValueError as error:
                raise target.broken(str(error)) from None
            self._indices[key] = index
            if len(self._indices) > self._max_cached_indices:
                self._indices.popitem(last=False)
        else:
            self._indices.move_to_end(key)
        return index

    def _pread(self, target: _Shard, file: OpenFile, offset: int, length: int) -> memoryview:
        """Bytes of a shard, `offset` counted from its start; valid until the next call."""
        if len(self._buffer) < length:
            self._buffer = memoryview(bytearray(length))
        data = self._buffer[:length]
        position = target.offset_bytes + offset
        began = time.perf_counter()
        done = file.read_into(position, data)
        if done < length:
            raise target.broken(f"truncated: ends at byte {position + done}, {length - done} bytes early")
        request_s = time.perf_counter() - began - length / _BYTES_PER_S
        self._request_s *= _STEP if request_s > self._request_s else 1 / _STEP
        self._request_s = min(max(self._request_s, _SMALLEST_REQUEST_S), _LARGEST_REQUEST_S)
        self.bytes_read += length
        return data

    def _explained(self, target: _Shard) -> AbstractContextManager[None]:
        return durable.explained(DataError, target.path, f"volume {target.volume_id} lies in it; restore the pack")

    def _read_with_zarr(self, target: _Shard, low: Triple, high: Triple, view: NDArray[Any]) -> None:
        """Any codec chain that zarr-python knows, several times slower."""
        import zarr
        from zarr.storage import ZipStore

        if url_of(target.path) is not None:
            raise target.broken(f"codec {self._info.codec} needs zarr-python, which reads files: copy the store")
        box = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
        try:
            with ZipStore(local_path(target.path), mode="r") as files:
                array = zarr.open_array(store=files, path=f"{target.volume_id}/0", mode="r")
                voxels = np.asarray(array[box])
        except Exception as error:  # whatever a codec raises, the volume cannot be read
            raise target.broken(f"zarr-python cannot read it ({type(error).__name__}: {error})") from error
        view[...] = voxels
        self.bytes_read += math.prod(voxels.shape) * voxels.itemsize
        self.voxels_decoded += voxels.size


def _clipped(start_zyx: Triple, size_zyx: Triple, shape_zyx: Triple) -> tuple[Triple, Triple]:
    """The part of a box that lies in a volume; stop <= low along an axis where none does."""
    z, y, x = start_zyx
    dz, dy, dx = size_zyx
    last_z, last_y, last_x = shape_zyx
    stop = (min(z + dz, last_z), min(y + dy, last_y), min(x + dx, last_x))
    return (max(z, 0), max(y, 0), max(x, 0)), stop


def _is_plain(view: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """True for memory that holds voxels as the shard does, each row without gaps."""
    return view.dtype == dtype and view.strides[-1] == view.itemsize


def _cut_run(run: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Cut a run so that it is read in pieces of at most `_LARGEST_READ_BYTES`, or of one chunk."""
    first = 0
    for place, (_, _, stop) in enumerate(run):
        if place > first and stop - run[first][1] > _LARGEST_READ_BYTES:
            yield run[first:place]
            first = place
    yield run[first:]
