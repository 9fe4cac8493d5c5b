"""One part of a store -> its features: read, cut into windows, encode, pool.

C channels | Z Y X volume, voxels | W windows of a volume | L tokens of a window, z y x of them | D numbers of a feature
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.evaluate.windowed import Source, Windowed, batches_of_windows, loaded_ahead
from mimscale.evaluate.windows import Zyx, drawn_origins, sliding_origins
from mimscale.features.config import ExtractConfig
from mimscale.features.encoder import FrozenEncoder
from mimscale.features.layout import FeatureFolder, schema_of, write_table
from mimscale.features.parts import write_receipt
from mimscale.features.tokens import token_writer


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What features are made from, and by."""

    source: Source
    encoder: FrozenEncoder
    config: ExtractConfig


@dataclass(frozen=True, kw_only=True)
class VolumeFeatures:
    """The features of one volume."""

    pooled: NDArray[np.float32]  # [D]
    windows: NDArray[np.float32]  # [W, D]
    origins: list[Zyx]
    tokens: NDArray[Any] | None  # [W, z, y, x, D]
    spacing_mm: tuple[float, float, float]  # of the voxels that the encoder saw


def _encode(extraction: Extraction, loaded: Windowed) -> VolumeFeatures:
    """Encode one volume. Raises FloatingPointError when the encoder answers with numbers that are not finite."""
    config, row, voxels = extraction.config, loaded.row, loaded.voxels
    crop, encoder = extraction.source.crop_voxels, extraction.encoder
    if config.crops is None:
        origins = sliding_origins(loaded.start, loaded.stop, crop, config.overlap)
    else:
        origins = drawn_origins(loaded.start, loaded.stop, crop, count=config.crops, volume_id=row.id, seed=config.seed)
    pooled: list[NDArray[np.float32]] = []
    maps: list[NDArray[Any]] = []
    for windows in batches_of_windows(voxels, origins, crop, config.batch):
        tokens = encoder.tokens(windows)  # [B, L, D]
        if not bool(torch.isfinite(tokens).all()):
            raise FloatingPointError("the encoder answered with numbers that are not finite")
        pooled.append((tokens.mean(dim=1) if config.pool == "mean" else tokens.amax(dim=1)).numpy())
        if config.tokens:
            shape = (len(tokens), *encoder.grid, tokens.shape[2])
            maps.append(_narrowed(tokens.numpy().reshape(shape), config.tokens_as))
    each = np.concatenate(pooled)  # [W, D]
    # In float64, so that the order of summation leaves no trace in the result.
    whole = each.mean(axis=0, dtype=np.float64) if config.pool == "mean" else each.max(axis=0)
    return VolumeFeatures(
        pooled=whole.astype(np.float32),
        windows=each,
        origins=origins,
        tokens=np.concatenate(maps) if config.tokens else None,
        spacing_mm=extraction.source.target_mm or row.spacing_mm,
    )


def _narrowed(tokens: NDArray[np.float32], kind: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # said below
        narrow = tokens.astype(kind)
    if not np.isfinite(narrow).all():
        raise FloatingPointError(f"a token of {np.abs(tokens).max():g} does not fit {kind}; give tokens_as=float32")
    return narrow


def extract_part(
    extraction: Extraction, folder: FeatureFolder, part: int, indices: Sequence[int], contract: dict[str, Any]
) -> Iterator[str]:
    """Write the tables, the token maps and at last the receipt of a part; yields the id of each volume when it is done.

    A volume that cannot be read, or whose features are not finite, stands in the receipt with the reason.

    Raises:
        DataError: the disk is full or not writable.
    """
    config = extraction.config
    folder.receipt(part).unlink(missing_ok=True)
    schema = schema_of(extraction.encoder.dim, contract)
    volumes: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    written = [folder.part("features", part)]
    with ExitStack() as stack:
        writer = None
        if config.tokens:
            writer = stack.enter_context(token_writer(folder.tokens(part)))
            written.append(folder.tokens(part))
        for row, load in loaded_ahead(extraction.source, indices):
            try:
                found = _encode(extraction, load())
            except (DataError, FloatingPointError) as error:
                failed.append({"id": row.id, "reason": str(error)})
                yield row.id
                continue
            shared = {
                "id": row.id,
                "subject": row.subject,
                "split": row.split,
                "spacing_mm": list(found.spacing_mm),
            }
            volumes.append({**shared, "windows": len(found.origins), "origin_zyx": None, "feature": found.pooled})
            if config.windows:
                windows += [
                    {**shared, "windows": 1, "origin_zyx": origin, "feature": feature}
                    for origin, feature in zip(found.origins, found.windows, strict=True)
                ]
            if writer is not None and found.tokens is not None:
                spacing = list(found.spacing_mm)
                writer.add(row.id, found.tokens, found.origins, spacing_mm=spacing, subject=row.subject)
            yield row.id
    write_table(folder.part("features", part), [pa.Table.from_pylist(volumes, schema)], schema)
    if config.windows:
        write_table(folder.part("windows", part), [pa.Table.from_pylist(windows, schema)], schema)
        written.append(folder.part("windows", part))
    write_receipt(folder, part, written, volumes=len(indices), failed=failed)


def remove_leftovers(folder: FeatureFolder, parts: Sequence[int]) -> None:
    """Temporary files of these parts, of whoever was killed: others may be at work on other parts."""
    for part in parts:
        for path in folder.path.rglob(f"{durable.TEMPORARY_PREFIX}*-{part:05d}.*"):
            path.unlink(missing_ok=True)
