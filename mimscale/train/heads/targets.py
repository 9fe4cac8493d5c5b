"""Targets of whole volumes from a ViT: `mimscale.models.pooled`. Other encoders share all but the encoder."""

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mimscale.errors import DataError
from mimscale.models.activations import FP32_BYTES, Activations, encoder_activations
from mimscale.models.config import POOL_DIM, VitConfig
from mimscale.models.flops import Flops, Product, encoder_products, flops_by_part
from mimscale.models.parameters import linear_sizes, vit_sizes
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
    def encoder(self, config: FinetuneConfig, channels: int) -> "tuple[Encoder, int]":
        """The encoder, and the numbers of each token at its end."""

    def build(self, config: FinetuneConfig, channels: int) -> "nn.Module":
        """The encoder with pooling and one linear layer."""
        from mimscale.models.pooled import PooledPredictor

        targets = targets_of(config)
        encoder, dim = self.encoder(config, channels)
        return PooledPredictor(encoder, dim=dim, outputs=num_outputs(targets), pool=targets.pool)


class _VitTargets(TargetsHead):
    name = "targets"
    title = "vision transformer for targets of whole volumes"

    def encoder(self, config: FinetuneConfig, channels: int) -> "tuple[Encoder, int]":
        from mimscale.models.vit import Vit

        vit, crop, patch = model_of(config, VitConfig), config.crop_voxels, config.patch_voxels
        return Vit(vit, crop_voxels=crop, patch_voxels=patch, channels=channels), vit.dim

    def parameter_sizes(self, config: FinetuneConfig, channels: int) -> list[int]:
        vit, targets = model_of(config, VitConfig), targets_of(config)
        pool = [*linear_sizes(vit.dim, POOL_DIM), POOL_DIM] if targets.pool == "attention" else []
        return vit_sizes(vit, crop_shape(config, channels)) + pool + linear_sizes(vit.dim, num_outputs(targets))

    def flops(self, config: FinetuneConfig, channels: int) -> dict[str, Flops]:
        vit, targets, shape = model_of(config, VitConfig), targets_of(config), crop_shape(config, channels)
        head = [Product(part="head", rows=1, inner=vit.dim, columns=num_outputs(targets))]
        if targets.pool == "attention":
            view = Product(part="head", rows=shape.patches, inner=vit.dim, columns=POOL_DIM)
            head = [view, replace(view, inner=POOL_DIM, columns=1), *head]
        return flops_by_part([*encoder_products(vit, shape, tokens=shape.patches), *head])

    def activations(self, config: FinetuneConfig, width: int, channels: int) -> Activations:
        """The encoder's; attention pooling keeps what it looks at, besides."""
        vit, targets, shape = model_of(config, VitConfig), targets_of(config), crop_shape(config, channels)
        whole = encoder_activations(vit, numbers_a_patch=shape.numbers_a_patch, tokens=shape.patches, width=width)
        if targets.pool == "mean":
            return whole
        tokens = vit.dim * (width + (FP32_BYTES if width < FP32_BYTES else 0)) + POOL_DIM * width + 2 * FP32_BYTES
        return replace(whole, kept=whole.kept + shape.patches * tokens)


HEAD = _VitTargets()
