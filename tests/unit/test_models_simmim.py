import pytest
import torch

from mimscale.models.config import MaskConfig, SimmimConfig, VitConfig
from mimscale.models.masking import draw_masks
from mimscale.models.patches import hidden_voxels
from mimscale.models.simmim import Simmim

CROP, PATCH = (8, 12, 16), (4, 4, 8)  # a grid of 2 x 3 x 2


def small_simmim(positions="sincos", **changes):
    torch.manual_seed(0)
    return Simmim(
        VitConfig(dim=36, depth=2, heads=3, positions=positions),
        SimmimConfig(**changes),
        crop_voxels=CROP,
        patch_voxels=PATCH,
        channels=1,
    )


def masks(count):
    return torch.from_numpy(draw_masks(range(count), CROP, PATCH, MaskConfig(ratio=0.75)))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
def test_every_parameter_gets_a_gradient(head, positions):
    model = small_simmim(positions, head=head)
    model(torch.randn(4, 1, *CROP), masks(4)).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_hidden_voxels_are_seen_by_the_loss_alone():
    model, hidden, image = small_simmim(), masks(2), torch.randn(2, 1, *CROP)
    before = model(image, hidden)
    changed = model(image + 5 * hidden_voxels(hidden, PATCH, model.grid), hidden)
    assert torch.equal(changed.prediction, before.prediction)
    assert (changed.sample_loss != before.sample_loss).all()
    shown = model(image + 5 * ~hidden_voxels(hidden, PATCH, model.grid), hidden)
    assert not torch.allclose(shown.prediction, before.prediction)


@pytest.mark.parametrize("target", ["raw", "patch_normalised"])
def test_its_loss_is_the_mean_error_over_hidden_valid_voxels(target):
    model, hidden, image = small_simmim(target=target), masks(2), torch.randn(2, 1, *CROP)
    valid = torch.rand(2, 1, *CROP) < 0.7
    pictures = model.reconstruct(image, hidden)
    output = model(image, hidden, valid)
    counted = hidden_voxels(hidden, PATCH, model.grid) & valid
    for sample in range(2):
        error = (pictures.predicted - image)[sample].abs()[counted[sample]].mean()
        if target == "raw":
            assert float(output.sample_loss[sample].detach()) == pytest.approx(float(error), rel=1e-5)
        else:
            assert output.sample_loss[sample] > 0
    assert torch.equal(pictures.combined[~counted & valid], image[~counted & valid])


def test_weights_cast_to_bf16_give_an_fp32_loss_close_to_the_exact_one():
    model, image, hidden = small_simmim(), torch.randn(4, 1, *CROP), masks(4)
    exact = model(image, hidden).loss
    output = model.bfloat16()(image, hidden)
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - exact) < 0.01 * exact
