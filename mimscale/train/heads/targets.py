"""Targets of whole volumes from a ViT: `mimscale.models.pooled`. Other encoders share all but the encoder."""

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mimscale.errors import DataError
from mimscale.models.activations import Activations
from mimscale.models.config import VitConfig
from mimscale.models.pooled_tally import pooled_head
from mimscale.models.primus_tally import vit_tally
from mimscale.models.tally import Tally, activations
from mimscale.targets.config import TargetsConfig
from mimscale.targets.table import TargetTable
from mimscale.train.config import FinetuneConfig
from mimscale.train.method import Head, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn

    from mimscale.models.encoder import Encoder
    from mimscale.train.objective import Objective


def targets_of(config: FinetuneConfig) -> TargetsConfig:
    """The block `targets` of a run that has it: its config is the variant with this key."""
    own: TargetsConfig = getattr(config, TargetsHead.block)
    return own


def num_outputs(targets: TargetsConfig) -> int:
    """K. Before the table is read, of two classes each."""
    return sum(max(1, len(classes)) for _, classes in targets.outputs)


class TargetsHead(Head):
    """A pooled encoder with one linear output a target."""

    segments = False
    settings = TargetsConfig
    block = "targets"
    absent = ("overlay", "regions", "unetr")

    def objective(self, config: FinetuneConfig) -> "Objective":
        """The targets of a table."""
        from mimscale.train.target_prediction import TargetPrediction

        return TargetPrediction(config, targets_of(config))

    def resolved(self, config: FinetuneConfig) -> FinetuneConfig:
        """The config with the classes that the table has.

        Raises:
            DataError: a table that cannot be used, or one that says something else than when the run began.
        """
        targets = targets_of(config)
        table = TargetTable(targets.table, targets)
        found = table.fingerprint()
        if targets.table_hash is not None and targets.table_hash != found:
            raise DataError(
                f"{targets.table}: what it says in {', '.join(targets.columns)} has changed since this run began "
                f"(targets.table_hash: {targets.table_hash} -> {found}); put the old table back, or begin a new run"
            )
        table.check()
        classes = {name: table.classes(name) for name in targets.classify} if targets.classes is None else {}
        filled = replace(targets, classes=targets.classes or classes, table_hash=found)
        changed: dict[str, Any] = {self.block: filled}  # a key of the variant alone
        return replace(config, **changed)

    @abstractmethod
    def encoder(self, config: FinetuneConfig, channels: int) -> "Encoder":
        """The encoder."""

    @abstractmethod
    def last_tokens(self, config: FinetuneConfig) -> tuple[int, int]:
        """Tokens of a crop at the encoder's end, and the numbers of each."""

    @abstractmethod
    def encoder_tally(self, config: FinetuneConfig, channels: int) -> Tally:
        """The encoder's parts by formula, up to its last tokens."""

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        """The encoder with pooling and one linear layer."""
        from mimscale.models.pooled import PooledPredictor

        targets = targets_of(config)
        _, dim = self.last_tokens(config)
        encoder = self.encoder(config, channels)
        return PooledPredictor(encoder, dim=dim, outputs=num_outputs(targets), pool=targets.pool)

    def tally(self, config: FinetuneConfig, channels: int) -> Tally:
        """The encoder, pooling and one linear layer."""
        targets, (tokens, dim) = targets_of(config), self.last_tokens(config)
        return self.encoder_tally(config, channels) + pooled_head(tokens, dim, num_outputs(targets), targets.pool)

    def activations(self, config: FinetuneConfig, width: int, channels: int) -> Activations:
        """Those of the network: the loss of a few numbers a crop is nothing beside them."""
        return activations(self.tally(config, channels), width, transient=0)


class _VitTargets(TargetsHead):
    name = "targets"
    title = "vision transformer for targets of whole volumes"

    def encoder(self, config: FinetuneConfig, channels: int) -> "Encoder":
        from mimscale.models.vit import Vit

        crop, patch = config.crop_voxels, config.patch_voxels
        return Vit(model_of(config, VitConfig), crop_voxels=crop, patch_voxels=patch, channels=channels)

    def last_tokens(self, config: FinetuneConfig) -> tuple[int, int]:
        return crop_shape(config, 1).patches, model_of(config, VitConfig).dim

    def encoder_tally(self, config: FinetuneConfig, channels: int) -> Tally:
        """Without what the last norm gives: pooling keeps its own copy or none."""
        tokens, dim = self.last_tokens(config)
        return vit_tally(model_of(config, VitConfig), crop_shape(config, channels)) + Tally(numbers=-tokens * dim)


HEAD = _VitTargets()
