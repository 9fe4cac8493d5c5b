"""Whole volumes through a network that sees windows.

MONAI cuts the windows and puts the logits together again, by default weighted by a Gaussian so that a window's edge,
where the network sees only half of the surroundings, counts little. Logits are gathered in main memory, so that the
accelerator holds `batch` windows and nothing else; main memory holds `(classes + 1) * voxels * 4` bytes of one volume
at a time. Logits, not classes, are what goes back to the grid of a source that was resampled: see
`mimscale.ingest.placement`.

    B windows | C channels | K classes | Z Y X volume, voxels
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn


def window_batches(size_voxels: Sequence[int], crop_voxels: Sequence[int], overlap: float, batch: int) -> int:
    """Forward passes that one volume takes: what a progress bar counts to."""
    windows = 1
    for edge, crop in zip(size_voxels, crop_voxels, strict=True):
        step = crop if edge <= crop else max(1, int(crop * (1 - overlap)))
        windows *= math.ceil(max(0, edge - crop) / step) + 1
    return math.ceil(windows / batch)


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    image: Tensor,
    crop_voxels: Sequence[int],
    *,
    overlap: float,
    batch: int,
    device: torch.device,
    blending: Literal["gaussian", "constant"] = "gaussian",
    flips: Sequence[int] = (),
    after_batch: Callable[[], object] = lambda: None,
) -> Tensor:
    """Logits of every voxel: [C, Z, Y, X] float32 on the CPU -> [K, Z, Y, X] float32 on the CPU.

    Args:
        model: windows [B, C, *crop_voxels] -> logits [B, K, *crop_voxels]; on `device`, in eval mode.
        image: normalised as in training, and at least as large as a window (see `volumes.read_normalised`).
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
    if any(edge < crop for edge, crop in zip(image.shape[1:], crop_voxels, strict=True)):
        raise ValueError(
            f"an image of {tuple(image.shape[1:])} voxels is smaller than a window of {tuple(crop_voxels)}"
        )
    from monai.inferers.utils import sliding_window_inference

    def predict(windows: Tensor) -> Tensor:
        logits = _mean_over_flips(model, windows, flips)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the network answered with numbers that are not finite")
        after_batch()
        return logits

    logits = sliding_window_inference(
        image[None],
        tuple(crop_voxels),
        batch,
        predict,
        overlap=overlap,
        mode=blending,
        sw_device=device,
        device="cpu",
    )
    assert isinstance(logits, Tensor)
    return logits[0]


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
