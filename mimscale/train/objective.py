"""What distinguishes one kind of training from another, for the session that is the same for all.

B samples of a micro-batch
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mimscale.store.manifest import Manifest
from mimscale.stream.batch import Batch
from mimscale.train.ranks import Ranks
from mimscale.train.training_data import TrainingData


class Objective(Protocol):
    """What is learned from which volumes. What has a body here is right for most kinds."""

    overlay: str | None  # of the store, when the loss needs labels

    def usable(self, manifest: Manifest, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of some volumes, rows of a manifest, that it can learn from."""
        return indices

    def begin(self, data: TrainingData) -> None:
        """Look at the data of a job, of a new run or of one that continues, before the model is built."""
        return

    def contract(self) -> dict[str, Any]:
        """What else somebody must know to use the weights, beside what holds for every run."""
        return {}

    def build(self, channels: int) -> nn.Module:
        """The model, its weights drawn from torch's generator, which is seeded the same on every rank."""

    def prepare(self, model: nn.Module, data: TrainingData, ranks: Ranks) -> None:
        """Bring a model to its state at step 0 (transfer, class prior), the same on every rank. A collective.

        Not called when a run continues.
        """

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """[] the mean loss of a micro-batch on the device."""

    def take_yardsticks(self) -> dict[str, Tensor | float]:
        """Trivial losses of the micro-batches since the last call, each [] and comparable with theirs; by name."""

    def validation_sums(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor | float]:
        """Sums (numbers or arrays) over a batch that add up over batches and ranks; `samples` among them."""

    def validation_metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """The sums over all validation crops -> metrics."""
