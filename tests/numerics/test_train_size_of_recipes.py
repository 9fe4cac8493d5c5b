"""The planner's formulas at the sizes of the packaged recipes: weights, products, what the backward pass needs.

Nothing is computed: torch's meta and fake tensors have shapes and no numbers.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimscale.config import load_config
from mimscale.models import mae, reconstruction
from mimscale.models.config import patch_grid
from mimscale.models.flops import Flops
from mimscale.train.build import build_pretrain, build_segmenter
from mimscale.train.config import FinetuneConfig, PretrainConfig
from mimscale.train.losses import dice_cross_entropy
from mimscale.train.memory import run_activations
from mimscale.train.size import count_parameters, run_flops, visible_patches

RECIPES = {
    "ViT-B/16": (PretrainConfig, "pretrain_mae_vit_b", []),
    "ViT-B/8": (PretrainConfig, "pretrain_mae_vit_b", ["patch_voxels=[8,8,8]"]),
    "ViT-L/16": (PretrainConfig, "pretrain_mae_vit_l", []),
    "SimMIM": (PretrainConfig, "pretrain_simmim_vit_b", []),
    "UNETR": (FinetuneConfig, "finetune_unetr", []),
}
CROPS = 2


@pytest.fixture(params=RECIPES.values(), ids=RECIPES.keys())
def config(request):
    kind, recipe, overrides = request.param
    return load_config(kind, recipe, ["store=none", "run_dir=none", *overrides])


def build(config):
    return build_pretrain(config, 1) if isinstance(config, PretrainConfig) else build_segmenter(config, 1)


def loss_of(model, config, monkeypatch):
    """The loss of random crops, with as many visible patches as the recipe says."""
    image = torch.empty(CROPS, 1, *config.crop_voxels)
    if isinstance(config, FinetuneConfig):
        return dice_cross_entropy(model(image), torch.zeros(CROPS, *config.crop_voxels, dtype=torch.int64))
    visible = visible_patches(config, config.mask.ratio)
    L = math.prod(patch_grid(config.crop_voxels, config.patch_voxels))
    # Which patches are visible and which are predicted is read from a mask's numbers, and here are none.
    monkeypatch.setattr(mae, "visible_indices", lambda hidden: torch.zeros(CROPS, visible, dtype=torch.int64))
    monkeypatch.setattr(mae, "chosen_indices", lambda hidden: torch.zeros(CROPS, L - visible, dtype=torch.int64))
    counts = iter((visible, L - visible))  # SimMIM asks for the visible ones first
    monkeypatch.setattr(reconstruction, "chosen_indices", lambda _: torch.zeros(CROPS, next(counts), dtype=torch.int64))
    hidden = torch.zeros(CROPS, L, dtype=torch.bool)
    return model(image, hidden, torch.ones(CROPS, 1, *config.crop_voxels, dtype=torch.bool)).loss


def test_weights_and_products_are_those_of_the_model(config, monkeypatch):
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = build(config)
        with counter:
            loss_of(model, config, monkeypatch).backward()
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())
    flops = sum(run_flops(config).values(), start=Flops(forward=0, backward=0))
    # Attention that runs as products keeps its scores: they are the difference to what the fused kernel does.
    expected = flops.hardware if config.model.checkpoint_activations else flops.training
    assert expected * CROPS == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_backward_pass_needs_is_what_autograd_keeps(config, dtype, monkeypatch):
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)  # a storage that is gone would lend its address to another
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            model = build(config)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(model, config, monkeypatch)
    weights = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
    measured = sum(size for storage, size in kept.items() if storage not in weights)
    assert loss.requires_grad
    width = 2 if dtype == torch.bfloat16 else 4
    assert run_activations(config, width).kept * CROPS == pytest.approx(measured, rel=0.02)
