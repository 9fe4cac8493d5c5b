"""`mimscale finetune` with a table of targets: classes and numbers of whole volumes, from crops of them.

B samples of a micro-batch | G samples of a global batch | T targets | K outputs, those of all targets side by side
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale.console import say
from mimscale.models.prior import set_class_prior
from mimscale.store.manifest import Manifest
from mimscale.stream.augment import augment_batch
from mimscale.stream.batch import Batch
from mimscale.stream.device import normalise
from mimscale.stream.plan import SamplePlan
from mimscale.targets.config import TargetsConfig
from mimscale.targets.results import plain_name
from mimscale.targets.table import Target
from mimscale.train.build import build_segmenter
from mimscale.train.config import FinetuneConfig
from mimscale.train.finetune import load_pretrained
from mimscale.train.objective import Objective
from mimscale.train.ranks import Ranks
from mimscale.train.run_dir import RunDir
from mimscale.train.target_losses import target_losses, tasks_of
from mimscale.train.target_values import (
    Constants,
    Expected,
    constants_of,
    expected_values,
    labelled,
    read_values,
    saved_constants,
    usable_volumes,
)
from mimscale.train.training_data import TrainingData


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a job knows of its samples."""

    constants: list[Constants]
    expected: Expected
    row_of: dict[str, int]  # id of a volume of the run -> row of the store
    plan: SamplePlan
    train: NDArray[np.int64]  # rows of the plan's volumes


class TargetPrediction(Objective):
    """Objective of fine-tuning on a table of targets.

    The loss of a target is the mean over the samples of a global batch that have it, and the loss of a batch the mean
    over targets by their weights. How many samples of a global batch have a target follows from the order of the data
    alone, so each rank knows it without asking the others, and the loss does not depend on how the batch is cut.
    """

    overlay: str | None = None

    def __init__(self, config: FinetuneConfig, targets: TargetsConfig) -> None:
        """`targets` is the block of that name of `config`."""
        self._config, self._targets = config, targets
        self._read: list[Target] = []
        self._known: _Known | None = None
        self._tasks = tasks_of(targets.outputs)
        self._scaled: tuple[int, NDArray[np.float64]] | None = None  # a global batch, and what its targets count

    def usable(self, manifest: Manifest, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Volumes that have a value for any target.

        Raises:
            DataError: a table that cannot be used, or volumes without any value.
        """
        if not self._read:
            self._read = read_values(self._targets, manifest, str(self._config.store))
        present = labelled(self._read, len(manifest))
        return usable_volumes(self._targets, present, manifest.column("subject").tolist(), indices)

    def begin(self, data: TrainingData) -> None:
        """Look at the targets of the volumes.

        Raises:
            DataError: of a target nothing can be learned.
        """
        assert self._targets.table_hash is not None, "the table is read before a run begins"
        manifest, own = data.manifest, np.concatenate([data.train, data.validation])
        constants = constants_of(self._targets, self._read, data.train, data.validation)
        # With --fresh-data other volumes may train from now on, but the outputs mean what they meant.
        constants = saved_constants(RunDir(self._config.run_dir)) or constants
        self._known = _Known(
            constants=constants,
            expected=expected_values(self._targets, self._read, constants, len(manifest)),
            row_of=dict(zip(manifest.column("id")[own].tolist(), own.tolist(), strict=True)),
            plan=data.plan,
            train=data.train,
        )

    def contract(self) -> dict[str, Any]:
        """What the outputs mean: names, classes, and what brings numbers back to their unit."""
        targets = self._targets
        outputs = [asdict(one) for one in self._now_known().constants]
        return {"targets": {"pool": targets.pool, "loss": targets.loss, "outputs": outputs}}

    def build(self, channels: int) -> nn.Module:
        """The network, from random weights."""
        return build_segmenter(self._config, channels)

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Set the bias of classes to their shares among the training volumes, and load the pretrained encoder.

        Raises:
            CheckpointError: as `load_pretrained`.
        """
        known, bias = self._now_known(), model.output_bias
        assert isinstance(bias, Tensor), "a network that predicts targets says where its prior goes"
        for task, constants in zip(self._tasks, known.constants, strict=True):
            if task.classes and self._targets.class_weights == "none":
                set_class_prior(bias[task.outputs], constants.shares.tolist())
        if ranks.is_first:
            for number, one in enumerate(known.constants):
                have = int(known.expected.present[data.train, number].sum())
                say(f"target {one.name}: {have} of {len(data.train)} training volumes have a value")
        load_pretrained(self._config, model, ranks)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] this micro-batch's part of the loss; the mean over the micro-batches of a step is that of its batch."""
        image, _, _ = augment_batch(batch, None, *normalise(batch), self._config.augment)
        outputs = forward(image)  # [B, K]
        values, weights = self._on_device(batch, image.device)
        return (weights * self._losses(outputs, values)).sum()

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """None: accuracy and error say how good a prediction is."""
        return {}

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Of each target the samples that have it, their loss, and right answers or absolute errors."""
        known = self._now_known()
        image, _ = normalise(batch)
        outputs = forward(image)
        rows = self._rows(batch)
        present = torch.from_numpy(known.expected.present[rows]).to(image.device) & batch.counted[:, None]
        values = torch.from_numpy(known.expected.values[rows]).to(image.device)
        losses = self._losses(outputs, values).double() * present
        sums: dict[str, Tensor | float] = {"samples": batch.counted.sum().double()}
        for number, (task, constants) in enumerate(zip(self._tasks, known.constants, strict=True)):
            own, value = outputs[:, task.outputs].double(), values[:, number]
            score = (own.argmax(dim=1) == value) if task.classes else (own[:, 0] - value).abs() * constants.deviation
            sums[f"cases_{number}"] = present[:, number].sum().double()
            sums[f"loss_{number}"] = losses[:, number].sum()
            sums[f"score_{number}"] = (score * present[:, number]).sum().double()
        return sums

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """Loss over the targets that any sample has; of crops the accuracy of classes, and the error in its unit."""
        metrics: dict[str, float] = {}
        total = weight = 0.0
        for number, task in enumerate(self._tasks):
            cases = sums[f"cases_{number}"]
            if cases > 0:
                total += self._targets.weights[number] * sums[f"loss_{number}"] / cases
                weight += self._targets.weights[number]
                name = f"val_{'accuracy' if task.classes else 'error'}_{plain_name(number, task.name)}"
                metrics[name] = sums[f"score_{number}"] / cases
        return {"val_loss": total / weight, **metrics} if weight else metrics

    def _now_known(self) -> _Known:
        assert self._known is not None, "begin comes before"
        return self._known

    def _losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        """[B, T]."""
        return target_losses(outputs, values, self._tasks, self._targets.loss)

    def _rows(self, batch: Batch) -> NDArray[np.int64]:
        row_of = self._now_known().row_of
        return np.array([row_of[volume_id] for volume_id in batch.volume_ids], dtype=np.int64)

    def _on_device(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """What is expected of the samples, and what each counts in the loss: [B, T] each, in one copy to the device."""
        if self._known is None:  # a network that is only measured: no sample of it has a target
            nothing = torch.zeros(2, len(batch.volume_ids), len(self._targets.columns), device=device)
            return nothing[0], nothing[1]
        rows, expected = self._rows(batch), self._known.expected
        shares = expected.present[rows] * expected.weights[rows] * self._scale(batch.batch_index) / len(rows)
        both = torch.from_numpy(np.stack([expected.values[rows], shares]).astype(np.float32))
        if device.type == "cuda":
            both = both.pin_memory()  # else the host would wait for the copy
        moved = both.to(device, non_blocking=True)
        return moved[0], moved[1]

    def _scale(self, batch_index: int) -> NDArray[np.float64]:
        """Of each target: its weight x samples of the global batch / those of them that have the target; [T]."""
        if self._scaled is None or self._scaled[0] != batch_index:
            known = self._now_known()
            rows = known.train[known.plan.volumes_of_batch(batch_index)]  # [G]
            counts, weights = known.expected.present[rows].sum(axis=0), np.asarray(self._targets.weights)
            scale = np.divide(weights * len(rows), counts, out=np.zeros(len(weights)), where=counts > 0)
            self._scaled = (batch_index, scale)
        return self._scaled[1]
