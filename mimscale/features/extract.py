"""One part of a store -> its features: read, cut into windows, encode, pool.

C channels | Z Y X volume, voxels | W windows of a volume | L tokens of a window, z y x of them | D numbers of a feature
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale import durable
from mimscale.errors import DataError
from mimscale.evaluate.planes import Normalised, Planes
from mimscale.evaluate.resampling import AtSpacing, SpacingMm, stored_voxels, target_voxels
from mimscale.features.config import ExtractConfig
from mimscale.features.encoder import FrozenEncoder
from mimscale.features.layout import FeatureFolder, schema_of, write_table
from mimscale.features.parts import write_receipt
from mimscale.features.tokens import token_writer
from mimscale.features.windows import Zyx, covered_box, drawn_origins, sliding_origins
from mimscale.store.intensity import IntensityContract, normalisation
from mimscale.store.manifest import Manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import VolumeRow


@dataclass(frozen=True, kw_only=True)
class Source:
    """What features are made from."""

    store: Path
    manifest: Manifest
    intensity: IntensityContract
    encoder: FrozenEncoder
    crop_voxels: Zyx  # of a window
    target_spacing_mm: tuple[float, float, float] | None
    config: ExtractConfig


@dataclass(frozen=True, kw_only=True)
class VolumeFeatures:
    """The features of one volume."""

    pooled: NDArray[np.float32]  # [D]
    windows: NDArray[np.float32]  # [W, D]
    origins: list[Zyx]
    tokens: NDArray[Any] | None  # [W, z, y, x, D]
    spacing_mm: tuple[float, float, float]  # of the voxels that the encoder saw


@dataclass(frozen=True)
class _Loaded:
    """A volume as the encoder sees it."""

    row: VolumeRow
    voxels: Tensor  # [C, Z, Y, X], normalised, at the spacing of the encoder
    start: Zyx  # of the box that windows cover
    stop: Zyx


def _load(source: Source, reader: ShardReader, row: VolumeRow) -> _Loaded:
    """Read a volume. Raises DataError when it cannot be read."""
    crop, target_mm = source.crop_voxels, source.target_spacing_mm
    image = Normalised(
        reader.read_volume(row),
        row.fill_value,
        normalisation(source.intensity, row.stats),
        stored_voxels(crop, row.spacing_mm, target_mm),
    )
    inside, seen = image.inside, _at(image, row.spacing_mm, target_mm)
    box = [
        (place.start + start, place.start + stop)
        for place, (start, stop) in zip(inside, row.foreground_box, strict=True)
    ]
    if source.config.region == "volume":
        box = [(place.start, place.stop) for place in inside]
    voxels = seen.planes(0, seen.shape[1])
    if target_mm is not None:
        scale = [own / target for own, target in zip(row.spacing_mm, target_mm, strict=True)]
        box = [(math.floor(start * by), math.ceil(stop * by)) for (start, stop), by in zip(box, scale, strict=True)]
    return _Loaded(row, voxels, *covered_box(box, voxels.shape[1:], crop))


def _at(image: Planes, spacing_mm: SpacingMm, target_mm: SpacingMm | None) -> Planes:
    if target_mm is None:
        return image
    return AtSpacing(image, spacing_mm, target_mm, target_voxels(image.shape[1:], spacing_mm, target_mm))


def _loaded_ahead(source: Source, indices: Sequence[int]) -> Iterator[tuple[VolumeRow, Callable[[], _Loaded]]]:
    """Each volume, and what gives its voxels or the error of reading them. The next one is read meanwhile."""
    reader = ShardReader(source.store, source.manifest)
    rows = [source.manifest.row(index) for index in indices]
    with ThreadPoolExecutor(max_workers=1) as pool:  # one: a reader is for one thread at a time
        coming = pool.submit(_load, source, reader, rows[0])
        for number, row in enumerate(rows):
            loading = coming
            if number + 1 < len(rows):
                coming = pool.submit(_load, source, reader, rows[number + 1])
            yield row, loading.result


def _encode(source: Source, loaded: _Loaded) -> VolumeFeatures:
    """Encode one volume. Raises FloatingPointError when the encoder answers with numbers that are not finite."""
    config, crop, row, voxels = source.config, source.crop_voxels, loaded.row, loaded.voxels
    if config.crops is None:
        origins = sliding_origins(loaded.start, loaded.stop, crop, config.overlap)
    else:
        origins = drawn_origins(loaded.start, loaded.stop, crop, count=config.crops, volume_id=row.id, seed=config.seed)
    pooled: list[NDArray[np.float32]] = []
    maps: list[NDArray[Any]] = []
    for windows in _batches(voxels, origins, crop, config.batch):
        tokens = source.encoder.tokens(windows)  # [B, L, D]
        if not bool(torch.isfinite(tokens).all()):
            raise FloatingPointError("the encoder answered with numbers that are not finite")
        pooled.append((tokens.mean(dim=1) if config.pool == "mean" else tokens.amax(dim=1)).numpy())
        if config.tokens:
            shape = (len(tokens), *source.encoder.grid, tokens.shape[2])
            maps.append(_narrowed(tokens.numpy().reshape(shape), config.tokens_as))
    each = np.concatenate(pooled)  # [W, D]
    # In float64, so that the order of summation leaves no trace in the result.
    whole = each.mean(axis=0, dtype=np.float64) if config.pool == "mean" else each.max(axis=0)
    return VolumeFeatures(
        pooled=whole.astype(np.float32),
        windows=each,
        origins=origins,
        tokens=np.concatenate(maps) if config.tokens else None,
        spacing_mm=source.target_spacing_mm or row.spacing_mm,
    )


def _narrowed(tokens: NDArray[np.float32], kind: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # said below
        narrow = tokens.astype(kind)
    if not np.isfinite(narrow).all():
        raise FloatingPointError(f"a token of {np.abs(tokens).max():g} does not fit {kind}; give tokens_as=float32")
    return narrow


def _batches(voxels: Tensor, origins: Sequence[Zyx], crop: Zyx, batch: int) -> Iterator[Tensor]:
    for first in range(0, len(origins), batch):
        cut = [
            voxels[:, z : z + crop[0], y : y + crop[1], x : x + crop[2]] for z, y, x in origins[first : first + batch]
        ]
        yield torch.stack(cut)


def extract_part(
    source: Source, folder: FeatureFolder, part: int, indices: Sequence[int], contract: dict[str, Any]
) -> Iterator[str]:
    """Write the tables, the token maps and at last the receipt of a part; yields the id of each volume when it is done.

    A volume that cannot be read, or whose features are not finite, stands in the receipt with the reason.

    Raises:
        DataError: the disk is full or not writable.
    """
    folder.receipt(part).unlink(missing_ok=True)
    schema = schema_of(source.encoder.dim, contract)
    volumes: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    written = [folder.part("features", part)]
    with ExitStack() as stack:
        writer = None
        if source.config.tokens:
            writer = stack.enter_context(token_writer(folder.tokens(part)))
            written.append(folder.tokens(part))
        for row, load in _loaded_ahead(source, indices):
            try:
                found = _encode(source, load())
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
            if source.config.windows:
                windows += [
                    {**shared, "windows": 1, "origin_zyx": origin, "feature": feature}
                    for origin, feature in zip(found.origins, found.windows, strict=True)
                ]
            if writer is not None and found.tokens is not None:
                spacing = list(found.spacing_mm)
                writer.add(row.id, found.tokens, found.origins, spacing_mm=spacing, subject=row.subject)
            yield row.id
    write_table(folder.part("features", part), [pa.Table.from_pylist(volumes, schema)], schema)
    if source.config.windows:
        write_table(folder.part("windows", part), [pa.Table.from_pylist(windows, schema)], schema)
        written.append(folder.part("windows", part))
    write_receipt(folder, part, written, volumes=len(indices), failed=failed)


def remove_leftovers(folder: FeatureFolder, parts: Sequence[int]) -> None:
    """Temporary files of these parts, of whoever was killed: others may be at work on other parts."""
    for part in parts:
        for path in folder.path.rglob(f"{durable.TEMPORARY_PREFIX}*-{part:05d}.*"):
            path.unlink(missing_ok=True)
