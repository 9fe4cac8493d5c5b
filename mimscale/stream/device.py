"""What happens to a batch on the training device: the scanner's numbers become normalised floats.

B samples | C channels | Z Y X crop, voxels
"""

import torch
from torch import Tensor

from mimscale.stream.batch import Batch


def normalise(batch: Batch) -> tuple[Tensor, Tensor]:
    """Normalise a batch on the device where it is: image [B, C, Z, Y, X] float32 and valid [B, 1, Z, Y, X] bool.

    image = (clip(raw, clip_low, clip_high) - shift) * scale, by each sample's own row of the store's contract. What
    lies outside of the volume is the volume's own air, normalised like any voxel, so that a model sees air and not a
    made-up value; `valid` is False there, to keep it out of the loss.
    """
    low, high, shift, scale = batch.normalisation[:, :, None, None, None, :].unbind(-1)  # each [B, C, 1, 1, 1]
    image = batch.volume.to(torch.float32)
    image = image.clamp(low, high).sub_(shift).mul_(scale)
    return image, valid_voxels(batch.inside, tuple(batch.volume.shape[2:]))


def valid_voxels(inside: Tensor, size: tuple[int, ...]) -> Tensor:
    """Boxes [B, 3, 2] (start, stop) -> mask [B, 1, Z, Y, X], True inside of the box."""
    valid = torch.ones((len(inside), 1, 1, 1, 1), dtype=torch.bool, device=inside.device)
    for axis, edge in enumerate(size):
        place = torch.arange(edge, device=inside.device)
        along = (place >= inside[:, axis, :1]) & (place < inside[:, axis, 1:])  # [B, edge]
        valid = valid & along.view([len(inside), 1] + [edge if other == axis else 1 for other in range(3)])
    return valid
