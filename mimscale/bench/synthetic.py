"""A batch that no store has: random voxels on the device, so that a step is measured without its data."""

import torch

from mimscale.stream.batch import Batch
from mimscale.train.config import PretrainConfig


def synthetic_batch(config: PretrainConfig, channels: int, device: torch.device) -> Batch:
    """One micro-batch as the loader would give it: int16 voxels, a window of -1000 to 1000, all of them inside."""
    B, (Z, Y, X) = config.micro_batch, config.crop_voxels
    generator = torch.Generator().manual_seed(config.seed)
    volume = torch.randint(-1000, 1000, (B, channels, Z, Y, X), dtype=torch.int16, generator=generator)
    batch = Batch(
        volume=volume,
        label=None,
        sample_ids=torch.arange(B),
        seeds=list(range(B)),
        spacing_mm=[(1.0, 1.0, 1.0)] * B,
        normalisation=torch.tensor([-1000.0, 1000.0, 0.0, 1e-3]).expand(B, channels, 4).contiguous(),
        inside=torch.tensor([[0, Z], [0, Y], [0, X]], dtype=torch.int32).expand(B, 3, 2).contiguous(),
        volume_ids=["synthetic"] * B,
        subjects=[f"synthetic {number}" for number in range(B)],  # SimCLR tells them apart
        counted=torch.ones(B, dtype=torch.bool),
    )
    return batch.to(device)
