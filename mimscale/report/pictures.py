"""Slices of reconstructions and segmentations as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.evaluate.slices import Plane
from mimscale.report.charts import INK, new_figure, save_figure

# Class 1, 2, ...; distinguishable with red-green blindness and on grey.
CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#b58900")
HIDDEN_COLOUR = (0.27, 0.33, 0.42)  # a hue that no grey image has, so that hidden is not taken for air
OVERLAY_ALPHA = 0.5
PANEL_IN = 1.95

Rgb = NDArray[np.float64]  # [rows, columns, 3], 0 to 1


def class_colour(number: int) -> str:
    """The colour of class 1, 2, ..."""
    return CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]


def grey(levels: NDArray[np.uint8]) -> Rgb:
    """Grey levels 0..255 as a colour picture."""
    return np.repeat(levels[..., None] / 255.0, 3, axis=2)


def overlay(levels: NDArray[np.uint8], classes: NDArray[np.integer]) -> Rgb:
    """Classes in colour over the grey image. Background is clear; a class that nobody knows (255) is drawn white."""
    picture = grey(levels)
    for number in np.unique(classes):
        if number == 0:
            continue
        colour = np.ones(3) if number == 255 else np.array(_rgb(class_colour(int(number))))
        where = classes == number
        picture[where] = (1 - OVERLAY_ALPHA) * picture[where] + OVERLAY_ALPHA * colour
    return picture


def masked(levels: NDArray[np.uint8], hidden: NDArray[np.bool_]) -> Rgb:
    """The grey image with what the network could not see painted over."""
    picture = grey(levels)
    picture[hidden.astype(bool)] = HIDDEN_COLOUR
    return picture


def segmentation_picture(planes: dict[str, Plane], path: Path) -> None:
    """Three planes; image, truth, prediction from top to bottom. Layers: image, prediction and, where known, truth."""
    rows: dict[str, list[Rgb]] = {"image": [], "truth": [], "prediction": []}
    for plane in planes.values():
        image = plane.layers["image"]
        rows["image"].append(grey(image))
        for layer in ("truth", "prediction"):
            if layer in plane.layers:
                rows[layer].append(overlay(image, plane.layers[layer]))
    _picture_grid({name: row for name, row in rows.items() if row}, planes, path)


def reconstruction_picture(planes: dict[str, Plane], path: Path) -> None:
    """Three planes; masked input, reconstruction, original from top to bottom.

    Layers: original, reconstruction (grey levels), hidden. Of the reconstruction only hidden voxels are the network's.
    """
    rows: dict[str, list[Rgb]] = {"masked input": [], "reconstruction": [], "original": []}
    for plane in planes.values():
        original, hidden = plane.layers["original"], plane.layers["hidden"].astype(bool)
        rows["masked input"].append(masked(original, hidden))
        rows["reconstruction"].append(grey(np.where(hidden, plane.layers["reconstruction"], original)))
        rows["original"].append(grey(original))
    _picture_grid(rows, planes, path)


def volume_picture(planes: dict[str, Plane], path: Path) -> None:
    """Three planes of a stored volume, with its labels below when there are any. Layers: image and, maybe, label."""
    rows = {"image": [grey(plane.layers["image"]) for plane in planes.values()]}
    if all("label" in plane.layers for plane in planes.values()):
        rows["label"] = [overlay(plane.layers["image"], plane.layers["label"]) for plane in planes.values()]
    _picture_grid(rows, planes, path)


def _picture_grid(rows: dict[str, list[Rgb]], planes: dict[str, Plane], path: Path) -> None:
    # Panels are as wide and high as their planes are in mm, so that nothing is stretched and no space is lost.
    pixel_mm = [plane.pixel_mm for plane in planes.values()]
    first = next(iter(rows.values()))
    width_mm = [picture.shape[1] * pixel[1] for picture, pixel in zip(first, pixel_mm, strict=True)]
    height_mm = [picture.shape[0] * pixel[0] for picture, pixel in zip(first, pixel_mm, strict=True)]
    inches = PANEL_IN / max(*width_mm, *height_mm)
    figure = new_figure(sum(width_mm) * inches + 0.4, len(rows) * max(height_mm) * inches + 0.35)
    axes = figure.subplots(len(rows), len(planes), squeeze=False, gridspec_kw={"width_ratios": width_mm})
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for row, (name, pictures) in enumerate(rows.items()):
        for column, (picture, (height, width)) in enumerate(zip(pictures, pixel_mm, strict=True)):
            panel = axes[row][column]
            panel.imshow(picture, aspect=height / width, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if row == 0:
                panel.set_title(list(planes)[column], fontsize=8.5, color=INK, pad=3)
            if column == 0:
                panel.set_ylabel(name, fontsize=8.5, color=INK)
    save_figure(figure, path)


def _rgb(colour: str) -> Sequence[float]:
    return [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]


def legend(foreground: Sequence[str]) -> list[dict[str, Any]]:
    """Name and colour of class 1, 2, ..., or of every region, for the page."""
    return [{"name": name, "colour": class_colour(number)} for number, name in enumerate(foreground, start=1)]
