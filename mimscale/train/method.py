"""What a run trains, as one object: a `method` of pretraining, or the `head` of a network that is fine-tuned.

`method: NAME` is the METHOD of mimscale/train/methods/NAME.py, `head: NAME` the HEAD of mimscale/train/heads/NAME.py;
any other that Python can import is written `module:OBJECT`. Nothing else in the package knows their names: verbs, loop,
plan, report and study ask the object. No torch here, so that a login node can ask: what a description needs of it, it
imports inside its functions.
"""

import difflib
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import MISSING, field, fields, make_dataclass
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from mimscale.errors import ConfigError
from mimscale.models.activations import Activations
from mimscale.models.config import EncoderConfig, TargetConfig, VitConfig, mask_grid
from mimscale.models.flops import Flops, flops_by_part, repeated
from mimscale.models.tally import (
    Tally,
    activations,
    masked_loss,
    masked_loss_bytes,
    segmentation_loss,
    segmentation_loss_bytes,
)

if TYPE_CHECKING:
    from torch import nn

    from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig
    from mimscale.train.objective import Objective

C = TypeVar("C", bound="RunConfig")
R = TypeVar("R", bound="RunConfig")
E = TypeVar("E", bound=EncoderConfig)


class Network(ABC, Generic[C]):
    """How a run's network is built, trained and planned. `config` is the run's, `channels` those of the store.

    Sizes and FLOPs are counted on a network without numbers, which imports torch, but where a network says by formula
    what its parts are, as the packaged ones do: a login node can plan these.
    """

    name: ClassVar[str]  # mostly also of the block of a recipe that holds `settings`
    title: ClassVar[str]  # for people; a model card is headed "3D " + title
    model: ClassVar[type[EncoderConfig]] = VitConfig  # class of `model` in a recipe
    settings: ClassVar[type[Any] | None] = None  # dataclass of that block; None: there is no such block
    block: ClassVar[str] = ""  # what that block is called, where several share it; empty: as the name
    absent: ClassVar[tuple[str, ...]] = ()  # keys of other runs that mean nothing here: they are null

    @abstractmethod
    def build(self, config: C, channels: int) -> "nn.Module":
        """The network, its weights drawn from torch's generator; its `encoder` is a `models.encoder.Encoder`."""

    @abstractmethod
    def objective(self, config: C) -> "Objective":
        """How it is trained and validated."""

    @property
    def settings_key(self) -> str:
        """The key of `settings` in a recipe."""
        return self.block or self.name

    def problems(self, config: C) -> list[str]:
        """Rules between keys that the config breaks, in words, before anything starts; here, those of the encoder."""
        try:
            config.model.check_crop(config.crop_voxels, config.patch_voxels)
        except ValueError as error:
            return [str(error)]
        return []

    def changing_shapes(self, config: C) -> str | None:
        """The key, with its value, that lets the shapes of blocks change from step to step; None: they do not."""
        return None

    def tally(self, config: C, channels: int) -> Tally | None:
        """Its parts by formula, without a loss; None where there is none."""
        return None

    def resolved(self, config: C) -> C:
        """The config with what it leaves to other files filled in, when a run begins or continues.

        Raises:
            DataError: such a file cannot be used, or is not the one that the run began with.
        """
        return config

    def parameter_sizes(self, config: C, channels: int) -> list[int]:
        """Numbers in each weight."""
        if (tally := self.tally(config, channels)) is not None:
            return list(tally.sizes)
        from mimscale.train.counted import counted

        return counted(config, channels).parameter_sizes

    def flops(self, config: C, channels: int) -> dict[str, Flops]:
        """Of one sample, by part of the network."""
        if (tally := self.tally(config, channels)) is not None:
            return flops_by_part(tally.products)
        from mimscale.train.counted import counted

        return {"network": counted(config, channels).flops}

    def activations(self, config: C, width: int, channels: int) -> Activations:
        """Bytes that one sample keeps for the backward pass, numbers being `width` bytes."""
        from mimscale.train.counted import counted

        return counted(config, channels).activations(width)


class Method(Network["PretrainConfig"]):
    """A method of pretraining.

    With `settings` that are a `TargetConfig` it predicts voxels that a mask hides, and its network is a
    `mimscale.models.reconstruction.Reconstructor`: that is what evaluate scores and a report shows.
    """

    @property
    def predicts_voxels(self) -> bool:
        """Whether there is anything to reconstruct."""
        return self.settings is not None and issubclass(self.settings, TargetConfig)

    def flops(self, config: "PretrainConfig", channels: int) -> dict[str, Flops]:
        """Of one sample with all its masks, by part of the network."""
        if (tally := self.tally(config, channels)) is None:
            return super().flops(config, channels)
        return flops_by_part(repeated(tally.products, config.mask.repeats))

    def activations(self, config: "PretrainConfig", width: int, channels: int) -> Activations:
        """With a range of mask ratios, at its highest, when the loss covers most."""
        tally = self.tally(config, channels)
        if tally is None or config.target is None:
            return super().activations(config, width, channels)
        from mimscale.train.size import voxels_of_loss

        numbers, answered = voxels_of_loss(config, channels)
        loss = masked_loss(config.target, numbers=numbers, answered=answered)
        one = activations(tally + loss, width, transient=masked_loss_bytes(numbers, answered, width))
        return one.times(config.mask.repeats)

    def objective(self, config: "PretrainConfig") -> "Objective":
        """The prediction of hidden voxels."""
        from mimscale.train.pretrain import MaskedReconstruction

        return MaskedReconstruction(config)

    def problems(self, config: "PretrainConfig") -> list[str]:
        """A mask that does not fit the crop, where voxels are hidden."""
        problems = super().problems(config)
        if self.predicts_voxels:
            try:
                mask_grid(config.crop_voxels, config.patch_voxels, config.mask)
            except ValueError as error:
                problems.append(str(error))
        return problems

    def problem_of_ranks(self, config: "PretrainConfig", world_size: int) -> str | None:
        """Why it cannot be computed on so many ranks; None where it can."""
        return None


class Head(Network["FinetuneConfig"]):
    """A network that is fine-tuned: an encoder, and what turns its features into `unetr.num_classes` outputs."""

    segments: ClassVar[bool] = True  # voxels; otherwise it predicts targets of whole volumes

    def activations(self, config: "FinetuneConfig", width: int, channels: int) -> Activations:
        """Those of the network, and of Dice and cross-entropy."""
        if (tally := self.tally(config, channels)) is None:
            return super().activations(config, width, channels)
        voxels, outputs = math.prod(config.crop_voxels), config.unetr.num_classes
        loss = segmentation_loss(voxels, outputs)
        return activations(tally + loss, width, transient=segmentation_loss_bytes(voxels, outputs, width))

    def objective(self, config: "FinetuneConfig") -> "Objective":
        """Segmentation, by Dice and cross-entropy."""
        from mimscale.train.finetune import Segmentation

        return Segmentation(config)


def model_of(config: "RunConfig", kind: type[E]) -> E:
    """`model` of a run whose method or head says that it is of this class."""
    assert isinstance(config.model, kind), f"{type(config.network).__name__} says that `model` is a {kind.__name__}"
    return config.model


def find_method(name: str) -> Method:
    """The method that a recipe calls `name`.

    Raises:
        ConfigError: there is none; the packaged ones are listed.
    """
    method = _find("method", name, Method)
    assert isinstance(method, Method)
    return method


def find_head(name: str) -> Head:
    """The head that a recipe calls `name`.

    Raises:
        ConfigError: there is none; the packaged ones are listed.
    """
    head = _find("head", name, Head)
    assert isinstance(head, Head)
    return head


def with_keys_of(cls: type[R], network: Network[Any]) -> type[R]:
    """The config with the encoder and the block of settings that a network has; `cls` itself where it has them."""
    kind: Any = cls  # hashable as every class is, which a type checker does not see in a class of its kind
    made: type[R] = _with_keys_of(kind, network)
    return made


@cache
def _with_keys_of(cls: Any, network: Network[Any]) -> Any:
    there: dict[str, Any] = {one.name: one.type for one in fields(cls)}
    added: list[tuple[str, type, Any]] = []
    if there["model"] is not network.model:
        added.append(("model", network.model, field(default_factory=network.model)))
    added += [(key, NoneType, field(default=None)) for key in network.absent if there[key] is not NoneType]
    if network.settings is not None:
        key = network.settings_key
        if key not in there:
            needs_nothing = not any(one.default is one.default_factory is MISSING for one in fields(network.settings))
            default = field(default_factory=network.settings) if needs_nothing else field()
            added.append((key, network.settings, default))
        elif there[key] is not network.settings:
            raise ConfigError(f"{key}: is a key of every run, so no method or head can be called that")
    if not added:
        return cls
    name = f"{cls.__name__}_{network.name}"
    return make_dataclass(name, added, bases=(cls,), frozen=True, kw_only=True)


def title_of(key: str, name: str) -> str:
    """What people call a method or a head (`key`); the name itself where this machine does not have it."""
    try:
        return find_method(name).title if key == "method" else find_head(name).title
    except ConfigError:
        return name


def segments(tree: dict[str, Any]) -> bool:
    """Whether a fine-tuning run of this config tree segments; yes, where this machine has no such head."""
    try:
        return find_head(str(tree.get("head", "unetr"))).segments
    except ConfigError:
        return True


def predicts_voxels(tree: dict[str, Any]) -> bool:
    """Whether a pretraining run of this config tree has reconstructions; no, where this machine has no such method."""
    try:
        return find_method(str(tree.get("method", "mae"))).predicts_voxels
    except ConfigError:
        return False


@cache
def packaged(key: str) -> list[str]:
    """Names of the packaged ones; `key` is method or head."""
    return sorted(module.name for module in pkgutil.iter_modules(_folder(key).__path__))


def _folder(key: str) -> Any:
    return importlib.import_module(f"mimscale.train.{key}s")


@cache
def _find(key: str, name: str, kind: type[Method] | type[Head]) -> Network[Any]:
    place, colon, found_as = name.partition(":")
    if not colon:
        known = packaged(key)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{key}={name}: no such {key}{meant}; packaged are {', '.join(known)}, and module:OBJECT names any "
                "other that Python can import"
            )
        place, found_as = f"{_folder(key).__name__}.{name}", key.upper()
    try:
        found = getattr(importlib.import_module(place), found_as, None)
    except ImportError as error:
        raise ConfigError(
            f"{key}={name}: {place} cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
        ) from None
    if not isinstance(found, kind):
        raise ConfigError(
            f"{key}={name}: {place} has no {kind.__name__} called {found_as}; see mimscale.train.method.{kind.__name__}"
        )
    return found
