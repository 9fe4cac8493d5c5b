"""Whole volumes through a network that sees windows.

MONAI says where windows lie and how much each of their voxels counts: by default by a Gaussian, so that a window's
edge, where the network sees only half of the surroundings, counts little. Logits are gathered in main memory, so that
the accelerator holds `batch` windows and nothing else. Windows come in the order of Z, so a plane is finished once they
begin behind it: of all logits only `(classes + 1) * crop_z * Y * X * 4` bytes are there at a time. Logits, not
classes, are what goes back to the grid of a source that was resampled: see `mimscale.ingest.placement`.

    B windows | C channels | K classes | Z Y X volume, voxels | n some planes along Z
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mimscale.evaluate.planes import STRIPE_BYTES, Planes


def window_batches(size_voxels: Sequence[int], crop_voxels: Sequence[int], overlap: float, batch: int) -> int:
    """Forward passes that one volume takes: what a progress bar counts to."""
    windows = 1
    for edge, crop in zip(size_voxels, crop_voxels, strict=True):
        windows *= math.ceil(max(0, edge - crop) / _step(edge, crop, overlap)) + 1
    return math.ceil(windows / batch)


def predict_planes(
    model: nn.Module,
    image: Planes,
    crop_voxels: Sequence[int],
    *,
    overlap: float,
    batch: int,
    device: torch.device,
    blending: Literal["gaussian", "constant"] = "gaussian",
    flips: Sequence[int] = (),
    after_batch: Callable[[], object] = lambda: None,
) -> Iterator[Tensor]:
    """Logits of every voxel, some planes at a time in the order of Z: float32 [K, n, Y, X] on the CPU.

    Args:
        model: windows [B, C, *crop_voxels] -> logits [B, K, *crop_voxels]; on `device`, in eval mode.
        image: normalised as in training, and at least as large as a window (see `planes.Normalised`).
        crop_voxels: [Z, Y, X] of a window: the network's input.
        overlap: share of a window that the next one covers again, 0 to below 1.
        batch: windows per forward pass.
        device: where the model is.
        blending: how windows that overlap are weighted: less towards their edges, or equally.
        flips: axes of a window, 0 for Z to 2 for X; the answer is the mean of the logits of the window and of its
            mirror images along every combination of them, turned back.
        after_batch: called after each forward pass.

    Raises:
        ValueError: the image is smaller than a window.
        FloatingPointError: the network answered with a number that is not finite.
    """
    from monai.data.utils import compute_importance_map, dense_patch_slices

    size, (cz, cy, cx) = image.shape[1:], crop_voxels
    if any(edge < crop for edge, crop in zip(size, crop_voxels, strict=True)):
        raise ValueError(f"an image of {tuple(size)} voxels is smaller than a window of {tuple(crop_voxels)}")
    steps = [_step(edge, crop, overlap) for edge, crop in zip(size, crop_voxels, strict=True)]
    corners = [tuple(edge.start for edge in window) for window in dense_patch_slices(size, (cz, cy, cx), steps)]
    weights = compute_importance_map((cz, cy, cx), mode=blending, device=device)
    sums: Tensor | None = None
    counts, counted = torch.zeros(cz, *size[1:]), weights.cpu()  # sums of weights
    first = 0  # the plane that sums and counts begin with
    slab, slab_at = image.planes(0, cz), 0
    for at in range(0, len(corners), batch):
        group, windows = corners[at : at + batch], []
        for z, y, x in group:
            if z != slab_at:
                slab, slab_at = image.planes(z, z + cz), z
            windows.append(slab[:, :, y : y + cy, x : x + cx])
        weighted = _weighted_logits(model, torch.stack(windows).to(device), flips, weights)
        after_batch()
        if sums is None:
            sums = torch.zeros(weighted.shape[1], *counts.shape)
        for (z, y, x), window in zip(group, weighted, strict=True):
            if z > first:
                yield from _means(sums, counts, z - first)
                _move_up(sums, z - first)
                _move_up(counts[None], z - first)
                first = z
            sums[:, :, y : y + cy, x : x + cx] += window
            counts[:, y : y + cy, x : x + cx] += counted
    assert sums is not None, "an image has at least one window"
    yield from _means(sums, counts, len(counts))


@torch.inference_mode()
def _weighted_logits(model: nn.Module, windows: Tensor, flips: Sequence[int], weights: Tensor) -> Tensor:
    """[B, C, Z, Y, X] -> mean logits over flips times `weights` [Z, Y, X]: [B, K, Z, Y, X] on the CPU."""
    logits = _mean_over_flips(model, windows, flips)
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("the network answered with numbers that are not finite")
    return logits.mul_(weights).cpu()


def _means(sums: Tensor, counts: Tensor, stop: int) -> Iterator[Tensor]:
    """The first `stop` planes of sums [K, n, Y, X] by counts [n, Y, X], few at a time: what is new stays small."""
    stripe = max(1, STRIPE_BYTES // (4 * sums[:, 0].numel()))
    for low in range(0, stop, stripe):
        high = min(low + stripe, stop)
        yield sums[:, low:high] / counts[low:high]


def _move_up(planes: Tensor, by: int) -> None:
    """Move planes [K, n, Y, X] to lower numbers in place, zeros after them. Whole planes never overlap themselves."""
    for old in range(by, planes.shape[1]):
        planes[:, old - by] = planes[:, old]
    planes[:, max(0, planes.shape[1] - by) :] = 0


def _step(edge: int, crop: int, overlap: float) -> int:
    """From one window to the next along an axis."""
    return crop if edge <= crop else max(1, int(crop * (1 - overlap)))


def _mean_over_flips(model: nn.Module, windows: Tensor, flips: Sequence[int]) -> Tensor:
    """[B, C, Z, Y, X] -> mean logits [B, K, Z, Y, X]."""
    total = model(windows).float()
    mirrored = [axes for count in range(1, len(flips) + 1) for axes in itertools.combinations(flips, count)]
    for axes in mirrored:
        turned = [axis + 2 for axis in axes]
        total = total + model(windows.flip(turned)).float().flip(turned)
    mean: Tensor = total / (1 + len(mirrored))
    return mean


def classes_of(logits: Tensor) -> Tensor:
    """The class with the highest logit of every voxel: [K, Z, Y, X] -> [Z, Y, X] uint8."""
    # One pass over the classes keeps the temporary at one class; argmax alone would make an int64 copy of the volume.
    best, classes = logits[0], torch.zeros(logits.shape[1:], dtype=torch.uint8)
    for number in range(1, len(logits)):
        higher = logits[number] > best
        best = torch.where(higher, logits[number], best)
        classes[higher] = number
    return classes
