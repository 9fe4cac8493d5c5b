"""The light head on a ViT."""

import torch

from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.primus import ChannelNorm, Primus, head_widths

VIT = VitConfig(dim=24, depth=1, heads=2, positions="rope_learned", mlp="swiglu", layer_scale=0.1)


def primus(patch=(8, 8, 8), channels=1):
    torch.manual_seed(0)
    return Primus(VIT, UnetrConfig(num_classes=3), crop_voxels=(16, 16, 32), patch_voxels=patch, channels=channels)


def test_there_is_a_score_for_every_voxel_whatever_the_patch():
    for patch in ((8, 8, 8), (2, 8, 16), (1, 4, 4)):
        assert primus(patch, 2)(torch.randn(2, 2, 16, 16, 32)).shape == (2, 3, 16, 16, 32)


def test_a_voxel_is_scored_by_its_own_token_alone():
    model = primus()
    tokens = torch.randn(1, 24, 2, 2, 4)
    other = tokens.clone()
    other[..., 0, 1, 2] += 1
    with torch.no_grad():
        changed = (model.out(model.up_steps(other)) != model.out(model.up_steps(tokens))).any(dim=1)[0]
    expected = torch.zeros(16, 16, 32, dtype=torch.bool)
    expected[0:8, 8:16, 16:24] = True
    assert torch.equal(changed, expected)


def test_each_step_leaves_the_same_share_of_the_channels():
    assert head_widths(864, 14, 3) == [864, 272, 88, 14]
    assert head_widths(24, 3, 1) == [24, 3]


def test_the_norm_is_over_channels_of_one_voxel():
    features = torch.randn(2, 8, 3, 4, 5)
    out = ChannelNorm(8)(features)
    torch.testing.assert_close(out[1, :, 2, 3, 4], torch.nn.functional.layer_norm(features[1, :, 2, 3, 4], (8,)))


def test_every_weight_is_trained_and_the_prior_has_its_place():
    model = primus()
    model(torch.randn(1, 1, 16, 16, 32)).square().mean().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert model.output_bias.shape == (3,)
    assert "encoder.positions" in dict(model.named_parameters())
