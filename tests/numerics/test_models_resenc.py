"""The residual-encoder U-Net against nnU-Net's with the same weights; its masked form; what is transferred from it."""

import dataclasses

import pytest
import torch

from mimscale.config import build_config, config_tree
from mimscale.errors import CheckpointError
from mimscale.models.config import MaskConfig, ResencConfig, TargetConfig, UnetrConfig
from mimscale.models.masking import draw_masks
from mimscale.models.nnunet_names import to_nnunet
from mimscale.models.patches import hidden_voxels, patchify
from mimscale.models.resenc import MaskedUnet, ResidualUnet
from mimscale.models.transfer import load_encoder, start_weights
from mimscale.train.losses import deeply_supervised, dice_cross_entropy

SMALL = ResencConfig(features=(4, 8, 12, 12), blocks=(1, 2, 1, 2), decoder_convs=2)
THICK = ResencConfig(
    features=(4, 8, 8),
    blocks=(1, 1, 2),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
)
CROP, PATCH = (16, 24, 32), (8, 8, 8)  # not cubic: a mask that is turned would be seen


def masked(config=SMALL, channels=1, **target):
    torch.manual_seed(0)
    return MaskedUnet(config, TargetConfig(**target), crop_voxels=CROP, patch_voxels=PATCH, channels=channels)


def segmenter(config=SMALL, channels=1, outputs=3):
    torch.manual_seed(1)
    return ResidualUnet(config, UnetrConfig(num_classes=outputs), crop_voxels=CROP, channels=channels)


def contract_of(model, channels=1):
    return {"model": config_tree(model.encoder.config), "patch_voxels": list(PATCH), "channels": channels}


def masks(count=2, ratio=0.6):
    return torch.from_numpy(draw_masks(range(count), CROP, PATCH, MaskConfig(ratio=ratio)))


@pytest.mark.parametrize("config", [SMALL, THICK], ids=["isotropic", "thick slices"])
def test_features_and_scores_are_those_of_nnunets_network_with_the_same_weights(config):
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    ours = segmenter(config, channels=2)
    for value in ours.parameters():  # norms start at 1 and 0, where a wrong order would not be seen
        torch.nn.init.normal_(value, std=0.3)
    theirs = ResidualEncoderUNet(
        2,
        len(config.features),
        list(config.features),
        torch.nn.Conv3d,
        [list(kernel) for kernel in config.stage_kernels],
        [list(stride) for stride in config.stage_strides],
        list(config.blocks),
        3,
        config.decoder_convs,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    state = to_nnunet(ours.state_dict(), contract_of(ours, 2))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("decoder.seg_layers.") for name in missing)
    theirs.decoder.seg_layers[-1].load_state_dict(ours.out.state_dict())
    image = torch.randn(1, 2, *CROP)
    with torch.no_grad():
        for left, right in zip(ours.encoder(image), theirs.encoder(image), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)  # the same products in the same order
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-3, atol=1e-3)


def test_a_vit_has_no_place_in_nnunets_network():
    with pytest.raises(CheckpointError, match="no residual encoder"):
        to_nnunet({}, {"model": {"dim": 48, "depth": 2, "heads": 2}})


def test_hidden_voxels_are_zeros_to_the_encoder_and_visible_ones_are_seen():
    model, hidden = masked().eval(), masks(1)
    image = torch.randn(1, 1, *CROP)
    under = hidden_voxels(hidden, PATCH, model.grid)
    other = torch.where(under, torch.randn_like(image), image)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    first, second = model.predict(image, hidden)[0], model.predict(other, hidden)[0]
    assert torch.equal(seen[0], image * ~under)
    assert torch.equal(first, second)
    changed = model.predict(torch.where(under, image, image + 1), hidden)[0]
    assert not torch.allclose(changed, first)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_covers_exactly_the_masked_voxels(loss, monkeypatch):
    model, hidden, image = masked(loss=loss), masks(), torch.randn(2, 1, *CROP)
    valid = torch.rand(2, 1, *CROP) > 0.1
    said = torch.randn(2, hidden.shape[1], 512, requires_grad=True)
    monkeypatch.setattr(model, "predict", lambda image, hidden: (said, said.detach()))
    output = model(image, hidden, valid)
    output.loss.backward()
    covered = said.grad != 0
    under = torch.zeros(2, 1, *CROP, dtype=torch.bool)  # by plain loops over the grid, Z slowest
    for sample in range(2):
        for place in range(hidden.shape[1]):
            z, y, x = place // 12 * 8, place // 4 % 3 * 8, place % 4 * 8
            under[sample, 0, z : z + 8, y : y + 8, x : x + 8] = hidden[sample, place]
    assert torch.equal(covered, patchify(under & valid, PATCH))
    error = said.detach() - patchify(image, PATCH)
    error = error.abs() if loss == "l1" else error.square()
    means = [error[sample][covered[sample]].mean() for sample in range(2)]
    torch.testing.assert_close(output.sample_loss.detach(), torch.stack(means))


def test_every_weight_is_trained():
    model = masked()
    model(torch.randn(2, 1, *CROP), masks()).loss.backward()
    # The bias of a convolution before a norm is taken out again by it.
    idle = [name for name, value in model.named_parameters() if value.grad is None]
    assert idle == []


def test_recomputing_changes_neither_loss_nor_gradients():
    results = []
    for checkpointed in (False, True):
        model = masked(dataclasses.replace(SMALL, checkpoint_activations=checkpointed))
        torch.manual_seed(3)
        loss = model(torch.randn(2, 1, *CROP), masks()).loss
        loss.backward()
        results.append([loss, *(value.grad for value in model.parameters())])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_encoder_and_decoder_are_both_transferred_and_nothing_else():
    source, target = masked(), segmenter()
    report = load_encoder(target, source.state_dict(), contract_of(source))
    assert report.is_complete
    assert sorted(report.loaded) == sorted(
        name for name in source.state_dict() if name.startswith(("encoder.", "decoder."))
    )
    assert sorted(report.unused) == ["head.bias", "head.weight"]
    image = torch.randn(1, 1, *CROP)
    left, right = (model.decoder(model.encoder(image))[-1] for model in (source, target))
    assert torch.equal(left, right)


def test_less_than_encoder_and_decoder_is_refused_by_name():
    source, target = masked(), segmenter()
    encoder = {name: value for name, value in source.state_dict().items() if not name.startswith("decoder.")}
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of the encoder and decoder's .* cannot be loaded\n  decoder\.ups"):
        load_encoder(target, encoder, contract_of(source))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_other_stages_are_refused_by_their_keys():
    source = masked(dataclasses.replace(SMALL, blocks=(1, 1, 1, 2)))
    with pytest.raises(CheckpointError, match=r"model\.blocks: "):
        load_encoder(segmenter(), source.state_dict(), contract_of(source))


def test_a_stem_of_one_channel_sees_equal_channels_as_one():
    source, target = masked(), segmenter(channels=3)
    report = load_encoder(target, source.state_dict(), contract_of(source))
    assert report.adapted == {"encoder.stem.conv.weight": "1 -> 3 channels"}
    image = torch.randn(1, 1, *CROP)
    for left, right in zip(source.encoder(image), target.encoder(image.expand(-1, 3, -1, -1, -1)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_deep_supervision_scores_each_stage_while_training_and_only_voxels_afterwards():
    torch.manual_seed(0)
    model = ResidualUnet(SMALL, UnetrConfig(num_classes=3), crop_voxels=CROP, channels=1, deep_supervision=True)
    image, label = torch.randn(2, 1, *CROP), torch.randint(0, 3, (2, *CROP))
    scores = model(image)
    assert [tuple(one.shape[2:]) for one in scores] == [(16, 24, 32), (8, 12, 16), (4, 6, 8)]
    coarse = [label, label[:, ::2, ::2, ::2], label[:, ::4, ::4, ::4]]  # the nearest voxel is the first of a cell
    terms = [dice_cross_entropy(one, at) for one, at in zip(scores, coarse, strict=True)]
    expected = (4 * terms[0] + 2 * terms[1] + terms[2]) / 7
    loss = deeply_supervised(dice_cross_entropy, scores, label)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert model.eval()(image).shape == (2, 3, *CROP)
    source = masked()
    assert load_encoder(model, source.state_dict(), contract_of(source)).is_complete


def test_the_control_arm_keeps_the_stem_alone():
    target = segmenter()
    kept = start_weights(target)
    assert {name.split(".")[0] for name in kept} == {"encoder", "decoder"}
    assert not any("stem" in name for name in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1, 2]}, "must have one entry a stage, and model.features"),
        ({"drop_path": 0.1}, "a residual encoder leaves no block out"),
        ({"kernels": [[2, 3, 3], [3, 3, 3]], "features": [4, 8], "blocks": [1, 1]}, "each edge must be odd"),
        ({"features": [4], "blocks": [1]}, "at least 2 stages"),
        ({"features": [4, 0], "blocks": [1, 1]}, "model.features=.*: must be above 0"),
    ],
)
def test_a_wrong_stage_is_named_with_the_way_out(changes, message):
    with pytest.raises(Exception, match=message):
        build_config(ResencConfig, changes, "test")


@pytest.mark.parametrize(
    ("crop", "message"),
    [((12, 16, 16), r"does not divide by the strides of all stages, \[8, 8, 8\]"), ((8, 8, 8), "leaves one voxel")],
)
def test_a_crop_that_does_not_fit_is_named_with_the_way_out(crop, message):
    with pytest.raises(ValueError, match=message):
        SMALL.stage_voxels(crop)
