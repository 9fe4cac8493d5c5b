"""Both models can learn what is put before them: the gradient is that of the loss, and nothing is cut off."""

import torch

from mimscale.models.config import MaeConfig, MaskConfig, UnetrConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.masking import draw_masks
from mimscale.models.unetr import Unetr

STEPS = 500


def test_an_mae_learns_two_volumes_by_heart():
    torch.manual_seed(0)
    crop, patch = (16, 16, 16), (4, 8, 8)
    model = MaskedAutoencoder(
        VitConfig(dim=96, depth=2, heads=4),
        MaeConfig(decoder_dim=96, decoder_depth=2, decoder_heads=4, loss="l2"),
        crop_voxels=crop,
        patch_voxels=patch,
        channels=1,
    )
    axes = [torch.linspace(-1, 1, edge) for edge in crop]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    ball = ((z**2 + y**2 + x**2) < 0.5).float()
    waves = torch.sin(4 * z) * torch.cos(3 * y) + 0.5 * x
    image = torch.stack([ball, waves])[:, None]
    image = (image - image.mean()) / image.std()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / STEPS)
        hidden = torch.from_numpy(draw_masks([2 * step, 2 * step + 1], crop, patch, MaskConfig(ratio=0.5)))
        loss = model(image, hidden).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = torch.from_numpy(draw_masks([10_001, 10_002], crop, patch, MaskConfig(ratio=0.5)))
    with torch.no_grad():
        assert model(image, unseen).loss < 0.08  # predicting the mean gives about 1; 0.04 was measured


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
    model.set_class_prior(torch.bincount(label.flatten()).tolist())
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
