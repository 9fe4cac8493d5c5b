"""Pictures of what a store holds: three planes of one volume, or the middle slices of many on one sheet."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mimscale.errors import DataError
from mimscale.evaluate.slices import Plane, cut_planes, grey_levels
from mimscale.report.charts import INK, new_figure, save_figure
from mimscale.report.pictures import grey, overlay, volume_picture
from mimscale.report.store_summary import grid
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.rows import VolumeRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 6
_PANEL_IN, _TEXT_IN = 1.9, 0.42


def draw_volume(store: Path, manifest: Manifest, row: VolumeRow, path: Path) -> None:
    """Three planes through the middle of the foreground, the first overlay below.

    Raises:
        DataError: a damaged pack.
    """
    reader = ShardReader(store, manifest)
    image = reader.read_volume(row)[0].astype(np.float32)
    stats = row.stats[0]
    layers = {"image": grey_levels(image, stats.p0_5, stats.p99_5)}
    name = _drawn_overlay(row)
    if name is not None:
        layers["label"] = reader.read_volume(row, name)[0]
    z, y, x = ((start + stop) // 2 for start, stop in row.foreground_box)
    volume_picture(cut_planes(layers, (z, y, x), row.spacing_mm), path)


def draw_contact_sheet(store: Path, count: int, path: Path) -> int:
    """Draw the axial slice through the middle of the foreground of `count` volumes, evenly chosen over the manifest.

    Labels are laid over where there are some. A volume that cannot be read has a panel that says so. Pictures of heads
    are patient data: nothing writes one unasked.

    Returns:
        how many volumes are on it.

    Raises:
        DataError: no store, or one whose ingest has not ended.
    """
    manifest = load_manifest(store)
    chosen = np.unique(np.linspace(0, len(manifest) - 1, min(count, len(manifest))).round().astype(int))
    reader = ShardReader(store, manifest)
    columns = min(COLUMNS, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = new_figure(columns * _PANEL_IN, lines * (_PANEL_IN + _TEXT_IN))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for panel in panels:
        panel.set_axis_off()
    for index, panel in zip(chosen.tolist(), panels, strict=False):
        _draw(reader, manifest.row(index), panel)
    reader.close()
    save_figure(figure, path)
    return len(chosen)


def _draw(reader: ShardReader, row: VolumeRow, panel: "Axes") -> None:
    title = f"{row.id}\n{row.modality} {grid(row.shape[1:])}, {grid(np.round(row.spacing_mm, 3))} mm"
    panel.set_title(title, fontsize=5.5, color=INK, pad=2)
    try:
        plane = _middle_slice(reader, row)
    except DataError:
        panel.text(0.5, 0.5, "not readable:\nsee --verify", ha="center", va="center", fontsize=7, color=INK)
        return
    image = plane.layers["image"]
    height, width = plane.pixel_mm
    picture = overlay(image, plane.layers["label"]) if "label" in plane.layers else grey(image)
    panel.imshow(picture, aspect=height / width, interpolation="nearest")


def _middle_slice(reader: ShardReader, row: VolumeRow) -> Plane:
    """Only the chunks of this slice are read. Turned as radiologists look at it: front up, the patient's right left."""
    _, _, y, x = row.shape
    z = sum(row.foreground_box[0]) // 2
    stats = row.stats[0]
    image = reader.read(row, (z, 0, 0), (1, y, x))[0, 0, ::-1, ::-1].astype(np.float32)
    layers = {"image": grey_levels(image, stats.p0_5, stats.p99_5)}
    name = _drawn_overlay(row)
    if name is not None:
        layers["label"] = reader.read(row, (z, 0, 0), (1, y, x), name)[0, 0, ::-1, ::-1]
    return Plane(layers, (row.spacing_mm[1], row.spacing_mm[2]))


def _drawn_overlay(row: VolumeRow) -> str | None:
    """The first overlay that lies on the grid of the stored voxels."""
    return next((name for name, place in row.overlays.items() if place.source_zyx is None), None)
