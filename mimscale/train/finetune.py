"""`mimscale finetune`: a network learns to segment, from a pretrained encoder or from scratch, by the same plan."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimscale.console import say
from mimscale.errors import DataError
from mimscale.models.prior import set_class_prior, set_region_prior
from mimscale.models.transfer import load_encoder, load_weights, start_weights
from mimscale.store.layout import read_info
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import labels, normalise, to_device
from mimscale.train.build import build_segmenter
from mimscale.train.committed import newest
from mimscale.train.config import FinetuneConfig
from mimscale.train.losses import (
    deeply_supervised,
    dice_binary_cross_entropy,
    dice_cross_entropy,
    overlap_counts,
    region_overlap_counts,
)
from mimscale.train.objective import Objective
from mimscale.train.ranks import Ranks
from mimscale.train.run_dir import RunDir
from mimscale.train.training_data import TrainingData


class Segmentation(Objective):
    """Objective of fine-tuning: Dice and cross-entropy against the classes of an overlay."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config
        self.overlay: str | None = config.overlay

    def build(self, channels: int) -> nn.Module:
        """The network, from random weights."""
        return build_segmenter(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Load the pretrained encoder, strictly, and set the output bias to the shares of the training voxels.

        Raises:
            CheckpointError: `init_from` has no usable checkpoint, or less than the whole encoder would load.
            DataError: a label that the model has no class for.
        """
        self._set_prior(model, data)
        load_pretrained(self._config, model, ranks)

    def _set_prior(self, model: nn.Module, data: TrainingData) -> None:
        bias = model.output_bias
        assert isinstance(bias, Tensor), "a network that segments says where its prior goes"
        names, voxels = self._class_voxels(data)
        if self._config.regions is None:
            set_class_prior(bias, voxels)
            return
        shares = torch.tensor(voxels) / max(sum(voxels), 1)
        members = classes_of_region(self._config.regions, names)[:, : len(names)]
        set_region_prior(bias, (members.float() @ shares).tolist())

    def _class_voxels(self, data: TrainingData) -> tuple[list[str], list[float]]:
        """Names of the overlay's classes, and how many training voxels each has."""
        config = self._config
        names = data.info.overlays[config.overlay].class_names
        if config.regions is not None:
            unknown = sorted({name for members in config.regions.values() for name in members} - set(names))
            if unknown:
                raise DataError(
                    f"{config.store}: regions name {', '.join(unknown)}; overlay {config.overlay!r} has the classes "
                    f"{', '.join(names)}"
                )
        elif len(names) != config.unetr.num_classes:
            raise DataError(
                f"{config.store}: overlay {config.overlay!r} has {len(names)} classes ({', '.join(names)}), "
                f"unetr.num_classes={config.unetr.num_classes}; make them equal"
            )
        voxels = np.zeros(len(names))
        counted = data.manifest.class_voxels(config.overlay, data.train)
        voxels[: len(counted)] = counted
        return list(names), voxels.tolist()

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] Dice and cross-entropy, of classes or of regions."""
        image, label, _ = augment_batch(batch, labels(batch), *normalise(batch), self._config.augment)
        assert label is not None
        scores = forward(image)
        if isinstance(scores, Tensor):
            return self._criterion(scores, label)
        return deeply_supervised(self._criterion, scores, label)

    def _criterion(self, logits: Tensor, label: Tensor) -> Tensor:
        if self._members is None:
            return dice_cross_entropy(logits, label)
        return dice_binary_cross_entropy(logits, label, to_device(self._members, label.device))

    def _overlaps(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if self._members is None:
            return overlap_counts(logits, label)
        return region_overlap_counts(logits, label, to_device(self._members, label.device))

    @cached_property
    def _members(self) -> Tensor | None:
        """Which classes belong to which region, where the config has regions."""
        config = self._config
        if config.regions is None:
            return None
        return classes_of_region(config.regions, read_info(config.store).overlays[config.overlay].class_names)

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """None: Dice says how good a segmentation is."""
        return {}

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Overlaps of each class and loss, over the crops that count."""
        image, _ = normalise(batch)
        label = labels(batch)
        logits = forward(image)
        sums: dict[str, Tensor | float] = {"loss": 0.0, "samples": batch.counted.sum().double()}
        for index, weight in enumerate(batch.counted.tolist()):
            sample = slice(index, index + 1)
            sums["loss"] = sums["loss"] + weight * self._criterion(logits[sample], label[sample]).double()
            both, either = self._overlaps(logits[sample], label[sample])
            for class_index in range(self._config.unetr.num_classes):
                for name, counts in ((f"both_{class_index}", both), (f"either_{class_index}", either)):
                    sums[name] = sums.get(name, 0.0) + weight * counts[class_index]
        return sums

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """Loss, Dice of each class or region pooled over all validation crops, its mean without the background."""
        dice = {
            f"val_dice_{index}": 2 * sums[f"both_{index}"] / sums[f"either_{index}"]
            for index in range(self._config.unetr.num_classes)
            if sums[f"either_{index}"] > 0
        }
        background = "val_dice_0" if self._config.regions is None else None
        foreground = [value for name, value in dice.items() if name != background]
        mean = {"val_dice": sum(foreground) / len(foreground)} if foreground else {}
        return {"val_loss": sums["loss"] / sums["samples"], **mean, **dice}


def load_pretrained(config: FinetuneConfig, model: nn.Module, ranks: Ranks) -> None:
    """Load the pretrained encoder that a config names, strictly. A collective.

    Raises:
        CheckpointError: `init_from` has no usable checkpoint, or less than the whole encoder would load.
    """
    source = config.init_from
    if source is None:
        if ranks.is_first:
            say("encoder from scratch (init_from is not set)")
        return
    # Rank 0 chooses: while the source still trains, another rank might find a newer checkpoint.
    folder = ranks.first_does(lambda: _weights_folder(source))
    tensors, contract = load_weights(folder)
    random = start_weights(model)
    report = load_encoder(model, tensors, contract, source=str(source))
    if config.init_blocks == "random":
        model.load_state_dict(random, strict=False)
    if ranks.is_first:
        report.show()
        if config.init_blocks == "random":
            say("init_blocks=random: only the embedding was kept, all blocks start from random weights")


def classes_of_region(regions: dict[str, list[str]], class_names: Sequence[str]) -> Tensor:
    """Which classes belong to which region: bool [R, 256], by the number that a class has in the overlay."""
    members = torch.zeros(len(regions), 256, dtype=torch.bool)
    for number, names in enumerate(regions.values()):
        members[number, [class_names.index(name) for name in names]] = True
    return members


def _weights_folder(source: Path) -> Path:
    """The newest good checkpoint of a run directory, or the folder itself when weights were exported into it."""
    tag = newest(RunDir(source)) if RunDir(source).checkpoints.exists() else None
    return source if tag is None else tag
