import math

import pytest
import torch

from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.prior import set_class_prior
from mimscale.models.unetr import Unetr, upsampling_strides


def small_unetr(crop, patch, *, depth=3, channels=1, classes=3, vit=None, feature_size=4):
    torch.manual_seed(0)
    return Unetr(
        VitConfig(**{"dim": 24, "depth": depth, "heads": 2, **(vit or {})}),
        UnetrConfig(feature_size=feature_size, num_classes=classes),
        crop_voxels=crop,
        patch_voxels=patch,
        channels=channels,
    )


@pytest.mark.parametrize(
    ("crop", "patch"),
    [
        ((32, 16, 48), (16, 16, 16)),
        ((16, 8, 24), (8, 8, 8)),
        ((8, 32, 16), (4, 16, 16)),
        ((3, 16, 8), (1, 8, 8)),
        ((16, 16, 4), (8, 4, 2)),
        ((4, 6, 4), (2, 2, 2)),
        ((32, 32, 32), (32, 32, 32)),
    ],
    ids=str,
)
def test_logits_have_the_shape_of_the_crop(crop, patch):
    model = small_unetr(crop, patch, channels=2)
    logits = model(torch.randn(2, 2, *crop))
    assert logits.shape == (2, 3, *crop)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("depth", "states"),
    [
        (0, [0, 0, 0]),
        (1, [1, 1, 1]),
        (2, [1, 1, 2]),
        (3, [1, 2, 3]),
        (4, [1, 2, 3]),
        (12, [3, 6, 9]),
        (24, [6, 12, 18]),
    ],
)
def test_skips_leave_the_encoder_at_the_quarters_of_its_depth(depth, states):
    model = small_unetr((16, 16, 16), (16, 16, 16), depth=depth)
    assert model.skip_states == states
    assert model(torch.randn(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


@pytest.mark.parametrize(
    ("halvings", "strides"),
    [
        ((4, 4, 4), [(2, 2, 2)] * 4),
        ((2, 4, 4), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((0, 3, 3), [(1, 2, 2)] * 3),
        ((1, 0, 0), [(2, 1, 1)]),
    ],
)
def test_thick_axes_are_doubled_at_coarse_levels_first(halvings, strides):
    assert upsampling_strides(halvings) == strides


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 8, 8), (4, 16, 16)], ids=str)
@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
def test_every_parameter_gets_a_gradient(patch, depth, positions):
    crop = tuple(2 * edge for edge in patch)
    model = small_unetr(crop, patch, depth=depth, vit={"positions": positions})
    logits = model(torch.randn(1, 1, *crop))
    (logits * torch.randn_like(logits)).sum().backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_a_patch_that_no_doubling_reaches_is_refused():
    with pytest.raises(ValueError, match=r"patch_voxels=\[12, 16, 16\]: UNETR doubles the resolution level by level"):
        small_unetr((24, 32, 32), (12, 16, 16))


def test_weights_cast_to_bf16_take_an_fp32_image_and_give_fp32_logits():
    model, image = small_unetr((16, 16, 16), (8, 8, 8)), torch.randn(1, 1, 16, 16, 16)
    exact = model(image)
    logits = model.bfloat16()(image)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().mean() < 0.1 * exact.std()


def test_the_class_prior_sets_the_mean_probability_of_each_class():
    model = small_unetr((16, 16, 16), (8, 8, 8))
    torch.nn.init.zeros_(model.out.conv.conv.weight)
    set_class_prior(model.output_bias, [900, 90, 10])
    probabilities = model(torch.randn(1, 1, 16, 16, 16)).softmax(dim=1).mean(dim=(0, 2, 3, 4))
    assert probabilities.tolist() == pytest.approx([0.9, 0.09, 0.01], rel=1e-5)


def test_a_class_that_was_never_seen_stays_possible():
    model = small_unetr((16, 16, 16), (8, 8, 8))
    set_class_prior(model.output_bias, [1.0, 1.0, 0.0])
    assert all(math.isfinite(value) for value in model.out.conv.conv.bias.tolist())


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.0, 0.0, 0.0], [1.0, 0.5, -0.5]])
def test_a_class_prior_that_is_none_is_refused(shares):
    with pytest.raises(ValueError, match="expected 3 shares of voxels, none negative"):
        set_class_prior(small_unetr((16, 16, 16), (8, 8, 8)).output_bias, shares)
