"""Weights that go to MONAI's ViT and UNETR, or come from them, give the same features there and here."""

import dataclasses

import pytest
import torch
from monai.networks.nets import UNETR
from monai.networks.nets.vit import ViT

from mimscale.config import config_tree
from mimscale.models.config import VitConfig
from mimscale.models.monai_names import from_monai, to_monai
from mimscale.models.vit import Vit

CROP, PATCH, CHANNELS = (8, 16, 48), (4, 8, 16), 2  # Z, Y, X: no two alike, so a swap of axes shows
GRID = tuple(crop // patch for crop, patch in zip(CROP, PATCH, strict=True))
VIT = VitConfig(dim=48, depth=3, heads=4, positions="learned")
# fp32, three blocks of sums over up to 1024 terms, which a convolution adds in another order: some 1e-6 on values of 1.
TOLERANCE = 5e-5


def ours_of(vit=VIT):
    torch.manual_seed(0)
    encoder = Vit(vit, crop_voxels=CROP, patch_voxels=PATCH, channels=CHANNELS)
    for parameter in encoder.parameters():  # biases and norms too, so that nothing is equal by being 0 or 1
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def contract_of(encoder):
    return {
        "model": config_tree(encoder.config),
        "crop_voxels": list(CROP),
        "patch_voxels": list(PATCH),
        "channels": CHANNELS,
    }


def theirs_of(axes, proj_type, *, qkv_bias=True, kind="learnable"):
    turn = -1 if axes == "xyz" else 1
    torch.manual_seed(1)
    encoder = ViT(
        CHANNELS, CROP[::turn], PATCH[::turn], 48, 96, 3, 4, proj_type=proj_type, pos_embed_type=kind, qkv_bias=qkv_bias
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def their_tokens(encoder, volume, axes):
    """Features [B, L, D] in our order of patches, of a volume [B, C, Z, Y, X]."""
    if axes == "zyx":
        return encoder(volume)[0]
    tokens = encoder(volume.permute(0, 1, 4, 3, 2))[0]
    return tokens.reshape(len(volume), *GRID[::-1], -1).permute(0, 3, 2, 1, 4).flatten(1, 3)


@torch.no_grad()
@pytest.mark.parametrize("axes", ["xyz", "zyx"])
@pytest.mark.parametrize("changes", [{}, {"positions": "sincos"}, {"layer_scale": 0.5}, {"mlp_ratio": 2.5}], ids=str)
def test_our_encoder_gives_its_features_as_monais_vit(changes, axes):
    ours = ours_of(dataclasses.replace(VIT, **changes))
    tensors = {f"encoder.{name}": value for name, value in ours.state_dict().items()}
    turn = -1 if axes == "xyz" else 1
    hidden = int(48 * ours.config.mlp_ratio)
    theirs = ViT(CHANNELS, CROP[::turn], PATCH[::turn], 48, hidden, 3, 4, qkv_bias=True)
    theirs.load_state_dict(to_monai(tensors, contract_of(ours), axes))  # strict
    volume = torch.randn(2, CHANNELS, *CROP)
    assert torch.allclose(their_tokens(theirs, volume, axes), ours(volume)[0], atol=TOLERANCE)


@torch.no_grad()
def test_our_encoder_is_the_vit_of_monais_unetr_whose_hidden_states_are_ours():
    torch.manual_seed(0)
    vit, crop = dataclasses.replace(VIT, dim=24, heads=2, depth=12), (16, 32, 48)
    ours = Vit(vit, crop_voxels=crop, patch_voxels=(16, 16, 16), channels=1)
    contract = contract_of(ours) | {"crop_voxels": list(crop), "patch_voxels": [16, 16, 16], "channels": 1}
    unetr = UNETR(1, 2, crop[::-1], feature_size=4, hidden_size=24, mlp_dim=96, num_heads=2, qkv_bias=True)
    unetr.vit.load_state_dict(
        to_monai({f"encoder.{name}": value for name, value in ours.state_dict().items()}, contract)
    )
    volume = torch.randn(1, 1, *crop)
    tokens, states = ours(volume, keep=range(1, 13))
    expected, expected_states = unetr.vit(volume.permute(0, 1, 4, 3, 2))
    for mine, other in zip([tokens, *states], [expected, *expected_states], strict=True):
        turned = other.reshape(1, 3, 2, 1, 24).permute(0, 3, 2, 1, 4).flatten(1, 3)
        assert torch.allclose(mine, turned, atol=TOLERANCE)


def loaded(imported):
    encoder = Vit(VitConfig(**imported.model), crop_voxels=CROP, patch_voxels=PATCH, channels=imported.channels)
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in imported.tensors.items()})
    return encoder


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # in MONAI's sin-cos table
@pytest.mark.parametrize("axes", ["xyz", "zyx"])
@pytest.mark.parametrize(
    ("proj_type", "qkv_bias", "kind"),
    [("conv", True, "learnable"), ("perceptron", False, "learnable"), ("conv", False, "sincos")],
)
def test_monais_vit_gives_its_features_as_our_encoder(proj_type, qkv_bias, kind, axes):
    theirs = theirs_of(axes, proj_type, qkv_bias=qkv_bias, kind=kind)
    imported = from_monai(theirs.state_dict(), crop_voxels=CROP, patch_voxels=PATCH, heads=4, axes=axes)
    assert imported.channels == CHANNELS
    assert all(".norm_cross_attn." in name for name in imported.unused)
    volume = torch.randn(2, CHANNELS, *CROP)
    assert torch.allclose(loaded(imported)(volume)[0], their_tokens(theirs, volume, axes), atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.encoder.", "vit."])
def test_the_encoder_is_found_inside_a_masked_autoencoder_and_a_unetr(prefix):
    theirs = theirs_of("xyz", "perceptron", qkv_bias=False)
    encoder = theirs.state_dict()
    tensors = {prefix + name: value for name, value in encoder.items()}
    tensors |= {f"{prefix}blocks.{block}.cross_attn.to_q.weight": torch.zeros(48, 48) for block in range(3)}
    around = {"model.mask_token": torch.zeros(8), "model.decoder_blocks.0.norm1.weight": torch.zeros(8)}
    around["model.patch_to_emb.weight"] = encoder["patch_embedding.patch_embeddings.1.weight"]
    imported = from_monai(tensors | around, crop_voxels=CROP, patch_voxels=PATCH, heads=4)
    strange = [name for name in imported.unused if "cross_attn" not in name]
    assert sorted(strange) == sorted(around)
    volume = torch.randn(1, CHANNELS, *CROP)
    assert torch.allclose(loaded(imported)(volume)[0], their_tokens(theirs, volume, "xyz"), atol=TOLERANCE)


def test_what_went_to_monai_comes_back_bit_for_bit():
    ours = ours_of()
    tensors = {f"encoder.{name}": value for name, value in ours.state_dict().items()}
    back = from_monai(to_monai(tensors, contract_of(ours)), crop_voxels=CROP, patch_voxels=PATCH, heads=4)
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], value) for name, value in tensors.items())
    assert back.model == config_tree(ours.config)
