"""Is a network better than a guess at hidden patches? Sums over validation crops, and the metrics that they give.

Each loss stands beside that of two predictors without weights (`mimscale.models.trivial`), of all crops, of each
modality, and of foreground voxels alone:

    val_loss                       the network's error
    val_loss_mean_voxel            that of the mean of the visible voxels
    val_loss_interpolated          that of an interpolation from the visible patches
    val_loss_vs_mean_voxel         val_loss / val_loss_mean_voxel: a network that learned nothing has about 1
    val_loss_vs_interpolated       val_loss / val_loss_interpolated: below 1 once it knows more than the surroundings
    .../ct, .../mr                 each of them for the crops of one modality
    .../foreground                 each of them for voxels of the body alone, over crops that hold some
    val_feature_rank               directions that the encoder's tokens use (RankMe); 1 is a collapse

B batch | C channels | Z Y X crop, voxels | L patches a crop | K visible patches | P numbers a patch | D embedding
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimscale.models.config import TargetConfig, patch_grid
from mimscale.models.patches import hidden_voxels
from mimscale.models.reconstruction import (
    ReconstructionOutput,
    counted_numbers,
    counted_patches,
    patch_target,
    sample_error,
)
from mimscale.models.trivial import effective_rank, interpolated, mean_voxel
from mimscale.stream.batch import Batch

PREDICTORS = ("mean_voxel", "interpolated")


def yardstick_sums(
    config: TargetConfig,
    patch_voxels: Sequence[int],
    output: ReconstructionOutput,
    batch: Batch,
    image: Tensor,
    hidden: Tensor,
    valid: Tensor,
) -> dict[str, Tensor | float]:
    """Sums over a batch, float64 on the device; they add up over batches and ranks.

    Args:
        config: target and loss of the network.
        patch_voxels: Z, Y, X edges of a patch.
        output: what the network said.
        batch: which samples count, their modalities and foreground thresholds.
        image: [B, C, Z, Y, X] normalised.
        hidden: bool [B, L].
        valid: bool [B, 1, Z, Y, X].
    """
    hidden = hidden.to(image.device)
    shown = valid & ~hidden_voxels(hidden, patch_voxels, patch_grid(image.shape[2:], patch_voxels))
    target = patch_target(image, config, patch_voxels)
    predictions = {
        "loss": output.prediction.float(),
        "loss_mean_voxel": patch_target(mean_voxel(image, shown), config, patch_voxels),
        "loss_interpolated": patch_target(interpolated(image, shown, patch_voxels), config, patch_voxels),
    }
    counted = batch.counted.to(image.device)
    everywhere = valid.expand_as(image)
    groups = {"": (everywhere, counted)}
    for modality in sorted(set(batch.modalities)):
        of_modality = torch.tensor([name == modality for name in batch.modalities], device=image.device)
        groups[f"/{modality}"] = (everywhere, counted & of_modality)
    if batch.foreground_above is not None:
        foreground = everywhere & (image > batch.foreground_above[:, :, None, None, None])
        groups["/foreground"] = (foreground, counted)
    sums: dict[str, Tensor | float] = {}
    for group, (voxels, samples) in groups.items():
        weight = counted_numbers(voxels, counted_patches(hidden, None, config), patch_voxels)
        if group == "/foreground":
            samples = samples & (weight.sum(dim=(1, 2)) > 0)
        sums[f"samples{group}"] = samples.sum().double()
        for name, prediction in predictions.items():
            error = sample_error(prediction, target, weight, config).double()
            sums[f"{name}{group}"] = (error * samples).sum()
    features = output.tokens[counted].double().flatten(0, 1)  # [N, D]
    sums["gram"] = features.T @ features
    return sums


def yardstick_metrics(sums: dict[str, Any]) -> dict[str, float]:
    """The metrics of the module's table. A group without a single crop has none."""
    metrics: dict[str, float] = {}
    groups = sorted(name.removeprefix("samples") for name in sums if name.startswith("samples"))
    for group in groups:
        samples = sums[f"samples{group}"]
        if not samples:
            continue
        loss = metrics[f"val_loss{group}"] = sums[f"loss{group}"] / samples
        for predictor in PREDICTORS:
            guess = metrics[f"val_loss_{predictor}{group}"] = sums[f"loss_{predictor}{group}"] / samples
            metrics[f"val_loss_vs_{predictor}{group}"] = loss / guess if guess > 0 else math.inf
    if "gram" in sums:
        metrics["val_feature_rank"] = effective_rank(sums["gram"])
    return {name: value for name, value in metrics.items() if value != math.inf}
