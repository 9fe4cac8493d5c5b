"""One part of an ingest: read its sources, write its pack and its overlay pack, then its receipt.

    C channels | Z Y X volume, voxels

The receipt is written last. A part with a receipt is finished; one without is done again and gives the same bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale import durable
from mimscale.errors import DataError
from mimscale.ingest import geometry, statistics
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.formats import QuarantineError, ReadOptions, Scan, SourceFile, companions, read_scan
from mimscale.ingest.sources.planned import PlannedSource
from mimscale.store import layout
from mimscale.store.manifest import OverlayRow, VolumeRow, row_tree
from mimscale.store.writer import PackWriter

LABEL_FILL = 0.0  # chunks of nothing but background are not stored


def convert_part(
    store: Path, part: int, sources: Sequence[PlannedSource], config: IngestConfig, class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Convert the sources of one part, in their order. Returns the lines of its receipt.

    A line is {"id", "outcome": "stored" | "duplicate" | "quarantined", ...}; it names no file and no subject.

    Raises:
        DataError: the store cannot be written. Bad sources raise nothing.
    """
    lines: list[dict[str, Any]] = []
    stored: dict[str, str | None] = {}  # id -> hash of its label file

    def writer(path: Path) -> PackWriter:
        return PackWriter(path, chunk_voxels=config.chunk_voxels, codec=config.codec)

    with ExitStack() as stack:
        # Left in reverse order: the overlay pack gets its final name first, the receipt follows both.
        pack = stack.enter_context(writer(layout.pack_path(store, part)))
        labels: PackWriter | None = None
        if any(source.label for source in sources):
            labels = stack.enter_context(writer(layout.overlay_path(store, config.overlay, part)))
        for source in sources:
            if source.id in stored:
                line = {"id": source.id, "outcome": "duplicate", "of": source.id}
                if source.label_sha256 not in (None, stored[source.id]):
                    line = {"id": source.id, "outcome": "quarantined", **conflicting_labels(source.id)}
                lines.append(line)
                continue
            try:
                image, label = _read_source(source, config, class_names)
            except QuarantineError as error:
                line = {"id": source.id, "outcome": "quarantined", "reason": error.reason, "detail": error.detail}
                lines.append(line)
                continue
            row = _store(part, source, image, label, config, class_names, pack, labels)
            lines.append({"id": source.id, "outcome": "stored", "row": row_tree(row)})
            stored[source.id] = source.label_sha256
    path = layout.receipt_path(store, part)
    with durable.explained(DataError, path, "free some space and run the same command again; finished parts are kept"):
        durable.write_text(path, "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines))
    return lines


def conflicting_labels(kept_id: str) -> dict[str, str]:
    """Why a source is not stored that has the voxels of `kept_id` and another label map."""
    detail = f"the image is that of {kept_id}, which has another label map; list the one to keep"
    return {"reason": "conflicting_labels", "detail": detail}


def read_receipt(store: Path, part: int) -> list[dict[str, Any]] | None:
    """The lines of a finished part, or None for a part that must be done."""
    path = layout.receipt_path(store, part)
    if not path.exists():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        return None  # damaged: the part is done again
    overlays = {name for line in lines if line["outcome"] == "stored" for name in line["row"]["overlays"]}
    packs = [layout.pack_path(store, part), *(layout.overlay_path(store, name, part) for name in overlays)]
    return lines if all(pack.exists() for pack in packs) else None


def _read_source(
    source: PlannedSource, config: IngestConfig, class_names: tuple[str, ...]
) -> tuple[Scan, NDArray[np.uint8] | None]:
    """The image in the file's order, and the label turned to the store's grid: uint8 [1, Z, Y, X]."""
    if source.problem is not None:
        raise QuarantineError(*source.problem)
    options = ReadOptions(channels=config.channels, assume_orientation=config.assume_orientation)
    image = read_scan(_files_as_planned(source.image, source.sha256), options)
    if source.label is None:
        return image, None
    assert source.label_sha256 is not None, "a label that was planned without a problem has a hash"
    options = ReadOptions(assume_orientation=config.assume_orientation)
    try:
        label = read_scan(_files_as_planned(source.label, source.label_sha256), options)
    except QuarantineError as error:
        raise QuarantineError(error.reason, f"label: {error.detail}") from None
    return image, _label_on_store_grid(image, label, config.label_tolerance_voxels, len(class_names))


def _files_as_planned(path: str, sha256: str) -> list[SourceFile]:
    first = SourceFile(Path(path), _bytes_as_planned(path, sha256))
    try:
        return [first, *(SourceFile(one, one.read_bytes()) for one in companions(first.path))]
    except OSError as error:
        raise QuarantineError("missing_file", f"its data file: {error.strerror}") from None


def _bytes_as_planned(path: str, sha256: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise QuarantineError("missing_file", "is gone since the ingest was planned") from None
    except OSError as error:
        raise QuarantineError("unreadable", str(error.strerror)) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise QuarantineError(
            "changed", "its bytes are not those of the plan; run the ingest when nothing writes to it"
        )
    return data


def _label_on_store_grid(image: Scan, label: Scan, tolerance_voxels: float, classes: int) -> NDArray[np.uint8]:
    shape_xyz = image.voxels.shape[1:]
    # A label may be flipped or permuted against its image; the grids are compared in the store's order.
    turned, affine = geometry.to_store_grid(label.voxels[0], label.affine)
    _, image_affine = geometry.to_store_grid(image.voxels[0], image.affine)
    x, y, z = _store_shape_xyz(image)
    if turned.shape != (z, y, x):
        raise QuarantineError(
            "label_grid_mismatch", f"label {label.voxels.shape[1:]}, image {shape_xyz} voxels (x, y, z)"
        )
    distance = geometry.grid_distance_voxels(image_affine, affine, (x, y, z))
    if distance > tolerance_voxels:
        raise QuarantineError(
            "label_grid_mismatch", f"grids lie {distance:.3g} voxels apart, label_tolerance_voxels={tolerance_voxels}"
        )
    values = np.unique(turned)
    wrong = [float(v) for v in values if v != int(v) or not (0 <= v < classes or v == layout.IGNORE_VALUE)]
    if wrong:
        shown = ", ".join(f"{value:g}" for value in wrong[:5])
        raise QuarantineError(
            "unexpected_labels", f"{shown}{', ...' if wrong[5:] else ''}; class_names has {classes} names"
        )
    return np.ascontiguousarray(turned, dtype=np.uint8)[None]


def _store_shape_xyz(scan: Scan) -> tuple[int, int, int]:
    z, y, x = geometry.to_store_grid(scan.voxels[0], scan.affine)[0].shape
    return (x, y, z)


def _store(
    part: int,
    source: PlannedSource,
    image: Scan,
    label: NDArray[np.uint8] | None,
    config: IngestConfig,
    class_names: tuple[str, ...],
    pack: PackWriter,
    labels: PackWriter | None,
) -> VolumeRow:
    turned = [geometry.to_store_grid(channel, image.affine) for channel in image.voxels]
    volume = np.ascontiguousarray(np.stack([voxels for voxels, _ in turned]))  # [C, Z, Y, X]
    affine = turned[0][1]
    spacing_mm = geometry.spacing_zyx_mm(affine)
    fill = statistics.fill_value(volume, config.modality)
    stats, box = statistics.describe(volume, config.modality)
    attributes = {
        "affine_xyz_to_ras_mm": affine.tolist(),
        "modality": config.modality,
        "source_orientation": geometry.axis_codes(image.affine),
    }
    place = pack.add(source.id, volume, fill_value=fill, spacing_mm=spacing_mm, attributes=attributes)
    overlays = {}
    if label is not None:
        assert labels is not None, "a part with a labelled source has an overlay pack"
        assert source.label_sha256 is not None, "a label that was read has a hash"
        there = labels.add(source.id, label, fill_value=LABEL_FILL, spacing_mm=spacing_mm, attributes=attributes)
        counts = np.bincount(label.reshape(-1), minlength=256)[: len(class_names)]
        overlays[config.overlay] = OverlayRow(
            part=part,
            offset_bytes=there.offset_bytes,
            length_bytes=there.length_bytes,
            sha256=there.sha256,
            source_sha256=source.label_sha256,
            class_voxels=tuple(map(int, counts)),
        )
    channels, z, y, x = volume.shape
    source_x, source_y, source_z = image.voxels.shape[1:]
    return VolumeRow(
        id=source.id,
        subject="",  # subject and split are known when all parts are: the manifest gets them
        dataset=config.dataset,
        licence=config.licence,
        modality=config.modality,
        split="",
        shape=(channels, z, y, x),
        spacing_mm=spacing_mm,
        affine=tuple(map(float, affine.reshape(-1))),
        dtype=volume.dtype.name,
        part=part,
        offset_bytes=place.offset_bytes,
        length_bytes=place.length_bytes,
        fill_value=fill,
        sha256=place.sha256,
        voxels_sha256=_voxels_sha256(volume, affine),
        source_sha256=source.sha256,
        source_orientation=geometry.axis_codes(image.affine),
        source_affine=tuple(map(float, image.affine.reshape(-1))),
        source_shape=(source_x, source_y, source_z),
        stats=stats,
        foreground_box=box,
        overlays=overlays,
    )


def _voxels_sha256(volume: NDArray[Any], affine: NDArray[np.float64]) -> str:
    digest = hashlib.sha256(f"{volume.dtype.name} {volume.shape} ".encode())
    # Rounded: the same scan saved twice differs in the last bits of its matrix. +0.0 makes -0 and 0 one value.
    digest.update((np.round(affine, 3) + 0.0).astype("<f8").tobytes())
    digest.update(np.ascontiguousarray(volume).data)
    return digest.hexdigest()
