"""What is left of a step that went wrong: diagnostics/step_00000123-rank00001/ in the run directory.

    batch-0.safetensors ...   the micro-batches of that rank as they reached the device, before normalisation
    facts.json                losses, gradient norm, and of each micro-batch sample ids, seeds, volume ids; the config

Volume ids are hashes, but the voxels are a patient's: none of this belongs into what you share.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mimscale import durable
from mimscale.stream.batch import Batch


def bundle_name(step: int, rank: int) -> str:
    """Folder name of one rank's bundle."""
    return f"step_{step:08d}-rank{rank:05d}"


def write_bundle(
    folder: Path,
    *,
    micro_batches: Sequence[Batch],
    losses: Sequence[float],
    grad_norm: float,
    step: int,
    config: dict[str, Any],
) -> None:
    """Write a bundle; it is complete or absent. An older one of the same step stays.

    Raises:
        OSError: the disk is full or not writable.
    """
    if folder.exists():
        return
    temporary = folder.with_name(durable.TEMPORARY_PREFIX + folder.name)
    temporary.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(micro_batches):
        tensors = {name: value.detach().cpu().contiguous() for name, value in batch.tensors().items()}
        with durable.open_atomically(temporary / f"batch-{number}.safetensors") as file:
            file.write(save(tensors))
    facts = {
        "step": step,
        "grad_norm": str(grad_norm),  # text: JSON knows no NaN
        "micro_batches": [
            {
                "loss": str(loss),
                "batch_index": batch.batch_index,
                "sample_ids": batch.sample_ids.tolist(),
                "seeds": batch.seeds,
                "volume_ids": batch.volume_ids,
                "spacing_mm": batch.spacing_mm,
                "not_finite_voxels": _not_finite(batch.volume),
            }
            for loss, batch in zip(losses, micro_batches, strict=True)
        ],
        "config": config,
    }
    durable.write_text(temporary / "facts.json", json.dumps(facts, indent=2, default=str))
    durable.rename_folder(temporary, folder)


def _not_finite(volume: Tensor) -> int:
    return int((~volume.isfinite()).sum()) if volume.is_floating_point() else 0
