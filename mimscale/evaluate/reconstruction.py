"""Hidden voxels of fixed crops, predicted by a pretrained network, beside the simplest guess there is.

B samples | C channels | Z Y X crop, voxels | L patches a crop
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale import durable
from mimscale.console import track
from mimscale.errors import CheckpointError
from mimscale.evaluate.config import EvaluateConfig
from mimscale.models.config import TargetConfig
from mimscale.models.masking import draw_masks
from mimscale.models.patches import patchify, unpatchify
from mimscale.models.reconstruction import Reconstructor
from mimscale.models.trivial import mean_voxel
from mimscale.store.manifest import Manifest
from mimscale.stream.config import StreamConfig
from mimscale.stream.device import labels, normalise, without_excluded
from mimscale.stream.loader import Batch, fixed_batches
from mimscale.stream.plan import FixedPlan
from mimscale.train.config import PretrainConfig
from mimscale.world import World

ERROR_NAMES = {"l1": "mean absolute error", "l2": "mean squared error"}


@torch.inference_mode()
def evaluate_reconstruction(
    config: EvaluateConfig,
    run_config: PretrainConfig,
    model: Reconstructor,
    device: torch.device,
    store: Path,
    manifest: Manifest,
    indices: NDArray[np.int64],
) -> dict[str, Any]:
    """Score `model` on fixed crops of the volumes `indices`; the part of scores.json that belongs to pretraining.

    Raises:
        DataError: a crop that cannot be read: scores of other crops than asked for would compare with nothing.
        CheckpointError: the network answers with numbers that are not finite.
    """
    target = run_config.target
    assert target is not None, "the caller asks no other run"
    stream = StreamConfig(
        workers=0,
        crops_per_volume=config.crops,
        origins="foreground",
        max_bad_samples=0,
        target_spacing_mm=run_config.stream.target_spacing_mm,
    )
    plan = FixedPlan.of(manifest, indices, seed=run_config.seed, crop_voxels=run_config.crop_voxels, config=stream)
    batches = fixed_batches(
        store=store,
        manifest=manifest,
        indices=indices,
        plan=plan,
        world=World(),
        batch=config.batch,
        config=stream,
        overlay=run_config.exclude_overlay,
        pin_memory=False,
    )
    crops: list[dict[str, Any]] = []
    shown: dict[int, tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]] = {}  # of a volume, the crop to picture
    folder = config.folder
    for batch in track(batches, "reconstruct crops, batches", -(-len(plan) // config.batch)):
        image, predicted, guess, hidden, valid = _reconstruct(batch.to(device), run_config, target, model)
        for place in np.flatnonzero(batch.counted.numpy()):
            sample = int(batch.sample_ids[place])
            volume, crop = divmod(sample, config.crops)
            counted = (hidden[place] & valid[place]).expand_as(image[place])
            scores = {
                name: _error(picture[place], image[place], counted, target.loss)
                for name, picture in (("network", predicted), ("baseline", guess))
            }
            if not np.isfinite(scores["network"]):
                raise CheckpointError(
                    f"{config.run_dir}: volume {batch.volume_ids[place]}: the network answered with numbers that are "
                    "not finite; evaluate an earlier checkpoint=step_..."
                )
            entry = {
                "volume": batch.volume_ids[place],
                "crop": crop,
                "origin_zyx": plan.samples(np.array([sample])).origin[0].tolist(),
                "hidden_voxels": int(counted[0].sum()),
                **scores,
                "file": None,
            }
            # The crop in which most is to be found: chosen by the simplest guess, never by how well the network did.
            if volume < config.pictures and (volume not in shown or entry["baseline"] > shown[volume][0]["baseline"]):
                shown[volume] = (entry, (image[place], predicted[place], hidden[place]))
            crops.append(entry)
    for volume, (entry, layers) in shown.items():
        entry["file"] = f"reconstructions/{entry['volume']}_{entry['crop']}.npz"
        spacing_mm = run_config.stream.target_spacing_mm or manifest.row(int(indices[volume])).spacing_mm
        _save(folder / entry["file"], *layers, spacing_mm)
    return {
        "error": ERROR_NAMES[target.loss],
        "unit": "of normalised intensities",
        "baseline": (
            "the mean of the crop's visible voxels"
            if target.target == "raw"
            else "each hidden patch's own mean, which a patch-normalised target gives away"
        ),
        "crops": crops,
        "mean": {name: statistics.fmean(crop[name] for crop in crops) for name in ("network", "baseline")},
    }


def _reconstruct(
    batch: Batch, run_config: PretrainConfig, target: TargetConfig, model: Reconstructor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, prediction, simplest guess: [B, C, Z, Y, X]; hidden, valid: bool [B, 1, Z, Y, X]. All on the CPU."""
    image, valid = normalise(batch)
    valid = without_excluded(valid, None if run_config.exclude_overlay is None else labels(batch))
    # The same ratio for every crop, also where training draws it from a range.
    hidden = torch.from_numpy(
        draw_masks(
            batch.seeds, run_config.crop_voxels, run_config.patch_voxels, run_config.mask, ratio_seed=run_config.seed
        )
    )
    pictures = model.reconstruct(image, hidden)
    if target.target == "raw":
        guess = mean_voxel(image, valid & ~pictures.hidden)
    else:
        patches = patchify(image, run_config.patch_voxels)
        guess = unpatchify(patches.mean(dim=2, keepdim=True).expand_as(patches), run_config.patch_voxels, model.grid)
    parts = (image, pictures.predicted, guess, pictures.hidden, valid)
    return parts[0].cpu(), parts[1].cpu(), parts[2].cpu(), parts[3].cpu(), parts[4].cpu()


def _error(picture: Tensor, image: Tensor, counted: Tensor, loss: str) -> float:
    difference = (picture - image)[counted].double()
    if not difference.numel():
        return 0.0  # the hidden part of the crop lies outside of the volume
    return float(difference.abs().mean() if loss == "l1" else difference.square().mean())


def _save(path: Path, image: Tensor, predicted: Tensor, hidden: Tensor, spacing_mm: tuple[float, float, float]) -> None:
    """The first channel of a crop: original, reconstruction (float32 [Z, Y, X]), hidden (bool)."""
    with durable.open_atomically(path) as file:
        np.savez_compressed(
            file,
            allow_pickle=False,
            original=image[0].numpy(),
            reconstruction=predicted[0].numpy(),
            hidden=hidden[0].numpy(),
            spacing_mm=np.asarray(spacing_mm),
        )
