"""Stored voxels keep the scanner's numbers; this is how a reader turns them into a network's input.

    C channels

The contract stands in `store.json` and in every checkpoint. It is applied where the crop is used (on the device), so a
change of policy needs no new store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ChannelStats:
    """Intensities of one channel of one volume, in stored units. Padding outside the field of view is left out."""

    p0_5: float
    p50: float
    p99_5: float
    mean: float
    std: float
    foreground_mean: float
    foreground_std: float


@dataclass(frozen=True, kw_only=True)
class IntensityContract:
    """How stored voxels become a network's input."""

    # window: a fixed range to [0, 1] (CT). zscore: each volume by its own mean and deviation, air included;
    # zscore_foreground: by those of its foreground, so air lies far below the tissue.
    kind: Literal["window", "zscore", "zscore_foreground"] = "zscore"
    window: tuple[float, float] | None = None  # stored units, for kind=window: what becomes 0 and 1

    def __post_init__(self) -> None:
        if self.kind == "window" and self.window is None:
            raise ValueError("intensity.window: kind=window needs [low, high], for example [-1000, 1000] for CT")
        if self.kind != "window" and self.window is not None:
            raise ValueError(f"intensity.window={list(self.window)}: has no effect with kind={self.kind}; remove it")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"intensity.window={list(self.window)}: low must be below high")


def normalisation(contract: IntensityContract, stats: Sequence[ChannelStats]) -> NDArray[np.float32]:
    """The four numbers that normalise each channel of a volume: [C, 4] = clip low, clip high, shift, scale.

    normalised = (clip(stored, low, high) - shift) * scale. A window gives [0, 1]. A z-score clips to the volume's
    p0.5 and p99.5: a few hot voxels would otherwise set the scale of a reconstruction loss. The foreground's deviation
    is a steadier scale when volumes differ in how much air they hold, but it puts air at -3 to -8, and then the border
    between air and tissue is nearly all of a squared reconstruction loss; so it is not the default.
    """
    rows = []
    for channel in stats:
        if contract.window is not None:
            low, high = contract.window
            rows.append((low, high, low, 1.0 / (high - low)))
        else:
            mean, std = channel.mean, channel.std
            if contract.kind == "zscore_foreground":
                mean, std = channel.foreground_mean, channel.foreground_std
            # A constant channel has no scale: it becomes 0 everywhere, not infinite.
            rows.append((channel.p0_5, channel.p99_5, mean, 1.0 / std if std > 0 else 1.0))
    return np.asarray(rows, dtype=np.float32).reshape(len(rows), 4)
