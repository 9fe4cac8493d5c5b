"""What a volume's voxels say: its air, its intensities, where the patient is.

C channels | Z Y X volume, voxels
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimscale.store.intensity import ChannelStats
from mimscale.store.manifest import Box

CT_AIR_HU = -1024.0
CT_PADDING_BELOW_HU = -1500.0  # no tissue and no air reads this; scanners write -2000 or -3024 outside the gantry
CT_FOREGROUND_ABOVE_HU = -500.0  # between air or lung and everything else
# Otsu's threshold parts dark tissue from bright tissue; air is darker than half of it, fluid is not.
AIR_BELOW_OTSU = 0.5
_BINS = 256


def fill_value(volume: NDArray[Any], modality: str) -> float:
    """The value of air: what stands outside the volume, and what chunks that are not stored hold."""
    if modality == "ct" and volume.dtype.kind in "if":
        return CT_AIR_HU
    return float(volume.min())


def describe(volume: NDArray[Any], modality: str) -> tuple[tuple[ChannelStats, ...], Box]:
    """Statistics of each channel, and the box (zyx start, stop) of the foreground of all channels.

    Args:
        volume: [C, Z, Y, X].
        modality: for `ct` fixed thresholds part padding, air and body; otherwise the histogram does.
    """
    stats, masks = [], np.zeros(volume.shape[1:], dtype=bool)
    for channel in volume:
        values: NDArray[Any] = channel.reshape(-1)
        if modality == "ct" and channel.min() < CT_PADDING_BELOW_HU:
            inside = values[values >= CT_PADDING_BELOW_HU]
            values = inside if inside.size else values
        p0_5, p50, p99_5 = (float(value) for value in np.percentile(values, [0.5, 50, 99.5]))
        if modality == "ct":
            threshold = CT_FOREGROUND_ABOVE_HU
        else:
            threshold = p0_5 + AIR_BELOW_OTSU * (otsu_threshold(values, p0_5, p99_5) - p0_5)
        foreground = values[values > threshold]
        if foreground.size == 0:  # a constant volume, or a CT of nothing but air
            foreground = values
        else:
            masks |= channel > threshold
        stats.append(
            ChannelStats(
                p0_5=p0_5,
                p50=p50,
                p99_5=p99_5,
                mean=float(values.mean(dtype=np.float64)),
                std=float(values.std(dtype=np.float64)),
                foreground_mean=float(foreground.mean(dtype=np.float64)),
                foreground_std=float(foreground.std(dtype=np.float64)),
            )
        )
    return tuple(stats), _box(masks)


def otsu_threshold(values: NDArray[Any], low: float, high: float) -> float:
    """The threshold in [low, high] with the most variance between its two sides (Otsu 1979)."""
    if not low < high:
        return high
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty class at either end
        mean_gap = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * mean_gap**2)
    best = np.flatnonzero(between == between.max())  # every bin of an empty gap is as good: take the middle
    return float(edges[1 + int(best.mean())])


def _box(mask: NDArray[np.bool_]) -> Box:
    """Start and stop of what is True along Z, Y, X; everything when nothing is."""
    if not mask.any():
        z, y, x = mask.shape
        return ((0, z), (0, y), (0, x))
    ranges = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        ranges.append((int(used[0]), int(used[-1]) + 1))
    z_range, y_range, x_range = ranges
    return (z_range, y_range, x_range)
