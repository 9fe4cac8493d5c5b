"""FLOPs by formula against torch's counter, which watches the products of a real step."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimscale.models.config import MaeConfig, MaskConfig, SimmimConfig, UnetrConfig, VitConfig
from mimscale.models.flops import (
    CropShape,
    count_flops,
    flops_by_part,
    mae_products,
    simmim_products,
    unetr_products,
)
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.masking import draw_masks
from mimscale.models.simmim import Simmim
from mimscale.models.unetr import Unetr

TOLERANCE = 1e-3  # both count the same products; the formula leaves out nothing that torch sees


def counted(step):
    """FLOPs of a step by torch's counter. It does not know the CPU's fused attention, so attention runs as products."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        step()
    return counter.get_total_flops()


def mae_step(vit, mae, crop, patch, channels, batch=2):
    model = MaskedAutoencoder(vit, mae, crop_voxels=crop, patch_voxels=patch, channels=channels)
    hidden = torch.from_numpy(draw_masks(range(batch), crop, patch, MaskConfig(ratio=0.75)))
    image = torch.randn(batch, channels, *crop)
    visible = int((~hidden[0]).sum())
    products = mae_products(
        vit,
        mae,
        CropShape(crop_voxels=crop, patch_voxels=patch, channels=channels),
        visible_patches=visible,
        decoded_patches=hidden.shape[1],
    )
    return products, lambda: model(image, hidden).loss.backward()


MAES = [
    (VitConfig(dim=96, depth=3, heads=4), (32, 32, 32), (8, 8, 8), 1),
    (VitConfig(dim=48, depth=2, heads=2, mlp_ratio=2.0), (16, 32, 32), (8, 8, 16), 3),
    (VitConfig(dim=60, depth=2, heads=3, positions="rope", layer_scale=1e-5), (24, 32, 40), (4, 8, 8), 1),
]


SHAPE = {"crop_voxels": (32, 32, 32), "patch_voxels": (8, 8, 8), "channels": 1}
DECODERS = [
    MaeConfig(decoder_dim=48, decoder_depth=depth, decoder_heads=2, loss_on=loss_on)
    for depth, loss_on in ((2, "masked"), (1, "masked"), (2, "all"))
]


@pytest.mark.parametrize("mae", DECODERS, ids=["two blocks", "one block", "loss on all"])
@pytest.mark.parametrize(("vit", "crop", "patch", "channels"), MAES)
def test_an_autoencoders_flops_are_those_that_torch_counts(vit, mae, crop, patch, channels):
    products, step = mae_step(vit, mae, crop, patch, channels)
    assert count_flops(products).training * 2 == pytest.approx(counted(step), rel=TOLERANCE)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_simmims_flops_are_those_that_torch_counts(head, loss_on):
    vit, simmim, shape = MAES[0][0], SimmimConfig(head=head, loss_on=loss_on), CropShape(**SHAPE)
    model = Simmim(vit, simmim, **SHAPE)
    hidden = torch.from_numpy(draw_masks(range(2), (32, 32, 32), (8, 8, 8), MaskConfig(ratio=0.75)))
    answered = 48 if loss_on == "masked" else 64
    image = torch.randn(2, 1, 32, 32, 32)
    total = counted(lambda: model(image, hidden).loss.backward())
    products = simmim_products(vit, simmim, shape, answered_patches=answered)
    assert count_flops(products).training * 2 == pytest.approx(total, rel=TOLERANCE)


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (2, 8, 8)])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_unetrs_flops_are_those_that_torch_counts(patch, channels):
    vit, unetr, crop = VitConfig(dim=48, depth=3, heads=2), UnetrConfig(num_classes=5, feature_size=8), (32, 32, 32)
    shape = {"crop_voxels": crop, "patch_voxels": patch, "channels": channels}
    model, image = Unetr(vit, unetr, **shape), torch.randn(1, channels, *crop)
    total = counted(lambda: model(image).square().mean().backward())
    assert count_flops(unetr_products(vit, unetr, CropShape(**shape))).training == pytest.approx(total, rel=TOLERANCE)


def test_recomputed_blocks_cost_what_torch_counts_on_top():
    vit = VitConfig(dim=96, depth=3, heads=4, checkpoint_activations=True)
    products, step = mae_step(vit, MaeConfig(decoder_dim=48, decoder_depth=2, decoder_heads=2), (32,) * 3, (8,) * 3, 1)
    # Attention that runs as products keeps its scores, so torch does not see the fused kernel compute them again.
    numbers_a_head = 24  # of encoder and decoder: what tells the scores' products from those with the values
    scores = sum(one.forward_flops for one in products if not one.of_weight and one.inner == numbers_a_head)
    assert (count_flops(products).hardware - scores) * 2 == pytest.approx(counted(step), rel=TOLERANCE)


def test_the_encoder_costs_less_the_more_is_hidden_and_the_decoder_does_not():
    vit, mae = VitConfig(), MaeConfig(loss_on="all")
    shape = CropShape(crop_voxels=(96,) * 3, patch_voxels=(16,) * 3, channels=1)
    few, many = (
        flops_by_part(mae_products(vit, mae, shape, visible_patches=count, decoded_patches=216)) for count in (54, 108)
    )
    assert few["encoder"].training * 2 < many["encoder"].training  # attention grows with the square
    assert few["head"] == many["head"]


def test_flops_are_counted_without_torch():
    program = "import sys, mimscale.models.flops; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "False"
