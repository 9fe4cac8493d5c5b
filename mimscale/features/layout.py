"""A folder of features: what lies where, and the table in it.

    out/features.json                   written last: the contract, the files with their hashes, what failed
    out/features.parquet                one row a volume
    out/windows.parquet                 one row a window, if asked for
    out/tokens/part-00042.zarr.zip      one Zarr array a volume, [W, z, y, x, D], if asked for
    out/plan.json                       what all tasks agree on
    out/parts/, out/receipts/           what is finished; a later start goes on from there

N volumes | W windows of a volume | z y x tokens of a window | D numbers of a feature
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError

VERSION = 1
CONTRACT_KEY = b"mimscale_features"  # in the metadata of each Parquet file
WAY_OUT = "free some space and run the same command again; finished parts are kept"


@dataclass(frozen=True)
class FeatureFolder:
    """Paths of a folder of features."""

    path: Path

    @property
    def plan(self) -> Path:
        """What all tasks agree on; the first one writes it."""
        return self.path / "plan.json"

    @property
    def contract(self) -> Path:
        """What the features are; with it the folder is complete."""
        return self.path / "features.json"

    def table(self, kind: str) -> Path:
        """The merged table of `features` or `windows`."""
        return self.path / f"{kind}.parquet"

    def part(self, kind: str, part: int) -> Path:
        """The same of one part."""
        return self.path / "parts" / f"{kind}-{part:05d}.parquet"

    def tokens(self, part: int) -> Path:
        """Token maps of the volumes of a part."""
        return self.path / "tokens" / f"part-{part:05d}.zarr.zip"

    def receipt(self, part: int) -> Path:
        """Files and failures of a part, written when they are whole."""
        return self.path / "receipts" / f"part-{part:05d}.json"


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of volumes, sorted by volume id."""

    folder: Path
    name: str  # what tables call the weights behind them
    contract: dict[str, Any]
    ids: list[str]
    subjects: list[str]
    splits: list[str]
    vectors: NDArray[np.float32]  # [N, D]


def schema_of(dim: int, contract: dict[str, Any]) -> pa.Schema:
    """Columns of both tables; `origin_zyx` is empty where a row is about a whole volume."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("subject", pa.string()),
            ("split", pa.string()),
            ("spacing_mm", pa.list_(pa.float64(), 3)),  # Z, Y, X of the voxels that the encoder saw
            ("windows", pa.int32()),  # windows behind this row
            ("origin_zyx", pa.list_(pa.int32(), 3)),  # first voxel of the window, at that spacing
            ("feature", pa.list_(pa.float32(), dim)),
        ],
        metadata={CONTRACT_KEY: json.dumps(contract, sort_keys=True).encode()},
    )


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables as the row groups of one Parquet file, complete or not at all."""
    with (
        durable.explained(DataError, path, WAY_OUT),
        durable.open_atomically(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema))


def read_features(folder: Path) -> Features:
    """The features of whole volumes that `mimscale extract` wrote.

    Raises:
        DataError: there are none, the extraction has not ended, the file is damaged, or it holds numbers that are not
            finite.
    """
    place = FeatureFolder(folder)
    table, path = place.table("features"), place.contract
    contract = read_contract(path)
    said = contract["files"].get(table.name, {})
    if not table.is_file() or durable.sha256_of_file(table) != said.get("sha256"):
        raise DataError(f"{table}: missing, or other bytes than {path.name} says; run the same extract command again")
    rows = pq.read_table(table)
    column = rows.column("feature").combine_chunks()
    vectors = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(rows), -1)
    ids = rows.column("id").to_pylist()
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        named = ", ".join(ids[index] for index in bad[:3])
        raise DataError(
            f"{table}: {len(bad)} of {len(ids)} volumes have features that are not finite ({named}"
            f"{', ...' if len(bad) > 3 else ''}); no probe can use them: extract again from weights that are sound"
        )
    return Features(
        folder=folder,
        name=str(contract["weights"]),
        contract=contract,
        ids=ids,
        subjects=rows.column("subject").to_pylist(),
        splits=rows.column("split").to_pylist(),
        vectors=vectors,
    )


def read_contract(path: Path) -> dict[str, Any]:
    """The content of `features.json`.

    Raises:
        DataError: there is none, or it is none of ours.
    """
    with durable.explained(DataError, path, "give the folder of an extraction that has ended (`mimscale extract ...`)"):
        text = path.read_text()
    try:
        contract = json.loads(text)
        version = contract["version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not the contract of features; give a folder that `mimscale extract` wrote") from None
    if version != VERSION:
        raise DataError(f"{path}: version {version}, this mimscale reads version {VERSION}; extract again")
    assert isinstance(contract, dict)
    return contract
