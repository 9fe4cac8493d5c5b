"""Which parts of which chunks a box is made of, for the loop over chunks in Python.

C channels | Z Y X box, voxels
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
Box = tuple[Triple, Triple, NDArray[Any]]  # what [low, stop) of an array is wanted, and the view that it goes to
# Where decoded voxels go: crop[place] = chunk[cut], once the chunk is decoded.
Piece = tuple[NDArray[Any], tuple[int | slice, ...], NDArray[Any], tuple[slice, ...]]


def pieces_of(boxes: list[Box], chunk: NDArray[Any], grid: tuple[int, int, int, int]) -> dict[int, list[Piece]]:
    """What to do with each chunk that a box [low, stop) touches, by its number, when it is decoded into `chunk`."""
    channels, *grid_zyx = grid
    pieces: dict[int, list[Piece]] = {}
    for low, stop, crop in boxes:
        z_cuts, y_cuts, x_cuts = (list(_cuts(a, b, len(chunk))) for a, b in zip(low, stop, strict=True))
        columns = [(x, *_as_rows(crop[..., place], chunk[..., cut])) for x, place, cut in x_cuts]
        for channel in range(channels):
            for z, z_place, z_cut in z_cuts:
                for y, y_place, y_cut in y_cuts:
                    row = ((channel * grid_zyx[0] + z) * grid_zyx[1] + y) * grid_zyx[2]
                    place, cut = (channel, z_place, y_place), (z_cut, y_cut)
                    for x, crop_rows, chunk_rows in columns:
                        pieces.setdefault(row + x, []).append((crop_rows, place, chunk_rows, cut))
    return pieces


def _as_rows(crop: NDArray[Any], chunk: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both with each row of voxels as one element where that is possible: it halves the cost of a copy."""
    if crop.dtype != chunk.dtype or crop.strides[-1] != crop.itemsize:
        return crop, chunk
    row = np.dtype((np.void, chunk.shape[-1] * chunk.itemsize))
    return crop.view(row)[..., 0], chunk.view(row)[..., 0]


def _cuts(low: int, stop: int, edge: int) -> Iterator[tuple[int, slice, slice]]:
    """Along one axis: each chunk that [low, stop) touches, its place in the box, and which part of it."""
    for chunk in range(low // edge, -(-stop // edge)):
        start = chunk * edge
        first, last = max(low, start), min(stop, start + edge)
        yield chunk, slice(first - low, last - low), slice(first - start, last - start)
