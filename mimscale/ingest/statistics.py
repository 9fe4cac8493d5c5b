"""What a volume's voxels say: its air, its intensities, where the patient is.

C channels | Z Y X volume, voxels

All numbers of a channel come from its values in order: whole numbers are counted (some thousand counts instead of
millions of voxels), others are sorted. Both are exact, and several times faster than a pass for each number.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mimscale.store.intensity import ChannelStats
from mimscale.store.rows import Box

CT_AIR_HU = -1024.0
CT_PADDING_BELOW_HU = -1500.0  # no tissue and no air reads this; scanners write -2000 or -3024 outside the gantry
CT_FOREGROUND_ABOVE_HU = -500.0  # between air or lung and everything else
# Otsu's threshold parts dark tissue from bright tissue; air is darker than half of it, fluid is not.
AIR_BELOW_OTSU = 0.5
_OTSU_BINS = 256
_BLOCK_VOXELS = 2**18  # temporary arrays of 8 bytes a voxel stay in the cache, and memory does not grow with the volume


def fill_value(volume: NDArray[Any], modality: str) -> float:
    """The value of air: what stands outside the volume, and what chunks that are not stored hold."""
    if modality == "ct" and volume.dtype.kind in "if":
        return CT_AIR_HU
    return float(volume.min())


def padding_below(modality: str) -> float | None:
    """Voxels below this were never measured; None where no number says so."""
    return CT_PADDING_BELOW_HU if modality == "ct" else None


def describe(
    volume: NDArray[Any], modality: str, padding_value: float | None = None
) -> tuple[tuple[ChannelStats, ...], Box]:
    """Statistics of each channel, and the box (zyx start, stop) of the foreground of all channels; see `measure`."""
    stats, box, _ = measure(volume, modality, padding_value)
    return stats, box


def measure(
    volume: NDArray[Any], modality: str, padding_value: float | None = None
) -> tuple[tuple[ChannelStats, ...], Box, tuple[float, ...]]:
    """Statistics of each channel, the box (zyx start, stop) of the foreground of all channels, and their thresholds.

    A voxel is foreground where it is above the threshold of its channel.

    Args:
        volume: [C, Z, Y, X]; integers or floats, all finite.
        modality: for `ct` fixed thresholds part padding, air and body; otherwise the histogram does.
        padding_value: voxels of this value were never measured, and count for nothing.
    """
    stats, thresholds = [], []
    _, z, y, x = volume.shape
    used = [np.zeros(edge, dtype=bool) for edge in (z, y, x)]
    for channel in volume:
        values: _Counted | _Sorted = (
            _counted(channel) if channel.dtype.kind in "iu" else _Sorted(np.sort(channel, None))
        )
        if padding_value is not None:
            values = values.without(padding_value) or values
        if modality == "ct":
            values = values.at_least(CT_PADDING_BELOW_HU) or values
        p0_5, p50, p99_5 = values.percentile(0.5), values.percentile(50), values.percentile(99.5)
        threshold = CT_FOREGROUND_ABOVE_HU
        if modality != "ct":
            otsu = otsu_threshold(values.histogram(p0_5, p99_5), p0_5, p99_5)
            threshold = p0_5 + AIR_BELOW_OTSU * (otsu - p0_5)
        # No foreground: a constant volume, or a CT of nothing but air.
        foreground = values.at_least(float(np.nextafter(threshold, np.inf))) or values
        mean, std = values.moments()
        foreground_mean, foreground_std = foreground.moments()
        stats.append(
            ChannelStats(
                p0_5=p0_5,
                p50=p50,
                p99_5=p99_5,
                mean=mean,
                std=std,
                foreground_mean=foreground_mean,
                foreground_std=foreground_std,
            )
        )
        # The largest value along an axis tells whether any voxel is foreground, without a mask of the volume's size.
        highest_yx = channel.max(axis=0)
        for used_axis, highest in zip(used, (channel.reshape(z, -1), highest_yx, highest_yx.T), strict=True):
            used_axis |= highest.max(axis=1) > threshold
        thresholds.append(float(threshold))
    return tuple(stats), _box(used), tuple(thresholds)


def otsu_threshold(counts: NDArray[np.int64], low: float, high: float) -> float:
    """The threshold in [low, high] with the most variance between its two sides (Otsu 1979).

    Args:
        counts: voxels in equally wide bins from low to high.
        low: left edge of the first bin.
        high: right edge of the last bin.
    """
    if not low < high:
        return high
    edges = np.linspace(low, high, len(counts) + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty class at either end
        mean_gap = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * mean_gap**2)
    best = np.flatnonzero(between == between.max())  # every bin of an empty gap is as good: take the middle
    return float(edges[1 + int(best.mean())])


def count_values(array: NDArray[Any], low: int, high: int) -> NDArray[np.int64]:
    """How often each of low, low + 1 ... high stands in an array of whole numbers, all of them within.

    Raises:
        ValueError: a number lies outside.
    """
    flat = array.reshape(-1)
    counts = np.zeros(high - low + 1, dtype=np.int64)
    for start in range(0, flat.size, _BLOCK_VOXELS):
        place = np.subtract(flat[start : start + _BLOCK_VOXELS], low, dtype=np.intp)
        found = np.bincount(place, minlength=len(counts))  # refuses what is below low
        if len(found) > len(counts):
            raise ValueError(f"holds {len(found) - 1 + low}, above {high}")
        counts += found
    return counts


@dataclass(frozen=True)
class _Counted:
    """Voxels of whole numbers, by value."""

    values: NDArray[np.float64]  # ascending
    counts: NDArray[np.int64]

    def percentile(self, percent: float) -> float:
        ends = np.cumsum(self.counts)
        rank, part = divmod(percent / 100 * (int(ends[-1]) - 1), 1)
        low, high = self.values[np.searchsorted(ends, [rank, min(rank + 1, ends[-1] - 1)], side="right")]
        return float(low + part * (high - low))

    def at_least(self, low: float) -> "_Counted | None":
        """The voxels of at least `low`, or None when there is none."""
        keep = slice(int(np.searchsorted(self.values, low)), None)
        return _Counted(self.values[keep], self.counts[keep]) if self.counts[keep].any() else None

    def without(self, value: float) -> "_Counted | None":
        """The voxels of any other value, or None when there is none."""
        counts = np.where(self.values == value, 0, self.counts)
        return _Counted(self.values, counts) if counts.any() else None

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        size = int(self.counts.sum())
        mean = float(self.values @ self.counts) / size
        return mean, float(np.sqrt((self.values - mean) ** 2 @ self.counts / size))

    def histogram(self, low: float, high: float) -> NDArray[np.int64]:
        counts = np.histogram(self.values, bins=_OTSU_BINS, range=(low, high), weights=self.counts)[0]
        return np.asarray(counts, dtype=np.int64)


@dataclass(frozen=True)
class _Sorted:
    """Voxels of any numbers, ascending."""

    values: NDArray[np.floating]

    def percentile(self, percent: float) -> float:
        rank, part = divmod(percent / 100 * (self.values.size - 1), 1)
        low, high = (float(self.values[min(int(rank) + step, self.values.size - 1)]) for step in (0, 1))
        return low + part * (high - low)

    def at_least(self, low: float) -> "_Sorted | None":
        """The voxels of at least `low`, or None when there is none."""
        kept = self.values[self._ranks([low])[0] :]
        return _Sorted(kept) if kept.size else None

    def without(self, value: float) -> "_Sorted | None":
        """The voxels of any other value, or None when there is none."""
        kept = self.values[self.values != value]
        return _Sorted(kept) if kept.size else None

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        starts = range(0, self.values.size, _BLOCK_VOXELS)
        blocks = [self.values[start : start + _BLOCK_VOXELS] for start in starts]
        mean = sum(float(block.sum(dtype=np.float64)) for block in blocks) / self.values.size
        squares = sum(float(np.square(block - np.float64(mean)).sum()) for block in blocks)
        return mean, float(np.sqrt(squares / self.values.size))

    def histogram(self, low: float, high: float) -> NDArray[np.int64]:
        edges = np.linspace(low, high, _OTSU_BINS + 1)
        edges[-1] = np.nextafter(high, np.inf)  # the last bin has its right edge too
        return np.diff(self._ranks(edges))

    def _ranks(self, lows: ArrayLike) -> NDArray[np.int64]:
        """How many voxels are smaller, for each of `lows`."""
        # In the voxels' own precision, rounded up: numpy would make a float64 copy of them all.
        wide = np.asarray(lows, dtype=np.float64)
        narrow = wide.astype(self.values.dtype)
        narrow = np.where(narrow < wide, np.nextafter(narrow, np.inf, dtype=narrow.dtype), narrow)
        return np.searchsorted(self.values, narrow).astype(np.int64)


def _counted(channel: NDArray[Any]) -> _Counted:
    low, high = int(channel.min()), int(channel.max())
    return _Counted(np.arange(low, high + 1, dtype=np.float64), count_values(channel, low, high))


def _box(used: list[NDArray[np.bool_]]) -> Box:
    """Start and stop of what is True along Z, Y, X; everything when nothing is."""
    ranges = []
    for axis in used:
        places = np.flatnonzero(axis)
        ranges.append((int(places[0]), int(places[-1]) + 1) if places.size else (0, axis.size))
    z_range, y_range, x_range = ranges
    return (z_range, y_range, x_range)
