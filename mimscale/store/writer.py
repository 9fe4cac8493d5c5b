"""Packs: an uncompressed zip of a Zarr store with many volumes, complete or absent.

Timestamps, order and attributes are fixed, so that the same volumes always give the same bytes.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store import shard

SHARD_KEY = "0/c.0.0.0.0"  # array `0` of a volume's group, its only shard
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time that a zip can hold
_WAY_OUT = "free some space and run the same command again; finished parts are kept"


@dataclass(frozen=True, kw_only=True)
class ShardPlace:
    """Where a pack holds a shard."""

    offset_bytes: int  # from the start of the pack
    length_bytes: int
    sha256: str


class PackWriter:
    """Writes one pack. It has its final name only after the `with` block ended without an error.

    Raises:
        DataError: the disk is full, or the pack cannot be written; nothing stays behind.
    """

    def __init__(self, path: Path, *, chunk_voxels: int, codec: str) -> None:
        self._path = path
        self._chunk_voxels = chunk_voxels
        self._codec = codec
        self._stack = ExitStack()

    def __enter__(self) -> "PackWriter":
        with ExitStack() as stack:
            stack.enter_context(durable.explained(DataError, self._path, _WAY_OUT))
            self._file = stack.enter_context(durable.open_atomically(self._path))
            self._zip = stack.enter_context(zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True))
            self._write_json("zarr.json", _group({}))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(
        self,
        volume_id: str,
        volume: NDArray[Any],
        *,
        fill_value: float,
        spacing_mm: tuple[float, float, float],
        attributes: dict[str, Any],
    ) -> ShardPlace:
        """Append a volume [C, Z, Y, X] as an OME-Zarr 0.5 group named after its id.

        Args:
            volume_id: name of the group.
            volume: the voxels.
            fill_value: chunks of nothing but this value are left out.
            spacing_mm: [Z, Y, X].
            attributes: what stands beside the OME metadata under `mimscale`.
        """
        blosc = shard.choose_blosc(volume, fill_value, self._chunk_voxels, self._codec)
        metadata = shard.array_metadata(volume.shape, volume.dtype, fill_value, self._chunk_voxels, blosc)
        ome = _ome(volume_id, spacing_mm)
        self._write_json(f"{volume_id}/zarr.json", _group({"ome": ome, "mimscale": attributes}))
        self._write_json(f"{volume_id}/0/zarr.json", metadata)
        pieces = shard.encode_shard(volume, fill_value, self._chunk_voxels, blosc)
        return self._write(f"{volume_id}/{SHARD_KEY}", pieces, volume.nbytes)

    def copy(self, source: zipfile.ZipFile, volume_id: str) -> ShardPlace:
        """Append a volume of another pack as it stands there, without decoding it.

        Raises:
            KeyError: the other pack holds no such volume.
        """
        for name in (f"{volume_id}/zarr.json", f"{volume_id}/0/zarr.json"):
            data = source.read(name)
            self._write(name, [data], len(data))
        data = source.read(f"{volume_id}/{SHARD_KEY}")
        return self._write(f"{volume_id}/{SHARD_KEY}", [data], len(data))

    def _write_json(self, name: str, tree: dict[str, Any]) -> None:
        data = json.dumps(tree, sort_keys=True, allow_nan=False).encode()
        self._write(name, [data], len(data))

    def _write(self, name: str, pieces: Iterable[bytes], expected_bytes: int) -> ShardPlace:
        """Append an entry as its pieces are made, so that none of it but a piece is in memory."""
        entry = zipfile.ZipInfo(name, _EPOCH)
        entry.external_attr = 0o644 << 16
        entry.create_system = 3  # Unix, whatever this runs on
        entry.file_size = expected_bytes  # above 2 GiB the entry gets 64-bit sizes, which cannot be added afterwards
        digest = hashlib.sha256()
        # Explained here too: when several packs are open, the error must name the one that did not fit.
        with durable.explained(DataError, self._path, _WAY_OUT):
            with self._zip.open(entry, "w") as file:
                start = self._file.tell()
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
            end = self._file.tell()  # the end of the data: the file can seek, so no descriptor follows
        return ShardPlace(offset_bytes=start, length_bytes=end - start, sha256=digest.hexdigest())


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _ome(name: str, spacing_mm: tuple[float, float, float]) -> dict[str, Any]:
    space = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    scale = {"type": "scale", "scale": [1.0, *spacing_mm]}
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": [{"name": "c", "type": "channel"}, *space],
                "datasets": [{"path": "0", "coordinateTransformations": [scale]}],
            }
        ],
    }
