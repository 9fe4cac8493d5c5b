import dataclasses
import json
import os

import pytest
import torch

from mimscale.config import config_tree
from mimscale.errors import CheckpointError
from mimscale.models.config import MaeConfig, UnetrConfig, VitConfig
from mimscale.models.mae import MaskedAutoencoder
from mimscale.models.transfer import load_encoder, load_weights, save_weights
from mimscale.models.unetr import Unetr

VIT = VitConfig(dim=24, depth=2, heads=2, positions="learned")
CROP, PATCH = (16, 32, 16), (8, 8, 8)


def pretrained(vit=VIT, crop=CROP, channels=1):
    torch.manual_seed(0)
    return MaskedAutoencoder(
        vit,
        MaeConfig(decoder_dim=12, decoder_depth=1, decoder_heads=2),
        crop_voxels=crop,
        patch_voxels=PATCH,
        channels=channels,
    )


def segmenter(vit=VIT, crop=CROP, patch=PATCH, channels=1):
    torch.manual_seed(1)
    return Unetr(
        vit, UnetrConfig(feature_size=4, num_classes=2), crop_voxels=crop, patch_voxels=patch, channels=channels
    )


def contract_of(model):
    return {
        "model": config_tree(model.encoder.config),
        "patch_voxels": list(model.encoder.patch_voxels),
        "channels": model.encoder.channels,
    }


def transfer(giver, target, **options):
    return load_encoder(target, giver.state_dict(), contract_of(giver), **options)


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope", "rope_learned"])
def test_the_encoder_has_the_same_features_behind_both_models(positions):
    vit = dataclasses.replace(VIT, positions=positions, layer_scale=0.1)
    source, target = pretrained(vit), segmenter(vit)
    report = transfer(source, target)
    image = torch.randn(1, 1, *CROP)
    assert torch.equal(target.encoder(image)[0], source.encoder(image)[0])
    assert report.is_complete
    assert sorted(report.loaded) == sorted(name for name in source.state_dict() if name.startswith("encoder."))
    assert not report.adapted
    assert sorted(report.unused) == sorted(name for name in source.state_dict() if not name.startswith("encoder."))


def test_the_report_counts_tensors_and_names_what_was_adapted(capsys):
    transfer(pretrained(), segmenter(channels=4), source="runs/mae").show()
    text = capsys.readouterr().err
    assert "encoder from runs/mae" in text
    assert "28 tensors" in text
    assert "encoder.projection.weight: 1 -> 4 channels" in text
    assert "unused" in text
    assert "decoder_blocks" in text


def test_one_channel_becomes_four_whose_equal_images_give_the_same_features():
    source, target = pretrained(), segmenter(channels=4)
    report = transfer(source, target)
    image = torch.randn(2, 1, *CROP)
    assert report.adapted == {"encoder.projection.weight": "1 -> 4 channels"}
    # fp32: the same products, four times a quarter of each, summed in another order.
    assert torch.allclose(target.encoder(image.expand(-1, 4, -1, -1, -1))[0], source.encoder(image)[0], atol=1e-5)


def test_other_changes_of_channels_are_refused():
    with pytest.raises(CheckpointError) as error:
        transfer(pretrained(channels=2), segmenter(channels=3))
    assert "1 of the encoder's 29 tensors cannot be loaded" in str(error.value)
    assert "encoder.projection.weight: [24, 1024] in the source, [24, 1536] in the model" in str(error.value)
    assert "(2 -> 3 channels; only 1 -> N is defined)" in str(error.value)


def test_learned_positions_are_interpolated_to_the_grid_of_the_model():
    source, target = pretrained(), segmenter(crop=(32, 32, 48))
    with torch.no_grad():  # a position that rises along Z and X
        z, _, x = torch.meshgrid(torch.arange(2.0), torch.arange(4.0), torch.arange(2.0), indexing="ij")
        source.encoder.positions.copy_((z + 10 * x)[..., None].expand_as(source.encoder.positions))
    report = transfer(source, target)
    assert report.adapted == {"encoder.positions": "interpolated, 2 x 4 x 2 -> 4 x 4 x 6 patches"}
    table = target.encoder.positions
    assert torch.allclose(table[:, 0, 0, 0], torch.tensor([0, 0.25, 0.75, 1]))
    assert torch.allclose(table[0, 1, :, 5], torch.tensor([0, 0, 10 / 3, 20 / 3, 10, 10]), atol=1e-5)
    assert target(torch.randn(1, 1, 32, 32, 48)).shape == (1, 2, 32, 32, 48)


def test_fixed_positions_need_no_change_on_another_grid():
    vit = dataclasses.replace(VIT, positions="sincos")
    report = transfer(pretrained(vit), segmenter(vit, crop=(32, 32, 48)))
    assert report.is_complete
    assert not report.adapted


def test_an_incomplete_source_is_refused_and_leaves_the_model_untouched():
    source, target = pretrained(), segmenter()
    tensors = source.state_dict()
    del tensors["encoder.blocks.1.mlp.fall.weight"]
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_encoder(target, tensors, contract_of(source), source="runs/mae")
    assert str(error.value) == (
        "runs/mae: 1 of the encoder's 29 tensors cannot be loaded\n"
        "  encoder.blocks.1.mlp.fall.weight: not in the source\n"
        "give the model the architecture and the patch of the source: patch_voxels=[8, 8, 8] model.dim=24 "
        "model.depth=2 model.heads=2 model.mlp_ratio=4.0 model.mlp=gelu model.positions=learned model.layer_scale=None"
    )
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_an_incomplete_source_loads_what_it_has_when_not_strict():
    source, target = pretrained(), segmenter()
    tensors = source.state_dict()
    del tensors["encoder.positions"]
    own = target.encoder.positions.clone()
    report = load_encoder(target, tensors, contract_of(source), strict=False)
    assert report.missing == {"encoder.positions": "not in the source"}
    assert len(report.loaded) == 28
    assert torch.equal(target.encoder.positions, own)
    assert torch.equal(target.encoder.projection.weight, source.encoder.projection.weight)


def test_another_architecture_is_refused_even_where_the_shapes_agree():
    with pytest.raises(CheckpointError) as error:
        transfer(pretrained(), segmenter(dataclasses.replace(VIT, heads=4)), source="runs/mae")
    assert str(error.value) == (
        "runs/mae: its encoder is not this model's (source -> model):\n"
        "  model.heads: 2 -> 4\n"
        "set these keys to the source's values, or train from scratch"
    )
    with pytest.raises(CheckpointError, match=r"model.heads: 2 -> 4"):
        transfer(pretrained(), segmenter(dataclasses.replace(VIT, heads=4)), strict=False)


def test_every_difference_of_architecture_is_named_at_once():
    other = dataclasses.replace(VIT, depth=3, positions="rope", layer_scale=1e-5)
    with pytest.raises(CheckpointError) as error:
        transfer(pretrained(), segmenter(other, crop=(16, 32, 16), patch=(4, 8, 8)))
    for line in (
        "model.depth: 2 -> 3",
        "model.layer_scale: 'none' -> 'trained'",
        "model.positions: 'learned' -> 'rope'",
        "patch_voxels: [8, 8, 8] -> [4, 8, 8]",
    ):
        assert line in str(error.value)


def test_what_only_matters_while_training_may_differ():
    other = dataclasses.replace(VIT, drop_path=0.2, checkpoint_activations=True)
    assert transfer(pretrained(), segmenter(other)).is_complete


def test_a_contract_without_the_architecture_is_refused():
    with pytest.raises(CheckpointError, match="its contract lacks model, patch_voxels; export the weights again"):
        load_encoder(segmenter(), pretrained().state_dict(), {"channels": 1})


def test_weights_and_contract_survive_the_disk(tmp_path):
    source = pretrained()
    save_weights(tmp_path / "out", source.state_dict(), {**contract_of(source), "axis_order": "CZYX"})
    tensors, contract = load_weights(tmp_path / "out")
    assert contract == {"contract_version": 1, **contract_of(source), "axis_order": "CZYX"}
    assert tensors.keys() == source.state_dict().keys()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in tensors.items())
    assert load_encoder(segmenter(), tensors, contract).is_complete
    assert sorted(os.listdir(tmp_path / "out")) == ["contract.json", "weights.safetensors"]


def test_bf16_and_views_into_one_flat_buffer_survive_the_disk(tmp_path):
    flat = torch.randn(24, dtype=torch.bfloat16)  # as an engine keeps its parameters
    given = {"first": flat[:12].view(4, 3), "second": flat[12:].view(3, 4), "turned": torch.randn(2, 5).T}
    save_weights(tmp_path, given, {})
    tensors, _ = load_weights(tmp_path)
    assert tensors.keys() == given.keys()
    assert all(torch.equal(value, given[name]) for name, value in tensors.items())


@pytest.mark.parametrize("name", ["weights.safetensors", "contract.json"])
def test_a_missing_file_of_weights_is_named(tmp_path, name):
    save_weights(tmp_path, {"a": torch.zeros(2)}, {})
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: no such file; weights are a folder with"):
        load_weights(tmp_path)


def test_truncated_weights_are_named_as_damaged(tmp_path):
    save_weights(tmp_path, {"a": torch.zeros(100)}, {})
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"weights.safetensors: damaged \(.*\); export the weights again"):
        load_weights(tmp_path)


def test_a_contract_that_is_no_json_or_of_another_version_is_refused(tmp_path):
    save_weights(tmp_path, {"a": torch.zeros(2)}, {})
    (tmp_path / "contract.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"contract.json: not valid JSON"):
        load_weights(tmp_path)
    (tmp_path / "contract.json").write_text(json.dumps({"contract_version": 2}))
    with pytest.raises(CheckpointError, match="contract version 2, this mimscale reads version 1"):
        load_weights(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"weights.safetensors: the disk is full \(\d+ bytes free\); free some space"
    ):
        save_weights(tmp_path, {"a": torch.zeros(2)}, {})
    assert os.listdir(tmp_path) == []
