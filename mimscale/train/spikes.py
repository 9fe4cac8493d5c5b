"""Is a loss out of line with those before it? A pure function of the losses, so all ranks answer alike."""

import statistics
from collections import deque
from dataclasses import dataclass

from mimscale.train.config import HealthConfig

# Of the median absolute deviation: makes it the standard deviation of normal noise.
MAD_SCALE = 1.4826
# A deviation below this part of the median is no scale: a loss may stand still for a while.
LEAST_DEVIATION_RATIO = 1e-3


@dataclass(frozen=True)
class Spike:
    """A loss that left its band."""

    loss: float
    median: float
    threshold: float


class SpikeDetector:
    """Compares each loss with median + `spike_deviations` robust deviations of the `spike_window` losses before it.

    `spike_steps` losses in a row above that are a spike, reported once: single batches are odd, divergence lasts. The
    losses of a spike enter the window as well, so a new level is accepted in the end. Nothing is judged before half a
    window.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._window: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row = 0

    def observe(self, loss: float) -> Spike | None:
        """Judge the next loss; the spike that it completes, if it does."""
        spike = self._judged(loss)
        self._window.append(loss)
        self._in_a_row = 0 if spike is None else self._in_a_row + 1
        return spike if self._in_a_row == self._config.spike_steps else None

    def forget_spike(self) -> None:
        """Its weights were given up: its losses are no measure, and the loss may rise again."""
        for _ in range(min(self._in_a_row, len(self._window))):
            self._window.pop()
        self._in_a_row = 0

    def _judged(self, loss: float) -> Spike | None:
        if len(self._window) < (self._config.spike_window + 1) // 2:
            return None
        median = statistics.median(self._window)
        deviation = MAD_SCALE * statistics.median(abs(value - median) for value in self._window)
        threshold = median + self._config.spike_deviations * max(deviation, LEAST_DEVIATION_RATIO * abs(median))
        return Spike(loss, median, threshold) if loss > threshold else None
