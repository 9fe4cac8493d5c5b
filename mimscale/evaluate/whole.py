"""One whole volume through one network or several, in a memory that does not grow with its number of planes.

    C channels | K outputs | Z Y X volume, voxels | X Y Z source file, voxels in the file's own order

`mimscale evaluate` and `mimscale predict` both go this way, so that a volume of a store and the file that it came from
get the same classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale.evaluate.config import InferenceConfig
from mimscale.evaluate.inference import predict_planes, window_batches
from mimscale.evaluate.outputs import Classes, Regions
from mimscale.evaluate.planes import Normalised, Rolling, cut, mean_over_folds
from mimscale.evaluate.resampling import AtSpacing, SpacingMm, at_spacing, stored_voxels, target_voxels
from mimscale.ingest.geometry import from_store_grid
from mimscale.ingest.placement import Placement

AXES = ("z", "y", "x")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that segments, and what it must be given."""

    model: nn.Module  # on `device`, in eval mode
    device: torch.device
    crop_voxels: tuple[int, int, int]
    target_mm: SpacingMm | None  # spacing [Z, Y, X] that it sees; None: that of the stored volume


def normalised_for(
    networks: Sequence[Network], raw: NDArray[Any], spacing_mm: SpacingMm, fill_value: float, numbers: NDArray[Any]
) -> Normalised:
    """A stored volume [C, Z, Y, X] as input of these networks: normalised, and at least as large as their windows."""
    least = [stored_voxels(one.crop_voxels, spacing_mm, one.target_mm) for one in networks]
    return Normalised(raw, fill_value, numbers, [max(edges) for edges in zip(*least, strict=True)])


def batches_of(
    networks: Sequence[Network], size_voxels: Sequence[int], spacing_mm: SpacingMm, config: InferenceConfig
) -> int:
    """Forward passes that a stored volume of `size_voxels` [Z, Y, X] takes: what a progress bar counts to."""
    least = [stored_voxels(one.crop_voxels, spacing_mm, one.target_mm) for one in networks]
    padded = [max(edges) for edges in zip(size_voxels, *least, strict=True)]
    return sum(
        window_batches(target_voxels(padded, spacing_mm, one.target_mm), one.crop_voxels, config.overlap, config.batch)
        for one in networks
    )


def segment(
    networks: Sequence[Network],
    image: Normalised,
    spacing_mm: SpacingMm,
    placement: Placement,
    outputs: Classes | Regions,
    config: InferenceConfig,
    after_batch: Callable[[], object] = lambda: None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What the networks see in a stored volume; of several the mean of their probabilities decides.

    Returns:
        classes [Z, Y, X] or regions [K, Z, Y, X] on the stored grid, and the same on the source's, turned to RAS+.

    Raises:
        FloatingPointError: a network answered with a number that is not finite.
    """
    size = [edge.stop - edge.start for edge in image.inside]
    shape = (len(outputs.names), *size)
    streams = [_logits(one, image, spacing_mm, shape[0], config, after_batch) for one in networks]
    merged = mean_over_folds(streams, shape, overlapping=isinstance(outputs, Regions))
    decided = np.empty(shape if isinstance(outputs, Regions) else shape[1:], dtype=np.uint8)
    planes = _decide(merged, outputs, decided)
    if placement.resampled:
        on_source = outputs.interpolated(Rolling(planes, shape), placement)
        _exhaust(planes)
    else:
        _exhaust(planes)
        on_source = outputs.placed(decided, placement)
    return decided, on_source


def turned_to_source(on_source: NDArray[np.uint8], codes: str) -> NDArray[np.uint8]:
    """Classes [Z, Y, X] or regions [K, Z, Y, X] in RAS+ in the order of the file, [X, Y, Z] or [K, X, Y, Z].

    `codes` are the directions of the file's axes; see `mimscale.ingest.geometry.axis_codes`.
    """
    if on_source.ndim == 3:
        return from_store_grid(on_source, codes)
    return np.stack([from_store_grid(region, codes) for region in on_source])


def _logits(
    network: Network,
    image: Normalised,
    spacing_mm: SpacingMm,
    num_outputs: int,
    config: InferenceConfig,
    after_batch: Callable[[], object],
) -> Iterator[Tensor]:
    """Logits of the stored volume, some planes at a time: [K, n, Y, X]."""
    predict = partial(
        predict_planes,
        network.model,
        crop_voxels=network.crop_voxels,
        overlap=config.overlap,
        batch=config.batch,
        device=network.device,
        blending=config.blending,
        flips=[AXES.index(axis) for axis in config.flips],
        after_batch=after_batch,
    )
    target_mm = network.target_mm
    if target_mm is None:
        return cut(predict(image), image.inside)
    z, y, x = image.shape[1:]
    there = target_voxels((z, y, x), spacing_mm, target_mm)
    stream = predict(AtSpacing(image, spacing_mm, target_mm, there))
    back = at_spacing(stream, (num_outputs, *there), target_mm, spacing_mm, (z, y, x))
    return cut(back, image.inside)


def _exhaust(stream: Iterator[Tensor]) -> None:
    for _ in stream:
        pass


def _decide(stream: Iterator[Tensor], outputs: Classes | Regions, decided: NDArray[np.uint8]) -> Iterator[Tensor]:
    """The same planes; what is decided of each goes into `decided` [..., Z, Y, X]."""
    start = 0
    for part in stream:
        stop = start + part.shape[1]
        decided[..., start:stop, :, :] = outputs.decide(part)
        yield part
        start = stop
