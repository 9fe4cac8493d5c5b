"""The study's control: MONAI's masked autoencoder, trained by the plan of a run and brought into our UNETR."""

from pathlib import Path

import pytest
import torch
from benchmark_modules import benchmark
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words

from mimscale.config import config_yaml, load_config
from mimscale.errors import ConfigError
from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.transfer import load_encoder, load_weights
from mimscale.models.unetr import Unetr
from mimscale.models.vit import Vit
from mimscale.train.config import PretrainConfig
from mimscale.train.run_dir import RunDir

CROP, PATCH = (16, 24, 32), (4, 8, 8)


def run_with(tmp_path: Path, *more: str) -> Path:
    """The directory of a run of ours, as far as the control reads it: its config."""
    write_store(tmp_path / "store", SHAPES)
    model = ("model={dim: 24, depth: 2, heads: 2}", "micro_batch=8", "optim={lr: 3e-3, warmup_steps: 2}")
    words = pretrain_words(tmp_path / "store", tmp_path / "run", *model, *more)
    config = load_config(PretrainConfig, words[1], words[2:])
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(config_yaml(config))
    return run.path


def test_the_control_learns_and_all_of_its_encoder_arrives_in_our_unetr(tmp_path):
    losses = benchmark("pretrain_monai_mae").pretrain(run_with(tmp_path, "steps=80"), tmp_path / "weights")

    assert len(losses) == 80
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), losses
    tensors, contract = load_weights(tmp_path / "weights")
    vit = VitConfig(dim=24, depth=2, heads=2, positions="learned")
    unetr = Unetr(vit, UnetrConfig(num_classes=3, feature_size=4), crop_voxels=CROP, patch_voxels=PATCH, channels=1)
    report = load_encoder(unetr, tensors, contract)
    assert report.is_complete
    assert not report.adapted


def test_our_encoder_has_the_features_of_the_controls_when_its_class_token_is_left_out(tmp_path):
    module = benchmark("pretrain_monai_mae")
    words = pretrain_words(tmp_path, tmp_path / "run", "model={dim: 24, depth: 2, heads: 2}", "micro_batch=8")
    config = load_config(PretrainConfig, words[1], words[2:])
    torch.manual_seed(3)
    model = module.MonaiMae(config, channels=1).eval()
    imported = module.from_monai(model.encoder_tensors(), crop_voxels=CROP, patch_voxels=PATCH, heads=2, axes="zyx")
    ours = Vit(VitConfig(**imported.model), crop_voxels=CROP, patch_voxels=PATCH, channels=1).eval()
    ours.load_state_dict({name.removeprefix("encoder."): value for name, value in imported.tensors.items()})
    image = torch.randn(2, 1, *CROP)

    theirs = model.network.blocks(model.network.patch_embedding(image))

    torch.testing.assert_close(ours(image)[0], theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("word", "named"),
    [("mask.style=block", "mask.style"), ("micro_batch=2", "micro_batch=2"), ("method=simmim", "method")],
)
def test_a_plan_that_monais_network_cannot_follow_is_refused(tmp_path, word, named):
    with pytest.raises(ConfigError, match=named):
        benchmark("pretrain_monai_mae").pretrain(run_with(tmp_path, word), tmp_path / "weights")
