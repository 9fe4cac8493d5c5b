"""Parts that are finished, and how they become one result. No torch here: a merge computes nothing."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mimscale import durable
from mimscale.errors import DataError
from mimscale.features.layout import CONTRACT_KEY, WAY_OUT, FeatureFolder, write_table

SHOWN = 3


def write_receipt(
    folder: FeatureFolder, part: int, files: Sequence[Path], *, volumes: int, failed: Sequence[dict[str, str]]
) -> None:
    """Say that a part is finished, and of which bytes.

    Raises:
        DataError: it cannot be written.
    """
    path = folder.receipt(part)
    with durable.explained(DataError, path, WAY_OUT):
        sums = {
            str(file.relative_to(folder.path)): {
                "bytes": file.stat().st_size,
                "sha256": durable.sha256_of_file(file),
            }
            for file in files
        }
        durable.write_json(path, {"part": part, "volumes": volumes, "files": sums, "failed": list(failed)})


def read_receipt(folder: FeatureFolder, part: int) -> dict[str, Any] | None:
    """The receipt of a finished part; None for one that must be done: its files are gone, or not whole."""
    try:
        receipt = json.loads(folder.receipt(part).read_text())
        whole = all((folder.path / name).stat().st_size == said["bytes"] for name, said in receipt["files"].items())
        return receipt if whole and isinstance(receipt["failed"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def failures(receipts: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Volumes without features, in order of their parts: {"id", "reason"}."""
    return [entry for receipt in receipts for entry in receipt["failed"]]


def failed_text(failed: Sequence[dict[str, str]]) -> str:
    """The first volumes without features, with the reason of each."""
    lines = [f"  {entry['id']}: {entry['reason']}" for entry in failed[:SHOWN]]
    return "\n".join([*lines, *([f"  and {len(failed) - SHOWN} more"] if failed[SHOWN:] else [])])


def merge(folder: FeatureFolder, plan: dict[str, Any], max_failed: int) -> dict[str, Any]:
    """Put the parts together: the tables first, `features.json` last; returns what stands in it.

    Raises:
        DataError: parts are missing or damaged (which), or more volumes than `max_failed` have no features (which).
    """
    folder.contract.unlink(missing_ok=True)
    parts = range(plan["num_parts"])
    found = {part: read_receipt(folder, part) for part in parts}
    missing = [part for part, receipt in found.items() if receipt is None]
    if missing:
        named = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        raise DataError(
            f"{folder.path}: {len(missing)} of {len(parts)} parts are not finished ({named}): their tasks have not "
            "ended, or were killed; run these tasks again, or the same command without task= and merge="
        )
    receipts = [receipt for receipt in found.values() if receipt is not None]
    failed = failures(receipts)
    if len(failed) > max_failed:
        raise DataError(
            f"{folder.path}: {len(failed)} of {plan['num_volumes']} volumes have no features, "
            f"max_failed={max_failed}:\n{failed_text(failed)}\n"
            "repair or leave out these volumes (filter=) and run the same command again, or go on without them with "
            f"merge=true max_failed={len(failed)}"
        )
    if len(failed) == plan["num_volumes"]:
        raise DataError(f"{folder.path}: not one volume has features:\n{failed_text(failed)}")
    kinds = ["features", *(["windows"] if plan["settings"]["windows"] else [])]
    rows = {kind: _merge_tables(folder, kind, receipts) for kind in kinds}
    files = {
        folder.table(kind).name: {
            "rows": rows[kind],
            "bytes": folder.table(kind).stat().st_size,
            "sha256": durable.sha256_of_file(folder.table(kind)),
        }
        for kind in kinds
    }
    for receipt in receipts:
        files |= {name: said for name, said in receipt["files"].items() if name.startswith("tokens/")}
    tree = {**plan, "files": files, "failed": failed}
    with durable.explained(DataError, folder.contract, WAY_OUT):
        durable.write_json(folder.contract, tree)
    return tree


def _merge_tables(folder: FeatureFolder, kind: str, receipts: Sequence[dict[str, Any]]) -> int:
    """Write the table of all parts, a row group a part; returns its rows."""
    rows = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal rows
        for receipt in receipts:
            path = folder.part(kind, receipt["part"])
            said = receipt["files"][str(path.relative_to(folder.path))]
            if durable.sha256_of_file(path) != said["sha256"]:
                raise DataError(
                    f"{path}: damaged (its sha256 is not that of the receipt); remove "
                    f"{folder.receipt(receipt['part'])} and run the same command again: this part is done once more"
                )
            table = pq.read_table(path)
            rows += len(table)
            yield table

    # The contract without Arrow's own entries, which tell the library that wrote the part.
    first = pq.read_schema(folder.part(kind, receipts[0]["part"]))
    write_table(folder.table(kind), tables(), first.with_metadata({CONTRACT_KEY: first.metadata[CONTRACT_KEY]}))
    return rows
