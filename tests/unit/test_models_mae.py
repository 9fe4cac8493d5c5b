import pytest
import torch

from mimscale.models.config import MaeConfig, MaskConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder, visible_indices
from mimscale.models.masking import draw_masks, draw_predicted
from mimscale.models.patches import hidden_voxels

CROP, PATCH = (8, 12, 16), (4, 4, 8)  # a grid of 2 x 3 x 2


def small_mae(channels=1, vit=None, **changes):
    torch.manual_seed(0)
    return MaskedAutoencoder(
        VitConfig(**{"dim": 36, "depth": 2, "heads": 3, **(vit or {})}),
        MaeConfig(**{"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2, **changes}),
        crop_voxels=CROP,
        patch_voxels=PATCH,
        channels=channels,
    )


def masks(count, ratio=0.75):
    return torch.from_numpy(draw_masks(range(count), CROP, PATCH, MaskConfig(ratio=ratio)))


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_every_parameter_gets_a_gradient(positions, checkpoint_activations):
    model = small_mae(vit={"positions": positions, "checkpoint_activations": checkpoint_activations})
    model(torch.randn(12, 1, *CROP), masks(12)).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_the_encoder_sees_only_visible_patches():
    model, hidden = small_mae(), masks(2)
    seen = []
    model.encoder.projection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    image = torch.randn(2, 1, *CROP)
    before = model(image, hidden).prediction
    assert seen[0].shape == (2, 3, 4 * 4 * 8)  # 3 of 12 patches reach the projection
    changed = torch.where(model.reconstruct(image, hidden).hidden, image + 5, image)
    assert torch.equal(model(changed, hidden).prediction, before)


def test_visible_patches_come_in_the_order_of_the_grid():
    hidden = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert visible_indices(hidden).tolist() == [[1, 3], [0, 3]]


@pytest.mark.parametrize("rows", [[[True, False], [True, True]], [[True, True]], [[False, False]]])
def test_a_batch_of_unequal_or_useless_masks_is_refused(rows):
    with pytest.raises(ValueError, match="each sample must hide the same number of its 2 patches, some, not all"):
        visible_indices(torch.tensor(rows))


@pytest.mark.parametrize("target", ["raw", "patch_normalised"])
def test_weights_cast_to_bf16_give_an_fp32_loss_close_to_the_exact_one(target):
    model, image, hidden = small_mae(target=target), torch.randn(4, 1, *CROP), masks(4)
    exact = model(image, hidden).loss
    output = model.bfloat16()(image, hidden)
    assert output.prediction.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - exact) < 0.01 * exact
    output.loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


def test_the_target_keeps_fp32_when_weights_are_bf16():
    model = small_mae().bfloat16()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    image = torch.full((1, 1, *CROP), 1.001)  # in bf16 this is 1
    assert model(image, masks(1)).loss.item() == pytest.approx(1.001, abs=1e-6)


@pytest.mark.parametrize("target", ["raw", "patch_normalised"])
def test_a_reconstruction_keeps_visible_voxels_and_predicts_hidden_ones_in_image_units(target):
    model, image, hidden = small_mae(2, target=target), 50 + 3 * torch.randn(2, 2, *CROP), masks(2, 0.5)
    pictures = model.reconstruct(image, hidden)
    mask = pictures.hidden.expand_as(image)
    assert mask.float().mean() == 0.5
    assert torch.equal(pictures.combined[~mask], image[~mask])
    assert torch.equal(pictures.combined[mask], pictures.predicted[mask])
    assert torch.equal(pictures.visible, torch.where(mask, 0, image))
    if target == "patch_normalised":
        assert (pictures.predicted - 50).abs().mean() < 10


def test_a_linear_decoder_carries_the_image_to_hidden_patches_linearly():
    model, hidden = small_mae(decoder_depth=0), masks(2)
    outside = hidden[0].nonzero()[:, 0]
    image = torch.randn(2, 1, *CROP)
    assert not torch.allclose(
        model(image, hidden).prediction[0, outside], model(image + 1, hidden).prediction[0, outside]
    )
    model(torch.randn(12, 1, *CROP), masks(12)).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    tokens = [torch.randn(1, 3, 36) for _ in range(2)]
    model.encoder.forward = lambda image, visible: (image, [])

    def decoded(tokens):
        return model._predict(tokens, visible_indices(hidden[:1]))[0]

    middle = decoded((tokens[0] + tokens[1]) / 2)
    assert torch.allclose(middle, (decoded(tokens[0]) + decoded(tokens[1])) / 2, atol=1e-5)


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_what_is_not_predicted_has_no_part_in_decoder_and_loss(loss_on):
    model, hidden = small_mae(loss_on=loss_on), masks(2)  # 9 of 12 hidden
    predicted = torch.from_numpy(draw_predicted([5, 6], hidden.numpy(), 0.4))  # 4 of the 9
    seen = []
    model.decoder_blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    image = torch.randn(2, 1, *CROP)
    output = model(image, hidden, None, predicted)
    assert seen == [(2, 3 + 4, 24)]
    left_out = hidden & ~predicted
    assert not output.prediction[left_out].any()
    mask = hidden_voxels(left_out, PATCH, model.grid)
    assert torch.equal(model(image + 9 * mask, hidden, None, predicted).sample_loss, output.sample_loss)
    mask = hidden_voxels(predicted, PATCH, model.grid)
    assert (model(image + 9 * mask, hidden, None, predicted).sample_loss != output.sample_loss).all()


def test_predicting_all_hidden_patches_by_name_is_the_default():
    model, hidden, image = small_mae(), masks(2), torch.randn(2, 1, *CROP)
    named = model(image, hidden, None, hidden)
    assert torch.allclose(named.loss, model(image, hidden).loss, rtol=1e-6)


@pytest.mark.parametrize(("loss_on", "answered"), [("masked", 9), ("all", 12)])
def test_the_last_block_and_the_head_answer_for_what_the_loss_covers_alone(loss_on, answered):
    model, hidden = small_mae(loss_on=loss_on, decoder_depth=2), masks(2)  # 9 of 12 hidden
    seen = {}
    parts = {"first": model.decoder_blocks[0].mlp, "last": model.decoder_blocks[1].mlp, "head": model.head}
    for name, part in parts.items():
        part.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0].shape[1]))
    output = model(torch.randn(2, 1, *CROP), hidden)
    assert seen == {"first": 12, "last": answered, "head": answered}
    assert (output.prediction[~hidden] == 0).all() == (loss_on == "masked")
    model.reconstruct(torch.randn(2, 1, *CROP), hidden)
    assert seen["head"] == 12  # pictures show every patch
