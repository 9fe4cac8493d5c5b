"""Which inner chunks of a volume hold foreground, and which hold each class of its overlays: crops are placed by it.

    gz gy gx inner chunks along Z, Y, X

A map is one bit a chunk, compressed, as text in receipts and as bytes in the store's one file of maps. That lies beside
the manifest, which names it by its hash, and is memory-mapped: a rank reads the rows that it needs, and all ranks of a
node share them. It is an Arrow file with a row for each row of the manifest.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store import files, layout, shard
from mimscale.store.manifest import CHUNK_MAPS_KEY, Manifest
from mimscale.store.rows import VolumeRow

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("occupied", pa.large_binary()),
        ("labelled", pa.list_(pa.struct([("overlay", pa.string()), ("class", pa.uint8()), ("chunks", pa.binary())]))),
    ]
)
_WAY_OUT = "restore it, or run the same ingest command again"


def chunk_maxima(voxels: NDArray[Any], chunk_voxels: int) -> NDArray[Any]:
    """The largest voxel of each inner chunk: [Z, Y, X] -> [gz, gy, gx]."""
    for axis in range(3):
        voxels = np.maximum.reduceat(voxels, np.arange(0, voxels.shape[axis], chunk_voxels), axis=axis)
    return voxels


def encode_map(chunks: NDArray[np.bool_]) -> str:
    """A map [gz, gy, gx] as text for a receipt."""
    return base64.b64encode(zlib.compress(np.packbits(chunks).tobytes(), 9)).decode()


def class_maps(label: NDArray[np.uint8], num_classes: int, chunk_voxels: int) -> dict[str, str]:
    """Maps of a label map [Z, Y, X]: class above 0 -> its chunks, encoded; only classes that it holds."""
    grid = shard.chunk_grid((1, *label.shape), chunk_voxels)[1:]
    holds = np.zeros((256, *grid), dtype=bool)
    for corner in np.ndindex(*grid):  # one pass over the voxels, however many classes there are
        z, y, x = (slice(place * chunk_voxels, (place + 1) * chunk_voxels) for place in corner)
        holds[:, *corner] = np.bincount(label[z, y, x].reshape(-1), minlength=256) > 0
    return {str(number): encode_map(holds[number]) for number in range(1, num_classes) if holds[number].any()}


def write_chunk_maps(store: Path, rows: Sequence[VolumeRow]) -> dict[bytes, bytes]:
    """Write the maps of `rows`, sorted by volume id, under a name of their own; returns what the manifest says of them.

    Nothing is written when a volume has no map (a store of an earlier version).

    Raises:
        DataError: the disk is full.
    """
    if not all(row.occupied_chunks for row in rows):
        return {}
    # One batch, so that a row is found by its number; made value by value, so that not all of them are Python objects.
    columns = [
        pa.array((row.id for row in rows), pa.string(), size=len(rows)),
        pa.array((base64.b64decode(row.occupied_chunks) for row in rows), pa.large_binary(), size=len(rows)),
        pa.array((_labelled_tree(row) for row in rows), _SCHEMA.field("labelled").type, size=len(rows)),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as file:
        file.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
    data = sink.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    path = layout.chunk_maps_path(store, sha256)
    with durable.explained(DataError, path, "free some space and run the same command again; finished parts are kept"):
        durable.write_bytes(path, data)
    return {CHUNK_MAPS_KEY: json.dumps({"sha256": sha256, "bytes": data.size}).encode()}


def _labelled_tree(row: VolumeRow) -> list[dict[str, Any]]:
    return [
        {"overlay": name, "class": int(number), "chunks": base64.b64decode(chunks)}
        for name, overlay in sorted(row.overlays.items())
        for number, chunks in sorted(overlay.class_chunks.items(), key=lambda item: int(item[0]))
    ]


def remove_other_chunk_maps(store: Path, kept: dict[bytes, bytes]) -> None:
    """Remove all files of maps but the one that the manifest names."""
    name = layout.chunk_maps_path(store, json.loads(kept[CHUNK_MAPS_KEY])["sha256"]).name if kept else ""
    for path in store.glob(layout.CHUNK_MAPS_GLOB):
        if path.name != name:
            path.unlink(missing_ok=True)


def chunk_maps_of(store: Path, manifest: Manifest) -> Path | None:
    """The file of maps that the manifest names, or None."""
    return None if manifest.chunk_maps is None else layout.chunk_maps_path(store, manifest.chunk_maps["sha256"])


def why_damaged(store: Path, manifest: Manifest) -> str | None:
    """What is wrong with the store's maps; None when nothing is, or when it has none."""
    path = chunk_maps_of(store, manifest)
    if path is None or manifest.chunk_maps is None:
        return None
    try:
        found = hashlib.sha256(files.read_bytes(path)).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror or error}); {_WAY_OUT}"
    return None if found == manifest.chunk_maps["sha256"] else f"has another sha256 than the manifest says; {_WAY_OUT}"


class ChunkMaps:
    """The maps of a store, by row of its manifest. Touches no pack."""

    def __init__(self, path: Path, chunk_voxels: int) -> None:
        """Map the file into memory; see `load_chunk_maps`."""
        self.chunk_voxels = chunk_voxels
        self._path = path
        if files.url_of(path) is None:
            source = pa.memory_map(str(files.local_path(path)))
        else:
            source = pa.BufferReader(files.read_bytes(path))
        self._batch = pa.ipc.open_file(source).get_batch(0)

    def __reduce__(self) -> tuple[Any, ...]:  # a loader process maps the file itself
        return ChunkMaps, (self._path, self.chunk_voxels)

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def occupied(self, row: int, shape_zyx: Sequence[int]) -> NDArray[np.int64]:
        """Grid places [n, 3] of the chunks that hold foreground of any channel; none in a volume of air."""
        return self._places(self._batch.column("occupied")[row].as_py(), shape_zyx)

    def labelled(self, row: int, overlay: str, shape_zyx: Sequence[int]) -> list[NDArray[np.int64]]:
        """Grid places [n, 3] of the chunks of each class above 0 that the overlay of a volume has."""
        entries = self._batch.column("labelled")[row].as_py()
        return [self._places(entry["chunks"], shape_zyx) for entry in entries if entry["overlay"] == overlay]

    def _places(self, data: bytes, shape_zyx: Sequence[int]) -> NDArray[np.int64]:
        grid = shard.chunk_grid((1, *map(int, shape_zyx)), self.chunk_voxels)[1:]
        bits = np.unpackbits(np.frombuffer(zlib.decompress(data), dtype=np.uint8), count=int(np.prod(grid)))
        return np.argwhere(bits.reshape(grid)).astype(np.int64)


def load_chunk_maps(store: Path, manifest: Manifest) -> ChunkMaps:
    """The maps that the manifest names.

    Raises:
        DataError: the store has none, or the file is missing or cut short.
    """
    said, path = manifest.chunk_maps, chunk_maps_of(store, manifest)
    if said is None or path is None:
        raise DataError(
            f"{store}: was ingested without maps of its chunks, by which stream.origins=occupied and labelled place "
            "crops; ingest the sources again, or use stream.origins=foreground"
        )
    with durable.explained(DataError, path, _WAY_OUT):
        size = files.size_bytes(path)
    if size != said["bytes"]:
        raise DataError(f"{path}: has {size} bytes instead of {said['bytes']}; {_WAY_OUT}")
    try:
        maps = ChunkMaps(path, layout.read_info(store).chunk_voxels)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); {_WAY_OUT}") from None
    assert len(maps) == len(manifest), "maps go by the rows of a whole manifest"
    return maps
