"""`mimscale finetune`: a UNETR learns to segment, from a pretrained encoder or from scratch, by the same plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mimscale.console import say
from mimscale.errors import DataError
from mimscale.models.transfer import load_encoder, load_weights
from mimscale.models.unetr import Unetr
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import labels, normalise
from mimscale.train.build import build_unetr
from mimscale.train.checkpoint import newest
from mimscale.train.config import FinetuneConfig
from mimscale.train.losses import dice_cross_entropy, overlap_counts
from mimscale.train.ranks import Ranks
from mimscale.train.run_dir import RunDir
from mimscale.train.session import TrainingData


class Segmentation:
    """Objective of fine-tuning: Dice and cross-entropy against the classes of an overlay."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config
        self.overlay: str | None = config.overlay

    def build(self, channels: int) -> nn.Module:
        """The UNETR."""
        return build_unetr(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Load the pretrained encoder, strictly, and set the output bias to the classes' shares of the training voxels.

        Raises:
            CheckpointError: `init_from` has no usable checkpoint, or less than the whole encoder would load.
            DataError: a label that the model has no class for.
        """
        assert isinstance(model, Unetr)
        model.set_class_prior(self._class_voxels(data))
        source = self._config.init_from
        if source is None:
            if ranks.is_first:
                say("encoder from scratch (init_from is not set)")
            return
        # Rank 0 chooses: while the source still trains, another rank might find a newer checkpoint.
        folder = ranks.first_does(lambda: _weights_folder(source))
        tensors, contract = load_weights(folder)
        report = load_encoder(model, tensors, contract, source=str(source))
        if ranks.is_first:
            report.show()

    def _class_voxels(self, data: TrainingData) -> list[float]:
        config = self._config
        names = data.info.overlays[config.overlay].class_names
        if len(names) != config.unetr.num_classes:
            raise DataError(
                f"{config.store}: overlay {config.overlay!r} has {len(names)} classes ({', '.join(names)}), "
                f"unetr.num_classes={config.unetr.num_classes}; make them equal"
            )
        voxels = np.zeros(len(names))
        counted = data.manifest.class_voxels(config.overlay, data.train)
        voxels[: len(counted)] = counted
        return list(voxels)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] Dice and cross-entropy."""
        image, label, _ = augment_batch(batch, labels(batch), *normalise(batch), self._config.augment)
        assert label is not None
        return dice_cross_entropy(forward(image), label)

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
            sums["loss"] = sums["loss"] + weight * dice_cross_entropy(logits[sample], label[sample]).double()
            both, either = overlap_counts(logits[sample], label[sample])
            for class_index in range(self._config.unetr.num_classes):
                for name, counts in ((f"both_{class_index}", both), (f"either_{class_index}", either)):
                    sums[name] = sums.get(name, 0.0) + weight * counts[class_index]
        return sums

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """Loss, Dice of each class pooled over all validation crops, and its mean without the background."""
        dice = {
            f"val_dice_{index}": 2 * sums[f"both_{index}"] / sums[f"either_{index}"]
            for index in range(self._config.unetr.num_classes)
            if sums[f"either_{index}"] > 0
        }
        foreground = [value for name, value in dice.items() if name != "val_dice_0"]
        mean = {"val_dice": sum(foreground) / len(foreground)} if foreground else {}
        return {"val_loss": sums["loss"] / sums["samples"], **mean, **dice}


def _weights_folder(source: Path) -> Path:
    """The newest good checkpoint of a run directory, or the folder itself when weights were exported into it."""
    tag = newest(RunDir(source)) if RunDir(source).checkpoints.exists() else None
    return source if tag is None else tag
