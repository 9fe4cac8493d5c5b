"""Weights, products and activations of recipes, found without computing: what checks the planner's formulas.

torch's meta and fake tensors have shapes and no numbers.

L patches a crop
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimscale.config import load_config
from mimscale.models import mae, reconstruction
from mimscale.models.config import patch_grid
from mimscale.models.flops import Flops
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig
from mimscale.train.losses import dice_cross_entropy
from mimscale.train.memory import run_activations
from mimscale.train.size import count_parameters, run_flops, visible_patches

MOST_MISS = 0.02  # of what torch counts
CROPS = 2
# what it is -> kind, recipe and its changes
RECIPES: dict[str, tuple[type[RunConfig], str, list[str]]] = {
    "ViT-B/16": (PretrainConfig, "pretrain_mae_vit_b", []),
    "ViT-B/8": (PretrainConfig, "pretrain_mae_vit_b", ["patch_voxels=[8,8,8]"]),
    "ViT-L/16": (PretrainConfig, "pretrain_mae_vit_l", []),
    "SimMIM": (PretrainConfig, "pretrain_simmim_vit_b", []),
    "UNETR": (FinetuneConfig, "finetune_unetr", []),
}


def config_of(name: str) -> RunConfig:
    """The config of one of RECIPES."""
    kind, recipe, overrides = RECIPES[name]
    return load_config(kind, recipe, ["store=none", "run_dir=none", *overrides])


@dataclass(frozen=True)
class Sizes:
    """Of a network and a sample."""

    parameters: int
    flops: int  # that torch's counter sees in a forward and backward pass


def planned_sizes(config: RunConfig) -> Sizes:
    """By the planner's formulas."""
    flops = sum(run_flops(config).values(), start=Flops(forward=0, backward=0))
    # Attention that runs as products keeps its scores: they are the difference to what the fused kernel does.
    counted = flops.hardware if config.model.checkpoint_activations else flops.training
    return Sizes(parameters=count_parameters(config), flops=counted)


def counted_sizes(config: RunConfig) -> Sizes:
    """By torch's counter, of a step on meta tensors."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = _build(config)
        with counter:
            _loss(model, config).backward()  # type: ignore[no-untyped-call]
    parameters = sum(weight.numel() for weight in model.parameters())
    return Sizes(parameters=parameters, flops=counter.get_total_flops() // CROPS)


def planned_kept_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """What a sample keeps for the backward pass, by the planner's formulas."""
    return run_activations(config, dtype.itemsize).kept


def kept_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """What autograd keeps of a sample for the backward pass, weights left out, in a step on fake tensors."""
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # a storage that is gone would lend its address to another
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            model = _build(config)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = _loss(model, config)
    assert loss.requires_grad
    weights = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
    return sum(size for storage, size in kept.items() if storage not in weights) // CROPS


def _build(config: RunConfig) -> nn.Module:
    if isinstance(config, PretrainConfig):
        return build_pretrain(config, 1)
    assert isinstance(config, FinetuneConfig)
    return build_segmenter(config, 1)


def _loss(model: nn.Module, config: RunConfig) -> Tensor:
    """The loss of crops, with as many visible patches as the recipe says."""
    image = torch.empty(CROPS, 1, *config.crop_voxels)
    if not isinstance(config, PretrainConfig):
        return dice_cross_entropy(model(image), torch.zeros(CROPS, *config.crop_voxels, dtype=torch.int64))
    visible = visible_patches(config, config.mask.ratio)
    L = math.prod(patch_grid(config.crop_voxels, config.patch_voxels))
    hidden = torch.zeros(CROPS, L, dtype=torch.bool)
    valid = torch.ones(CROPS, 1, *config.crop_voxels, dtype=torch.bool)
    with _chosen(visible, L - visible):
        loss: Tensor = model(image, hidden, valid).loss
    return loss


@contextmanager
def _chosen(visible: int, hidden: int) -> Iterator[None]:
    """Choose so many patches: which they are is read from a mask's numbers, and here are none."""

    def indices(count: int) -> Tensor:
        return torch.zeros(CROPS, count, dtype=torch.int64)

    with (
        mock.patch.object(mae, "visible_indices", return_value=indices(visible)),
        mock.patch.object(mae, "chosen_indices", return_value=indices(hidden)),
        # SimMIM asks for the visible ones first.
        mock.patch.object(reconstruction, "chosen_indices", side_effect=[indices(visible), indices(hidden)]),
    ):
        yield
