"""The models can learn what is put before them: the gradient is that of the loss, and nothing is cut off."""

import pytest
import torch

from mimscale.models.config import MaeConfig, MaskConfig, SimclrConfig, SimmimConfig, UnetrConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.masking import draw_masks, draw_predicted
from mimscale.models.prior import set_class_prior
from mimscale.models.simclr import Simclr
from mimscale.models.simmim import Simmim
from mimscale.models.unetr import Unetr
from mimscale.stream.augment import augment, draw
from mimscale.stream.config import AugmentConfig
from mimscale.train.contrast import pool_loss, subject_numbers


def two_volumes(crop):
    axes = [torch.linspace(-1, 1, edge) for edge in crop]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    ball = ((z**2 + y**2 + x**2) < 0.5).float()
    waves = torch.sin(4 * z) * torch.cos(3 * y) + 0.5 * x
    image = torch.stack([ball, waves])[:, None]
    return (image - image.mean()) / image.std()


def descend(model, loss_of, steps, lr=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()


CROP, PATCH = (16, 16, 16), (4, 8, 8)
VIT = VitConfig(dim=96, depth=2, heads=4)
SHAPE = {"crop_voxels": CROP, "patch_voxels": PATCH, "channels": 1}
MAE = {"decoder_dim": 96, "decoder_heads": 4, "loss": "l2"}
# Predicting the mean gives about 1; measured were 0.04, 0.2, 0.70, 0.06 and 0.14. A linear decoder can hold the mean of
# each place and pass on what its neighbours say, and no more: that is its floor.
RECONSTRUCTIONS = {
    "mae": (lambda: MaskedAutoencoder(VIT, MaeConfig(decoder_depth=2, **MAE), **SHAPE), 500, 1.0, 0.08),
    "mae, half of the hidden patches": (
        lambda: MaskedAutoencoder(VIT, MaeConfig(decoder_depth=1, **MAE), **SHAPE),
        500,
        0.5,
        0.25,
    ),
    "mae, linear decoder": (lambda: MaskedAutoencoder(VIT, MaeConfig(decoder_depth=0, **MAE), **SHAPE), 350, 1.0, 0.8),
    "simmim, linear head": (lambda: Simmim(VIT, SimmimConfig(loss="l2"), **SHAPE), 400, 1.0, 0.1),
    "simmim, mlp head": (lambda: Simmim(VIT, SimmimConfig(loss="l2", head="mlp"), **SHAPE), 300, 1.0, 0.25),
}


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_hidden_patches_of_two_volumes_are_learned_by_heart(name):
    build, steps, share, most = RECONSTRUCTIONS[name]
    torch.manual_seed(0)
    model, image = build(), two_volumes(CROP)

    def loss_of(step):
        seeds = [2 * step, 2 * step + 1]
        hidden = draw_masks(seeds, CROP, PATCH, MaskConfig(ratio=0.5))
        predicted = None if share == 1 else torch.from_numpy(draw_predicted(seeds, hidden, share))
        return model(image, torch.from_numpy(hidden), None, predicted).loss

    descend(model, loss_of, steps)
    unseen = torch.from_numpy(draw_masks([10_001, 10_002], CROP, PATCH, MaskConfig(ratio=0.5)))
    with torch.no_grad():
        assert model(image, unseen).loss < most


def test_simclr_tells_two_volumes_apart_under_augmentations_that_it_has_not_seen():
    torch.manual_seed(0)
    model, image = Simclr(VIT, SimclrConfig(projection_dim=8, hidden_dim=64), **SHAPE), two_volumes(CROP)
    config = AugmentConfig(flip_prob=(0.5, 0.5, 0.5), scale_prob=1, scale_by=0.4, noise_prob=1, noise_std=0.3)
    valid, subjects = torch.ones_like(image, dtype=torch.bool), subject_numbers(["a", "b"])

    def loss_of(step):
        views = [augment(image, None, valid, draw([2 * step, 2 * step + 1], config, view))[0] for view in range(2)]
        return pool_loss(model(torch.cat(views)), subjects, 0.2)

    with torch.no_grad():
        assert loss_of(10_000) > 0.7  # ln 3 with nothing to tell views apart
    descend(model, loss_of, 60)
    with torch.no_grad():
        assert loss_of(10_000) < 0.01  # the floor is ln(1 + 2 exp(-10)) = 0.0001


def test_a_unetr_learns_one_volume_by_heart():
    crop = (16, 32, 24)
    torch.manual_seed(0)
    model = Unetr(
        VitConfig(dim=24, depth=2, heads=2),
        UnetrConfig(feature_size=8, num_classes=3),
        crop_voxels=crop,
        patch_voxels=(8, 8, 8),
        channels=1,
    )
    axes = [torch.linspace(-1, 1, edge) for edge in crop]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    label = torch.zeros(crop, dtype=torch.int64)
    label[z**2 + y**2 + x**2 < 0.7] = 1
    label[(z - 0.2) ** 2 + (y + 0.3) ** 2 + x**2 < 0.1] = 2
    image = (torch.tensor([0.0, 1.0, 0.6])[label] + 0.3 * torch.randn(crop))[None, None]
    set_class_prior(model.output_bias, torch.bincount(label.flatten()).tolist())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(image), label[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model(image).argmax(dim=1)[0]
    for index in range(3):
        both = ((predicted == index) & (label == index)).sum()
        dice = 2 * both / ((predicted == index).sum() + (label == index).sum())
        assert dice > 0.95, index
