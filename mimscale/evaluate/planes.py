"""Volumes that pass plane by plane along Z, so that logits of a whole volume are never in memory.

    C channels | K outputs | Z Y X volume, voxels | n some planes along Z

A large CT has 268 million voxels: its logits of 14 classes are 15 GB. Here only those planes live that windows still
add to, or that an interpolation along Z still needs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STRIPE_BYTES = 2**25  # of planes that are worked on at once, where a few are as good as many


class Planes(Protocol):
    """An image of which some planes can be had at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """C, Z, Y, X."""
        ...

    def planes(self, start: int, stop: int) -> Tensor:
        """Float32 [C, stop - start, Y, X] on the CPU."""
        ...


class Normalised:
    """A stored volume in the units of a network. It lies in the middle of its own air where it is smaller than asked.

    Args:
        raw: [C, Z, Y, X] in stored units; it is not copied, unless it has to grow.
        fill_value: its air.
        numbers: [C, 4], see `mimscale.store.intensity.normalisation`.
        at_least_voxels: edges [Z, Y, X] that it must have.
    """

    def __init__(
        self, raw: NDArray[Any], fill_value: float, numbers: NDArray[np.float32], at_least_voxels: Sequence[int]
    ) -> None:
        missing = [max(0, least - edge) for least, edge in zip(at_least_voxels, raw.shape[1:], strict=True)]
        before = [edges // 2 for edges in missing]
        z, y, x = (slice(start, start + edge) for start, edge in zip(before, raw.shape[1:], strict=True))
        self.inside = (z, y, x)  # where the volume lies
        if any(missing):
            around = [(0, 0), *((start, edges - start) for start, edges in zip(before, missing, strict=True))]
            raw = np.pad(raw, around, constant_values=fill_value)
        self._raw = raw
        self._numbers = numbers

    @property
    def shape(self) -> tuple[int, ...]:
        """C, Z, Y, X."""
        return self._raw.shape

    def planes(self, start: int, stop: int) -> Tensor:
        """See `Planes`."""
        image = self._raw[:, start:stop].astype(np.float32)
        for channel, (low, high, shift, scale) in zip(image, self._numbers, strict=True):
            np.clip(channel, low, high, out=channel)
            channel -= shift
            channel *= scale
        return torch.from_numpy(image)


class Rolling:
    """Planes that a stream gives one after the other, kept as long as somebody may ask for them.

    Args:
        stream: [K, n, Y, X] float32 each, any n.
        shape: K, Z, Y, X of all of it.
    """

    def __init__(self, stream: Iterator[Tensor], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._stream = stream
        self._parts: list[Tensor] = []  # what is kept
        self._first = self._stop = 0  # its first and last + 1 plane

    def planes(self, low: int, high: int) -> Tensor:
        """Planes [low, high): [K, high - low, Y, X]. No later call may ask for one below `low`."""
        if low < self._first:
            raise ValueError(f"plane {low} is gone, the first that is kept is {self._first}")
        self._drop(low)
        while self._stop < high:
            part = next(self._stream)
            self._parts.append(part)
            self._stop += part.shape[1]
            self._drop(low)
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0][:, : high - low]

    def _drop(self, low: int) -> None:
        while self._parts and self._first + self._parts[0].shape[1] <= low:
            self._first += self._parts.pop(0).shape[1]
        if self._parts and self._first < low:
            self._parts[0] = self._parts[0][:, low - self._first :]
            self._first = low

    def between(self, low: int, high: int) -> NDArray[np.float32]:
        """The same as an array; see `mimscale.ingest.resample.LogitPlanes`."""
        array: NDArray[np.float32] = self.planes(low, high).numpy()
        return array


def cut(stream: Iterator[Tensor], inside: tuple[slice, slice, slice]) -> Iterator[Tensor]:
    """The part `inside` (Z, Y, X) of a stream of planes [K, n, Y, X]."""
    z, y, x = inside
    first = 0
    for part in stream:
        low, high = max(z.start - first, 0), min(z.stop - first, part.shape[1])
        first += part.shape[1]
        if low < high:
            yield part[:, low:high, y, x]


def mean_over_folds(
    streams: Sequence[Iterator[Tensor]], shape: Sequence[int], *, overlapping: bool
) -> Iterator[Tensor]:
    """The mean of the probabilities of several networks, as logits: each stream and the result [K, n, Y, X] a step.

    Args:
        streams: logits of each network, `shape` = K, Z, Y, X in all. A single one passes as it is.
        shape: see above.
        overlapping: outputs are regions that may overlap (sigmoid), and not classes (softmax).
    """
    first, *others = streams
    if not others:
        yield from first
        return
    rollings = [Rolling(stream, shape) for stream in others]
    start = 0
    for part in first:
        stop = start + part.shape[1]
        mean = torch.zeros_like(part)
        for logits in (part, *(rolling.planes(start, stop) for rolling in rollings)):
            mean += torch.sigmoid(logits) if overlapping else torch.softmax(logits, dim=0)
        mean /= len(streams)
        # Back to logits, so that whatever becomes of those of one network becomes of these. -inf is a good logit.
        yield torch.logit(mean) if overlapping else mean.log()
        start = stop
