"""One part of an ingest: read its sources, write its pack and its overlay pack, then its receipt.

    C channels | Z Y X volume, voxels

The receipt is written last. A part with a receipt is finished; one without is done again and gives the same bytes.
"""

import hashlib
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.config import tree_hash
from mimscale.ingest import geometry, statistics
from mimscale.ingest.assemble import Grid, Image, Label, read_image, read_label
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats import QuarantineError
from mimscale.ingest.gates import failed_gates
from mimscale.ingest.placement import Placement
from mimscale.ingest.plan import PlannedSource
from mimscale.ingest.receipts import Lines, write_receipt
from mimscale.ingest.stored import as_stored, modality_of
from mimscale.ingest.subjects import hidden
from mimscale.store import chunk_maps, layout
from mimscale.store.manifest import load_manifest
from mimscale.store.rows import OverlayRow, VolumeRow, row_tree
from mimscale.store.writer import PackWriter

LABEL_FILL = 0.0  # chunks of nothing but background are not stored


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What all parts of a round are converted with."""

    store: Path
    config: IngestConfig
    class_names: tuple[str, ...]
    key: bytes  # that hides subjects and sources
    withdrawn: Collection[str] = ()  # hidden names of subjects that must not come back


def convert_part(part: int, sources: Sequence[PlannedSource], how: Conversion) -> Lines:
    """Convert the sources of one part, in their order. Returns the lines of its receipt (see `receipts`).

    Raises:
        DataError: the store cannot be written. Bad sources raise nothing.
    """
    lines: Lines = []
    stored: dict[str, str | None] = {}  # id -> hash of its label file
    manifest = load_manifest(how.store) if any(source.overlay_of for source in sources) else None
    with _Packs(part, how) as packs:
        for source in sources:
            try:
                if hidden(source.subject, how.key) in how.withdrawn:
                    line: dict[str, Any] = {"outcome": "withdrawn"}
                elif source.overlay_of is not None:
                    assert manifest is not None, "loaded above"
                    there = manifest.row(manifest.index_of(source.overlay_of))
                    line = _convert_label(part, source, there, how, packs)
                else:
                    line = _convert_volume(part, source, how, packs, stored)
            except QuarantineError as error:
                line = {"outcome": "quarantined", "reason": error.reason, "detail": error.detail}
            lines.append({"source": source.receipt_key(how.key), **line})
    write_receipt(how.store, part, lines)
    return lines


def conflicting_labels(kept_id: str) -> dict[str, str]:
    """Why a source is not stored that has the voxels of `kept_id` and another label map."""
    detail = f"the image is that of {kept_id}, which has another label map; list the one to keep"
    return {"reason": "conflicting_labels", "detail": detail}


class _Packs:
    """The packs of a part, each begun with its first volume: a part of nothing but bad sources has none."""

    def __init__(self, part: int, how: Conversion) -> None:
        self._part = part
        self._how = how
        self._stack = ExitStack()
        self._open: dict[Path, PackWriter] = {}

    def __enter__(self) -> "_Packs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def images(self) -> PackWriter:
        return self._writer(layout.pack_path(self._how.store, self._part))

    def overlays(self, name: str) -> PackWriter:
        return self._writer(layout.overlay_path(self._how.store, name, self._part))

    def _writer(self, path: Path) -> PackWriter:
        if path not in self._open:
            config = self._how.config
            writer = PackWriter(path, chunk_voxels=config.chunk_voxels, codec=config.codec)
            self._open[path] = self._stack.enter_context(writer)
        return self._open[path]


def _convert_label(
    part: int, source: PlannedSource, there: VolumeRow, how: Conversion, packs: _Packs
) -> dict[str, Any]:
    """A label map alone, for a volume that is stored already."""
    label = read_label(source, Grid.of_row(there), how.config, how.class_names)
    overlays = _add_label(part, there, label, how, packs)
    trees = {name: asdict(overlay) for name, overlay in overlays.items()}
    return {"outcome": "overlay", "id": there.id, "name": how.config.overlay, "overlays": trees}


def _convert_volume(
    part: int, source: PlannedSource, how: Conversion, packs: _Packs, stored: dict[str, str | None]
) -> dict[str, Any]:
    config = how.config
    image = read_image(source, config)
    label = read_label(source, image.source, config, how.class_names) if source.label else None
    modality = modality_of(source, image, config)
    volume_id = _volume_id(image.source_sha256, config, modality)
    if volume_id in stored:
        if label is not None and label.source_sha256 != stored[volume_id]:
            return {"outcome": "quarantined", **conflicting_labels(volume_id)}
        return {"outcome": "duplicate", "id": volume_id, "of": volume_id}
    row, warnings = _add_image(part, source, image, modality, volume_id, how, packs)
    if label is not None:
        row.overlays.update(_add_label(part, row, label, how, packs))
    stored[volume_id] = None if label is None else label.source_sha256
    return {"outcome": "stored", "id": volume_id, "row": row_tree(row), "warnings": warnings}


def _volume_id(source_sha256: str, config: IngestConfig, modality: str) -> str:
    """16 hex digits over the source's bytes and all settings that decide what voxels they become."""
    settings: dict[str, Any] = {"modality": config.modality, "channels": config.channels}
    if config.spacing_zyx_mm is not None:
        settings["spacing_mm"] = list(config.spacing_zyx_mm)
    if config.crop != "none":  # what is foreground depends on the modality
        settings |= {"crop": config.crop, "crop_margin_mm": config.crop_margin_mm, "modality_found": modality}
    return hashlib.sha256(f"{source_sha256} {tree_hash(settings)}".encode()).hexdigest()[:16]


def _add_image(
    part: int, source: PlannedSource, image: Image, modality: str, volume_id: str, how: Conversion, packs: _Packs
) -> tuple[VolumeRow, dict[str, str]]:
    config = how.config
    stored = as_stored(image, modality, config)
    volume, affine, placement = stored.volume, stored.affine, stored.placement
    occupied = np.logical_or.reduce(
        [
            chunk_maps.chunk_maxima(channel, config.chunk_voxels) > threshold
            for channel, threshold in zip(volume, stored.thresholds, strict=True)
        ]
    )
    warnings = dict.fromkeys(image.warnings, "")
    # The scan is judged, not what is stored of it: resampling makes thick slices no thinner, and a crop is small on
    # purpose.
    scanned_mm = geometry.spacing_zyx_mm(image.affine)
    warnings |= failed_gates(image.volume, scanned_mm, stored.stats, modality, image.modality_in_file, config.gates)
    if warnings and config.gates.action == "quarantine":
        raise QuarantineError(next(iter(warnings)), "; ".join(filter(None, warnings.values())))
    attributes = _attributes(affine, modality)
    attributes["source_orientation"] = geometry.axis_codes(image.source.affine)
    written = packs.images().add(
        volume_id, volume, fill_value=stored.fill_value, spacing_mm=stored.spacing_mm, attributes=attributes
    )
    channels, z, y, x = volume.shape
    row = VolumeRow(
        id=volume_id,
        subject=hidden(source.subject, how.key),
        dataset=config.dataset,
        licence=config.licence,
        modality=modality,
        split="",  # known when all parts are: the manifest gets it
        shape=(channels, z, y, x),
        spacing_mm=stored.spacing_mm,
        affine=tuple(map(float, affine.reshape(-1))),
        dtype=volume.dtype.name,
        part=part,
        offset_bytes=written.offset_bytes,
        length_bytes=written.length_bytes,
        fill_value=stored.fill_value,
        sha256=written.sha256,
        voxels_sha256=_voxels_sha256(image, placement),
        source_sha256=image.source_sha256,
        source_orientation=geometry.axis_codes(image.source.affine),
        source_affine=tuple(map(float, image.source.affine.reshape(-1))),
        source_shape=image.source.shape_xyz,
        stats=stored.stats,
        foreground_box=stored.foreground_box,
        overlays={},
        tags=dict(source.tags),
        acquisition=dict(image.acquisition),
        warnings=tuple(sorted(warnings)),
        crop_box=placement.crop_box,
        resampled=placement.resampled,
        occupied_chunks=chunk_maps.encode_map(occupied),
    )
    return row, warnings


def _add_label(part: int, row: VolumeRow, label: Label, how: Conversion, packs: _Packs) -> dict[str, OverlayRow]:
    """The label map of a volume on its stored grid, and on the grid of its source where that is another one."""
    placement, name = Placement.of_row(row), how.config.overlay
    stored = placement.store_classes(label.voxels)
    overlays = {name: _add_overlay(part, row, name, stored, np.reshape(row.affine, (4, 4)), label, how, packs)}
    if not placement.as_scanned:
        # Of every such volume, also when the crop cuts off no voxel of this map: the next map may lie elsewhere, and
        # must not leave the twin of another one behind.
        twin, affine = layout.source_overlay(name), Grid.of_row(row).turned_affine
        overlay = _add_overlay(part, row, twin, label.voxels, affine, label, how, packs)
        overlays[twin] = replace(overlay, source_zyx=placement.source_zyx)
    return overlays


def _add_overlay(
    part: int,
    row: VolumeRow,
    name: str,
    classes: NDArray[np.uint8],
    affine: NDArray[np.float64],
    label: Label,
    how: Conversion,
    packs: _Packs,
) -> OverlayRow:
    written = packs.overlays(name).add(
        row.id,
        classes[None],
        fill_value=LABEL_FILL,
        spacing_mm=geometry.spacing_zyx_mm(affine),
        attributes=_attributes(affine, row.modality),
    )
    counts = statistics.count_values(classes, 0, 255)[: len(how.class_names)]
    return OverlayRow(
        part=part,
        offset_bytes=written.offset_bytes,
        length_bytes=written.length_bytes,
        sha256=written.sha256,
        source_sha256=label.source_sha256,
        class_voxels=tuple(map(int, counts)),
        class_chunks=chunk_maps.class_maps(classes, len(how.class_names), how.config.chunk_voxels),
    )


def _attributes(affine: NDArray[np.float64], modality: str) -> dict[str, Any]:
    return {"affine_xyz_to_ras_mm": affine.tolist(), "modality": modality}


def _voxels_sha256(image: Image, placement: Placement) -> str:
    """Of the voxels of the source: others of which the same is stored still need label maps of another shape."""
    digest = hashlib.sha256(f"{image.volume.dtype.name} {image.volume.shape} ".encode())
    # Rounded: the same scan saved twice differs in the last bits of its matrix. +0.0 makes -0 and 0 one value.
    digest.update((np.round(image.affine, 3) + 0.0).astype("<f8").tobytes())
    digest.update(np.ascontiguousarray(image.volume).data)
    if placement.crop_box is not None:  # the same scan may be listed with two modalities, whose foregrounds differ
        digest.update(repr(placement.crop_box).encode())
    return digest.hexdigest()
