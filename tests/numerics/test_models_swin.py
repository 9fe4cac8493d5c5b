"""The Swin transformer against MONAI's with the same weights; SimMIM on it; what is transferred from it."""

import dataclasses
import re

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer, SwinUNETR

from mimscale.config import build_config, config_tree
from mimscale.errors import CheckpointError
from mimscale.models.config import MaskConfig, SwinConfig, TargetConfig, UnetrConfig, UpernetConfig
from mimscale.models.masking import draw_masks
from mimscale.models.patches import hidden_voxels
from mimscale.models.swin import Swin, SwinSimmim, SwinUnetr
from mimscale.models.transfer import load_encoder, start_weights
from mimscale.models.upernet import Upernet

SMALL = SwinConfig(dim=12, depths=(2, 2, 1, 1), heads=(2, 2, 4, 4), window=(3, 3, 3))
FLAT = SwinConfig(dim=12, depths=(2, 1), heads=(2, 4), window=(2, 3, 3))
CROP, PATCH = (32, 64, 32), (2, 2, 2)


def swin(config=SMALL, channels=2):
    torch.manual_seed(0)
    model = Swin(config, crop_voxels=CROP, patch_voxels=PATCH, channels=channels)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return model


def pretrained(config=FLAT, channels=1):
    torch.manual_seed(0)
    return SwinSimmim(config, TargetConfig(), crop_voxels=CROP, patch_voxels=PATCH, channels=channels)


def segmenter(config=FLAT, channels=1):
    torch.manual_seed(1)
    return SwinUnetr(config, UnetrConfig(num_classes=3), crop_voxels=CROP, patch_voxels=PATCH, channels=channels)


def upernet():
    torch.manual_seed(1)
    shape = {"crop_voxels": CROP, "patch_voxels": PATCH, "channels": 1}
    return Upernet(FLAT, UnetrConfig(num_classes=3), UpernetConfig(width=6), **shape)


def contract_of(model):
    encoder = model.encoder
    return {
        "model": config_tree(encoder.config),
        "patch_voxels": list(encoder.patch_voxels),
        "channels": encoder.channels,
    }


def as_monai(name: str) -> str:
    """The name of a weight of our encoder in MONAI's."""
    name = re.sub(r"^blocks\.(\d+)\.", lambda found: f"layers{int(found[1]) + 1}.0.", name)
    return name.replace("embedding.proj.", "patch_embed.proj.")


def test_features_are_those_of_monais_transformer_with_the_same_weights():
    ours = swin()
    theirs = SwinTransformer(2, 12, SMALL.window, PATCH, SMALL.depths, SMALL.heads)
    state = {as_monai(name): value for name, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("relative_position_index") for name in missing)
    image = torch.randn(1, 2, *CROP)
    with torch.no_grad():
        for left, right in zip(ours(image), theirs(image), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_monais_swin_unetr_with_the_same_weights():
    torch.manual_seed(0)
    ours = SwinUnetr(SMALL, UnetrConfig(num_classes=3), crop_voxels=CROP, patch_voxels=PATCH, channels=1)
    theirs = SwinUNETR(
        1, 3, feature_size=12, depths=SMALL.depths, num_heads=SMALL.heads, window_size=SMALL.window, patch_size=2
    )
    state = {f"swinViT.{as_monai(name)}": value for name, value in ours.encoder.state_dict().items()}
    parts = {"encoder1": ours.image_skip, "out": ours.out}
    parts |= {f"encoder{place}": ours.skips[name] for name, place in (("0", 2), ("1", 3), ("2", 4), ("4", 10))}
    parts |= {f"decoder{5 - place}": step for place, step in enumerate(ours.up_steps)}
    for part, module in parts.items():
        state |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("relative_position_index") for name in missing)
    image = torch.randn(1, 1, *CROP)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-3, atol=1e-4)


def test_a_hidden_patch_is_the_mask_token_to_the_encoder():
    model = pretrained().eval()
    hidden = torch.from_numpy(draw_masks([1], CROP, PATCH, MaskConfig(ratio=0.6, unit_voxels=(8, 16, 8))))
    image = torch.randn(1, 1, *CROP)
    under = hidden_voxels(hidden, PATCH, model.grid)
    with torch.no_grad():
        first = model.predict(image, hidden)[0]
        assert torch.equal(model.predict(torch.where(under, torch.randn_like(image), image), hidden)[0], first)
        assert not torch.equal(model.predict(torch.where(under, image, image + 1), hidden)[0], first)
        model.mask_token.add_(1)
        assert not torch.equal(model.predict(image, hidden)[0], first)
        embedding = model.encoder(image, (hidden, model.mask_token))[0]
        plain = model.encoder(image)[0]
    same = (embedding == plain).all(dim=1).flatten(1)
    assert torch.equal(same, ~hidden)


def test_every_weight_is_trained():
    hidden = torch.from_numpy(draw_masks([1], CROP, PATCH, MaskConfig(unit_voxels=(8, 16, 8))))
    for model in (pretrained(), segmenter(), upernet()):
        image = torch.randn(1, 1, *CROP)
        output = model(image, hidden).loss if isinstance(model, SwinSimmim) else model(image).square().mean()
        output.backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_recomputing_changes_neither_output_nor_gradients():
    results = []
    for checkpointed in (False, True):
        model = segmenter(dataclasses.replace(FLAT, checkpoint_activations=checkpointed, drop_path=0.3))
        torch.manual_seed(3)
        scores = model(torch.randn(2, 1, *CROP))
        scores.square().mean().backward()
        results.append([scores, *(value.grad for value in model.parameters())])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_the_whole_encoder_is_transferred_and_only_weights_are():
    source, target = pretrained(), segmenter()
    weights = dict(source.named_parameters())
    report = load_encoder(target, weights, contract_of(source))
    assert report.is_complete
    assert sorted(report.loaded) == sorted(name for name in weights if name.startswith("encoder."))
    assert sorted(report.unused) == ["head.bias", "head.weight", "mask_token"]
    image = torch.randn(1, 1, *CROP)
    assert torch.equal(target.encoder(image)[-1], source.encoder(image)[-1])
    assert all(name.startswith("encoder.blocks.") for name in start_weights(target))


def test_a_upernet_takes_the_whole_encoder_and_scores_every_voxel():
    source, target = pretrained(), upernet()
    assert load_encoder(target, source.state_dict(), contract_of(source)).is_complete
    assert target(torch.randn(2, 1, *CROP)).shape == (2, 3, *CROP)


def test_an_embedding_of_one_channel_sees_equal_channels_as_one():
    source, target = pretrained(), segmenter(channels=3)
    report = load_encoder(target, source.state_dict(), contract_of(source))
    assert report.adapted == {"encoder.embedding.proj.weight": "1 -> 3 channels"}
    image = torch.randn(1, 1, *CROP)
    torch.testing.assert_close(
        target.encoder(image.expand(-1, 3, -1, -1, -1))[-1], source.encoder(image)[-1], rtol=1e-4, atol=1e-4
    )


def test_another_window_is_refused_by_its_key():
    source = pretrained(dataclasses.replace(FLAT, window=(2, 2, 2)))
    with pytest.raises(CheckpointError, match=r"model\.window: "):
        load_encoder(segmenter(), source.state_dict(), contract_of(source))


def test_weights_cast_to_bf16_take_an_fp32_volume():
    model = segmenter().bfloat16()
    assert model(torch.randn(1, 1, *CROP)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": [3, 6]}, "model.heads=.*: must have one entry a stage"),
        ({"heads": [5, 6, 12, 24]}, r"model.dim x 1=48 must be a multiple of model.heads\[0\]=5"),
        ({"window": [0, 7, 7]}, "model.window=.*: must be above 0"),
    ],
)
def test_a_wrong_key_is_named(changes, message):
    with pytest.raises(Exception, match=message):
        build_config(SwinConfig, changes, "test")


def test_a_crop_that_does_not_fit_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"does not divide by \[32, 32, 32\]: .* make each edge a multiple"):
        SMALL.cell_voxels((48, 64, 64), PATCH)
