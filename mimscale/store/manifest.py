"""The table of a store: one row a volume, sorted by volume id. Training reads it and opens no `zarr.json`.

N rows | C channels | Z Y X volume, voxels
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.store import files, layout
from mimscale.store.intensity import ChannelStats
from mimscale.store.rows import SCHEMA, SampleRow, VolumeRow, overlay_rows, row_of_tree, table_tree

ROW_GROUP_ROWS = 32768
CHUNK_MAPS_KEY = b"mimscale_chunk_maps"  # in the file's metadata: {"sha256", "bytes"} of the maps that go with it
_SHARD_FIELDS = ("part", "offset_bytes", "length_bytes", "sha256")
SAMPLE_COLUMNS = tuple(item.name for item in dataclasses.fields(SampleRow))
# What training asks for: to select volumes, to plan crops of them, to read these. Affines, hashes and sources are most
# of a manifest, and every rank holds one.
TRAINING_COLUMNS = (*SAMPLE_COLUMNS, "modality", "split", "foreground_box", "dataset", "licence")


class Manifest:
    """Rows of a store, held in columns: all of them, or those that were asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def chunk_maps(self) -> dict[str, Any] | None:
        """{"sha256", "bytes"} of the file of chunk maps that goes with this manifest, or None."""
        said = (self._table.schema.metadata or {}).get(CHUNK_MAPS_KEY)
        return None if said is None else json.loads(said)

    def row(self, index: int) -> VolumeRow:
        """The volume in row `index`. Needs all columns."""
        return row_of_tree(self._tree(index))

    def sample_row(self, index: int) -> SampleRow:
        """What a reader needs of the volume in row `index`. Needs `SAMPLE_COLUMNS`."""
        tree = self._samples._tree(index)
        stats = tuple(ChannelStats(**channel) for channel in tree.pop("stats"))
        overlays, shape = overlay_rows(tree.pop("overlays")), tuple(tree.pop("shape"))
        spacing_mm = tuple(tree.pop("spacing_mm"))
        return SampleRow(**tree, shape=shape, spacing_mm=spacing_mm, stats=stats, overlays=overlays)

    @cached_property
    def _samples(self) -> "Manifest":
        return Manifest(self._table.select(SAMPLE_COLUMNS))

    def _tree(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a manifest with {len(self)} rows")
        tree: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return tree

    def take(self, indices: NDArray[np.int64]) -> "Manifest":
        """A manifest of these rows only."""
        return Manifest(self._table.take(pa.array(indices)))

    def column(self, name: str) -> NDArray[Any]:
        """A column as an array: [N], or [N, k] where a row holds k numbers (`foreground_box`: [N, 3, 2])."""
        column = self._combined(name)
        if not pa.types.is_fixed_size_list(column.type):
            return np.asarray(column.to_numpy(zero_copy_only=False))
        values = np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(self), column.type.list_size)
        return values.reshape(len(self), 3, 2) if name == "foreground_box" else values

    def _combined(self, name: str) -> pa.Array:
        column = self._table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # what an empty column combines to
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return column

    def values(self, name: str, place: int | str | None = None) -> pa.Array:
        """A column [N]; `place` picks one of a row's numbers, or the value of one key ("" in a row without it)."""
        column = self._combined(name)
        if isinstance(place, int):
            return pc.list_element(column, place)
        return column if place is None else pc.map_lookup(column, pa.scalar(place), "first").fill_null("")

    def keys(self, name: str) -> list[str]:
        """Keys that any row of a column of maps has."""
        return sorted(pc.unique(self._combined(name).keys).to_pylist())

    def holds(self, name: str, wanted: str) -> NDArray[np.bool_]:
        """Which rows of a column of names (`overlays`, `warnings`) hold one: [N]."""
        column = self._combined(name)
        entries = pc.list_flatten(column)
        names = entries.field("name") if pa.types.is_struct(entries.type) else entries
        found = np.zeros(len(self), dtype=bool)
        found[pc.list_parent_indices(column).filter(pc.equal(names, wanted)).to_numpy(zero_copy_only=False)] = True
        return found

    def value_counts(self, name: str) -> dict[str, int]:
        """How many rows hold each value of a column of text, most first."""
        counts = pc.value_counts(self._table.column(name)).to_pylist()
        return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: -entry["counts"])}

    def datasets(self, indices: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Where these volumes come from and what they may be used for: {"dataset", "licence", "volumes"} each."""
        table = self._table.select(["dataset", "licence"]).take(pa.array(indices))
        # Without threads: trainers fork after this, and forks lose Arrow's threads.
        rows = table.group_by(["dataset", "licence"], use_threads=False).aggregate([([], "count_all")]).to_pylist()
        named = [{"dataset": row["dataset"], "licence": row["licence"], "volumes": row["count_all"]} for row in rows]
        return sorted(named, key=lambda entry: (entry["dataset"], entry["licence"]))

    def overlay_names(self) -> list[str]:
        """Names of the overlays that any volume has."""
        return sorted(pc.unique(pc.list_flatten(self._combined("overlays")).field("name")).to_pylist())

    def overlay_parts(self, name: str) -> NDArray[np.int64]:
        """The part that holds overlay `name` of each volume: [N], -1 for a volume without."""
        rows, entries = self._overlay(name)
        parts = np.full(len(self), -1, dtype=np.int64)
        parts[rows] = entries.field("part").to_numpy(zero_copy_only=False)
        return parts

    def shards(
        self, overlay: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bytes_]]:
        """Part, offset, length and sha256 (32 bytes) of the shards of all volumes, or of those that have an overlay."""
        if overlay is None:
            columns = [self._combined(name) for name in _SHARD_FIELDS]
        else:
            entries = self._overlay(overlay)[1]
            columns = [entries.field(name) for name in _SHARD_FIELDS]
        part, offset, length = (column.to_numpy(zero_copy_only=False).astype(np.int64) for column in columns[:3])
        digests = np.array([bytes.fromhex(text) for text in columns[3].to_pylist()], dtype="S32")
        return part, offset, length, digests

    def class_voxels(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Voxels of class 0, 1, ... in overlay `name`, summed over these rows."""
        _, entries = self.take(indices)._overlay(name)
        counts = entries.field("class_voxels")
        lengths = pc.list_value_length(counts).to_numpy(zero_copy_only=False)
        # Class numbers of the flattened lists: 0, 1, 2, 0, 1, 2, ...
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        classes = np.arange(int(lengths.sum())) - starts
        totals = np.zeros(int(lengths.max(initial=0)), dtype=np.int64)
        np.add.at(totals, classes, pc.list_flatten(counts).to_numpy(zero_copy_only=False))
        return totals

    def _overlay(self, name: str) -> tuple[NDArray[np.int64], pa.StructArray]:
        """Rows that have an overlay, and what `overlays` holds of it."""
        column = self._combined("overlays")
        entries = pc.list_flatten(column)
        named = pc.equal(entries.field("name"), name)
        rows = pc.list_parent_indices(column).filter(named)
        return np.asarray(rows.to_numpy(zero_copy_only=False), dtype=np.int64), entries.filter(named)

    def index_of(self, volume_id: str) -> int:
        """The row of a volume.

        Raises:
            DataError: no such volume; the nearest ids are named.
        """
        index = self._index_by_id.get(volume_id)
        if index is None:
            some = ", ".join(list(self._index_by_id)[:3])
            raise DataError(f"volume {volume_id!r}: not among the {len(self)} volumes of the store ({some}, ...)")
        return index

    @cached_property
    def _index_by_id(self) -> dict[str, int]:
        return {volume_id: index for index, volume_id in enumerate(self._table.column("id").to_pylist())}

    def select(self, **equal: str) -> NDArray[np.int64]:
        """Rows whose columns hold the given values, in order: `select(split="train", modality="mr")`."""
        return np.flatnonzero(self.equal(**equal)).astype(np.int64)

    def equal(self, **equal: str) -> NDArray[np.bool_]:
        """Whether each row's columns hold the given values: [N]."""
        keep = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            keep &= np.asarray(pc.equal(self._table.column(name), value).to_numpy(), dtype=bool)
        return keep

    def plan_fingerprint(self, indices: NDArray[np.int64], overlay: str | None = None) -> str:
        """16 hex digits over what the order of samples depends on: ids, shapes and foreground boxes of these rows.

        Also the label maps of `overlay`, where crops are placed by these.
        """
        digest = hashlib.sha256()
        for volume_id in self._table.column("id").take(pa.array(indices)).to_pylist():
            digest.update(volume_id.encode() + b"\0")
        digest.update(self.column("shape")[indices].astype("<i8").tobytes())
        digest.update(self.column("foreground_box")[indices].astype("<i8").tobytes())
        if overlay is not None:
            _, entries = self.take(indices)._overlay(overlay)
            digest.update("".join(entries.field("sha256").to_pylist()).encode())
        return digest.hexdigest()[:16]


def write_manifest(store: Path, rows: Sequence[VolumeRow]) -> None:
    """Write the manifest of a store, sorted by volume id, and the chunk maps beside it, complete or not at all."""
    from mimscale.store import chunk_maps  # its rows are ours

    rows = sorted(rows, key=lambda row: row.id)
    path = layout.manifest_path(store)
    named = chunk_maps.write_chunk_maps(store, rows)
    schema = SCHEMA.with_metadata(named)
    with (
        durable.explained(DataError, path, "free some space and run the same command again; finished parts are kept"),
        durable.open_atomically(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        # One row group after the other: neither writing nor reading ever holds all rows as Python objects or twice.
        for start in range(0, len(rows), ROW_GROUP_ROWS):
            trees = [table_tree(row) for row in rows[start : start + ROW_GROUP_ROWS]]
            writer.write_table(pa.Table.from_pylist(trees, schema))
    # Only now: a run that is killed before has the old manifest, which names the old maps.
    chunk_maps.remove_other_chunk_maps(store, named)


def load_manifest(store: Path, columns: Sequence[str] | None = None) -> Manifest:
    """Read the manifest of a store.

    Args:
        store: the store's folder.
        columns: read only these, `TRAINING_COLUMNS` for example; None reads all.

    Raises:
        DataError: no manifest (the ingest has not ended), or a damaged one.
    """
    layout.read_info(store)
    path = layout.manifest_path(store)
    with durable.explained(
        DataError, path, "the ingest of this store has not ended; run the same ingest command again"
    ):
        # An object is read whole: one request, and most of it is asked for anyway.
        file = (
            pa.OSFile(str(files.local_path(path)))
            if files.url_of(path) is None
            else pa.BufferReader(files.read_bytes(path))
        )
    try:
        with file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            if not parquet.schema_arrow.equals(SCHEMA):
                raise DataError(
                    f"{path}: its columns are not those of store format {layout.FORMAT_VERSION}; ingest again"
                )
            # Without Arrow's threads: trainers fork their loader workers after this, and forks lose threads.
            table = parquet.read(columns=None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it and run the same ingest command again") from None
    table = table.combine_chunks()
    _refuse_names_that_lead_elsewhere(table, path)
    return Manifest(table)


def _refuse_names_that_lead_elsewhere(table: pa.Table, path: Path) -> None:
    """What the manifest names becomes part of paths: of packs, of pictures and predictions."""
    names: set[str] = set()
    for batch in table.to_batches(max_chunksize=ROW_GROUP_ROWS):  # piece by piece, so that no column is copied whole
        if "id" in batch.schema.names:
            ids = batch.column("id")
            strange = pc.invert(pc.match_substring_regex(ids, r"^[A-Za-z0-9][0-9A-Za-z_.-]*$"))
            names.update(ids.filter(strange).to_pylist())
        if "overlays" in batch.schema.names:
            names.update(pc.unique(pc.list_flatten(batch.column("overlays")).field("name")).to_pylist())
    if (said := Manifest(table).chunk_maps) is not None:
        names.add(str(said["sha256"]))
    for name in sorted(names):
        if not layout.is_plain_name(name):
            raise DataError(f"{path}: {name!r} is no name that may be part of a path; mimscale wrote no such manifest")
