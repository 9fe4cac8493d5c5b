"""Sizes, FLOPs and memory of a network that has no formulas for them: it is built and trained without numbers.

torch's meta tensors have a shape and nothing else: nothing is computed, and their memory is counted, not taken.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mimscale.config import build_config, config_tree
from mimscale.models.activations import Activations
from mimscale.models.flops import Flops
from mimscale.stream.batch import Batch
from mimscale.stream.config import AugmentConfig
from mimscale.train.config import FinetuneConfig, RunConfig

CROPS = 1  # of the step that is counted
META = torch.device("meta")


def counted(config: RunConfig, channels: int) -> "Counted":
    """What the network of a run is made of; counted once for all runs that differ in nothing that matters here."""
    alike: dict[str, Any] = {"global_batch": CROPS, "micro_batch": CROPS, "augment": AugmentConfig()}
    if isinstance(config, FinetuneConfig):
        alike["regions"] = None  # needs the names of the store's classes, and counts nothing
    tree = config_tree(replace(config, **alike)) | {"store": "none", "run_dir": "none", "seed": 0, "steps": 1}
    unrelated = ("checkpoint", "meter", "validation", "health", "stream", "engine", "optim")
    related = {key: value for key, value in tree.items() if key not in unrelated}
    kind: Any = type(config)
    return _counted(kind, json.dumps(related), channels)


@lru_cache(maxsize=8)
def _counted(kind: Any, tree: str, channels: int) -> "Counted":
    return Counted(build_config(kind, json.loads(tree), "counted"), channels)


class Counted:
    """A training step of one crop, run on meta tensors."""

    def __init__(self, config: RunConfig, channels: int) -> None:
        self._config, self._channels = config, channels
        self._objective = config.network.objective(config)

    @cached_property
    def parameter_sizes(self) -> list[int]:
        """Numbers in each weight."""
        return [weight.numel() for weight in self._model(self._config).parameters()]

    @cached_property
    def flops(self) -> Flops:
        """Of one sample. What is recomputed is what a step does more than one that keeps everything."""
        plain = replace(self._config, model=replace(self._config.model, checkpoint_activations=False))
        forward, whole = self._flops_of(plain)
        hardware = self._flops_of(self._config)[1] if self._config.model.checkpoint_activations else whole
        return Flops(forward=forward, backward=whole - forward, recomputed=hardware - whole)

    def activations(self, width: int) -> Activations:
        """Bytes of one sample when the forward pass is over, and at the most that either pass holds on top of it."""
        model = self._model(self._config).to(torch.bfloat16 if width == 2 else torch.float32)
        batch = self._batch()
        for weight in model.parameters():  # gradients of weights are no activations
            weight.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
        with _fused_attention(), _Alive() as alive:
            loss = self._loss(model, batch)
            kept, forward_peak = alive.bytes, alive.peak
            alive.peak = kept
            loss.backward()  # type: ignore[no-untyped-call]
        return Activations(kept=kept, transient=forward_peak - kept, recomputed=alive.peak - kept)

    def _flops_of(self, config: RunConfig) -> tuple[int, int]:
        """Of the forward pass, and of both."""
        model, counter = self._model(config), FlopCounterMode(display=False)
        # torch's counter does not know every fused attention; as products they are the same.
        with sdpa_kernel(SDPBackend.MATH), counter:
            loss = self._loss(model, self._batch())
            forward = counter.get_total_flops()
            loss.backward()  # type: ignore[no-untyped-call]
        return forward, counter.get_total_flops()

    def _model(self, config: RunConfig) -> nn.Module:
        with META:
            return config.network.build(config, self._channels)

    def _loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        return self._objective.loss(forward, batch)

    def _batch(self) -> Batch:
        Z, Y, X = self._config.crop_voxels
        label = torch.zeros(CROPS, Z, Y, X, dtype=torch.uint8) if self._objective.overlay is not None else None
        batch = Batch(
            volume=torch.zeros(CROPS, self._channels, Z, Y, X, dtype=torch.int16),
            label=label,
            sample_ids=torch.arange(CROPS),
            seeds=list(range(CROPS)),
            spacing_mm=[(1.0, 1.0, 1.0)] * CROPS,
            normalisation=torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(CROPS, self._channels, 4).contiguous(),
            inside=torch.tensor([[0, Z], [0, Y], [0, X]], dtype=torch.int32).expand(CROPS, 3, 2).contiguous(),
            volume_ids=["none"] * CROPS,
            subjects=["none"] * CROPS,
            counted=torch.ones(CROPS, dtype=torch.bool),
        )
        return batch.to(META)


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention that keeps no scores, as devices compute it; for meta tensors torch takes the one that keeps them.

    By name, and not by a mode of torch's, because recomputation inside a backward pass would not see a mode.
    """
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *inputs: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *inputs
    )[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that were made in the block and are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        before = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.device.type == "meta":
                storage = one.untyped_storage()
                if id(storage) not in before and id(storage) not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
