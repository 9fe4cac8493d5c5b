"""The loss against slow loops: which voxels it covers, and its value.

The grid is neither cubic nor isotropic, so that no axis can stand for another: patches of 2 x 3 x 4 voxels,
2 x 2 x 4 of them.
"""

import itertools

import pytest
import torch

from mimscale.models.config import MaeConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder, visible_indices
from mimscale.models.patches import patchify
from mimscale.models.reconstruction import VARIANCE_FLOOR, patch_target

CROP, PATCH, GRID, CHANNELS = (4, 6, 16), (2, 3, 4), (2, 2, 4), 2
VOXELS = list(itertools.product(*map(range, CROP)))


def model_with(**changes):
    torch.manual_seed(0)
    return MaskedAutoencoder(
        VitConfig(dim=12, depth=1, heads=2),
        MaeConfig(**{"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, **changes}),
        crop_voxels=CROP,
        patch_voxels=PATCH,
        channels=CHANNELS,
    )


def blind(model):
    """A model whose prediction does not depend on the image: what is left in the loss is the target."""
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


def patch_of(voxel):
    z, y, x = (position // edge for position, edge in zip(voxel, PATCH, strict=True))
    return (z * GRID[1] + y) * GRID[2] + x


@pytest.fixture
def case():
    """An image, a mask of 11 of 16 patches, and a region of valid voxels that cuts through patches."""
    torch.manual_seed(1)
    image = torch.randn(2, CHANNELS, *CROP)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    for row in hidden:
        row[torch.randperm(16)[:11]] = True
    valid = torch.zeros(2, 1, *CROP, dtype=torch.bool)
    valid[0, :, 1:, :5, 3:] = True
    valid[1, :, :, 2:, :13] = True
    return image, hidden, valid


@pytest.mark.parametrize("masked_only", [True, False])
@pytest.mark.parametrize("with_valid", [True, False])
def test_a_voxel_changes_the_loss_exactly_if_it_is_hidden_and_valid(case, masked_only, with_valid):
    image, hidden, valid = case
    model = blind(model_with(loss_on="masked" if masked_only else "all", loss="l2"))
    given = valid if with_valid else None
    before = model(image, hidden, given).sample_loss
    covered = 0
    for z, y, x in VOXELS:
        changed = image.clone()
        changed[:, :, z, y, x] += 3
        changes = model(changed, hidden, given).sample_loss != before
        for sample in range(2):
            counts = bool(valid[sample, 0, z, y, x]) or not with_valid
            if masked_only:
                counts = counts and bool(hidden[sample, patch_of((z, y, x))])
            assert bool(changes[sample]) == counts, (sample, z, y, x)
            covered += counts
    if masked_only and not with_valid:
        assert covered == 2 * 11 * 2 * 3 * 4


def test_no_gradient_reaches_the_target_outside_of_the_mask(case):
    image, hidden, valid = case
    image.requires_grad_()
    blind(model_with(loss="l2"))(image, hidden, valid).loss.backward()
    for sample, voxel in itertools.product(range(2), VOXELS):
        inside = bool(hidden[sample, patch_of(voxel)]) and bool(valid[(sample, 0, *voxel)])
        assert bool((image.grad[(sample, slice(None), *voxel)] != 0).all()) == inside
        assert bool((image.grad[(sample, slice(None), *voxel)] != 0).any()) == inside


@pytest.mark.parametrize("target", ["raw", "patch_normalised"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_is_that_of_a_loop_over_voxels(case, target, loss):
    image, hidden, valid = case
    model = model_with(target=target, loss=loss)
    output = model(image, hidden, valid)
    expected = []
    for sample in range(2):
        total, count = 0.0, 0
        for voxel in VOXELS:
            patch = patch_of(voxel)
            if not hidden[sample, patch] or not valid[(sample, 0, *voxel)]:
                continue
            corner = [position // edge * edge for position, edge in zip(voxel, PATCH, strict=True)]
            box = tuple(slice(start, start + edge) for start, edge in zip(corner, PATCH, strict=True))
            values = image[(sample, slice(None), *box)]
            inside = [position % edge for position, edge in zip(voxel, PATCH, strict=True)]
            for channel in range(CHANNELS):
                goal = float(image[(sample, channel, *voxel)])
                if target == "patch_normalised":
                    variance = float(((values - values.mean()) ** 2).mean())
                    goal = (goal - float(values.mean())) / (variance + VARIANCE_FLOOR) ** 0.5
                number = ((inside[0] * PATCH[1] + inside[1]) * PATCH[2] + inside[2]) * CHANNELS + channel
                error = float(output.prediction.detach()[sample, patch, number]) - goal
                total += abs(error) if loss == "l1" else error**2
                count += 1
        expected.append(total / count)
    # fp32 sums of some 200 terms of about 1.
    assert output.sample_loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(output.loss.detach()) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_patch_of_almost_constant_air_has_a_bounded_target():
    image = torch.zeros(1, CHANNELS, *CROP) + 1e-4 * torch.randn(1, CHANNELS, *CROP)
    model = blind(model_with(target="patch_normalised", loss="l2"))
    torch.nn.init.zeros_(model.head.bias)
    hidden = torch.ones(1, 16, dtype=torch.bool)
    hidden[0, 3] = False
    assert model(image, hidden).loss < 1e-3  # without a floor it would be 1


def test_a_sample_without_a_voxel_that_counts_has_loss_zero_and_no_gradient(case):
    image, hidden, valid = case
    valid[1] = False
    model = model_with()
    output = model(image, hidden, valid)
    assert output.sample_loss[1] == 0
    output.sample_loss[1].backward()
    assert all(value.grad is None or not value.grad.any() for value in model.parameters())


def test_the_mean_over_micro_batches_is_the_loss_of_the_batch_whatever_is_valid(case):
    image, hidden, valid = case
    model = model_with()
    whole = model(image, hidden, valid).loss
    parts = [model(image[i : i + 1], hidden[i : i + 1], valid[i : i + 1]).loss for i in range(2)]
    assert torch.allclose(torch.stack(parts).mean(), whole, rtol=1e-6)


def everything(model, image, hidden, valid, predicted):
    """The loss the slow way: every block and the head on all patches that are decoded, the error times a mask."""
    config, L = model.config, hidden.shape[1]
    answered = hidden if predicted is None else predicted
    counted = answered if config.loss_on == "masked" else answered | ~hidden
    tokens, _ = model.encoder(image, visible_indices(hidden))
    shown = model.decoder_input(tokens)
    losses = []
    for sample in range(len(image)):
        visible = [patch for patch in range(L) if not hidden[sample, patch]]
        rows = [model.mask_token] * L
        for number, patch in enumerate(visible):
            rows[patch] = shown[sample, number]
        full = torch.stack(rows) + model.decoder_positions.reshape(L, -1)
        if not model.decoder_blocks:
            full = full + model._carried(shown[sample : sample + 1], torch.tensor([visible]))[0]
        decoded = [patch for patch in range(L) if not hidden[sample, patch] or answered[sample, patch]]
        full = full[decoded][None]
        for block in model.decoder_blocks:
            full = block(full)
        said = model.head(model.decoder_norm(full))[0]
        target = patch_target(image[sample : sample + 1], config, PATCH)[0].double()
        voxels = patchify(valid[sample : sample + 1].expand(-1, CHANNELS, -1, -1, -1), PATCH)[0]
        weight = (voxels & counted[sample][:, None])[decoded].double()
        error = (said - target[decoded]).abs() if config.loss == "l1" else (said - target[decoded]).square()
        losses.append((error * weight).sum() / weight.sum())
    return torch.stack(losses)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
@pytest.mark.parametrize("share", [False, True], ids=["all predicted", "a part predicted"])
@pytest.mark.parametrize(("target", "loss"), [("raw", "l1"), ("patch_normalised", "l2")])
def test_leaving_out_what_the_loss_does_not_cover_changes_neither_loss_nor_gradients(
    case, depth, loss_on, share, target, loss
):
    image, hidden, valid = case
    image, predicted = image.double(), None
    if share:
        predicted = torch.zeros_like(hidden)
        for row, among in zip(predicted, hidden, strict=True):
            row[among.nonzero()[::2, 0]] = True  # 6 of 11
    model = model_with(decoder_depth=depth, loss_on=loss_on, target=target, loss=loss).double()
    slow = everything(model, image, hidden, valid, predicted)
    slow.mean().backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    output = model(image, hidden, valid, predicted)
    output.loss.backward()
    # Products in fp64; the loss itself is computed in fp32.
    torch.testing.assert_close(output.sample_loss.double(), slow, rtol=1e-6, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)
