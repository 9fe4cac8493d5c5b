import pytest

from mimscale.config import build_config, config_tree
from mimscale.errors import ConfigError
from mimscale.models.config import (
    MaeConfig,
    MaskConfig,
    SimclrConfig,
    SimmimConfig,
    UnetrConfig,
    VitConfig,
    mask_grid,
    patch_grid,
    unetr_halvings,
)


@pytest.mark.parametrize(
    "config",
    [VitConfig(), MaskConfig(), MaeConfig(), SimmimConfig(), SimclrConfig(), UnetrConfig(num_classes=3)],
    ids=type,
)
def test_a_config_survives_its_own_yaml_tree(config):
    assert build_config(type(config), config_tree(config), "test") == config


@pytest.mark.parametrize(
    ("kind", "tree", "message"),
    [
        (VitConfig, {"dim": 100, "heads": 12}, "model.dim=100 must be a multiple of model.heads=12"),
        (VitConfig, {"depth": -1}, "model.depth=-1: must be 0 (no transformer) or above"),
        (VitConfig, {"drop_path": 1.0}, "model.drop_path=1.0: must be at least 0 and below 1"),
        (VitConfig, {"layer_scale": 0.0}, "model.layer_scale=0.0: must be above 0"),
        (VitConfig, {"positions": "rope", "dim": 16, "heads": 4}, "use fewer heads"),
        (
            VitConfig,
            {"positions": "sine"},
            "positions: Input should be 'sincos', 'learned', 'rope' or 'rope_learned', got 'sine'",
        ),
        (MaskConfig, {"ratio": 1.0}, "mask.ratio=1.0: must be above 0 and below 1"),
        (MaskConfig, {"ratio_range": [0.9, 0.6]}, r"mask.ratio_range=[0.9, 0.6]: the first number"),
        (MaskConfig, {"unit_voxels": [8, 0, 8]}, "mask.unit_voxels=(8, 0, 8): must be above 0"),
        (MaskConfig, {"style": "blocks"}, "style: Input should be 'random', 'block' or 'grid', got 'blocks'"),
        (MaskConfig, {"predicted_share": 0.0}, "mask.predicted_share=0.0: must be above 0 and at most 1"),
        (MaskConfig, {"repeats": 0}, "mask.repeats=0: must be above 0"),
        (MaeConfig, {"decoder_depth": -1}, "mae.decoder_depth=-1: must be 0 (linear) or above"),
        (SimclrConfig, {"temperature": 0.0}, "simclr.temperature=0.0: must be above 0"),
        (MaeConfig, {"decoder_dim": 64, "decoder_heads": 6}, "mae.decoder_dim=64 must be a multiple of"),
        (UnetrConfig, {"num_classes": 1}, "unetr.num_classes=1: must be at least 2, background included"),
    ],
)
def test_a_wrong_value_is_refused_by_name(kind, tree, message):
    with pytest.raises(ConfigError) as error:
        build_config(kind, tree, "recipe.yaml")
    assert message in str(error.value)


def test_a_grid_counts_patches_of_each_axis():
    assert patch_grid((32, 96, 64), (4, 16, 16)) == (8, 6, 4)


def test_a_mask_unit_must_be_made_of_whole_patches():
    with pytest.raises(
        ValueError, match=r"mask.unit_voxels=\[8, 24, 24\] is no multiple of patch_voxels=\[8, 16, 16\]"
    ):
        mask_grid((32, 96, 96), (8, 16, 16), MaskConfig(unit_voxels=(8, 24, 24)))


def test_a_crop_must_be_made_of_whole_mask_units():
    with pytest.raises(
        ValueError, match=r"crop_voxels=\[48, 48, 48\] is no multiple of mask.unit_voxels=\[32, 32, 32\]"
    ):
        mask_grid((48, 48, 48), (16, 16, 16), MaskConfig(unit_voxels=(32, 32, 32)))


def test_a_single_mask_unit_is_refused_because_nothing_would_stay_visible():
    with pytest.raises(ValueError, match="nothing would stay visible"):
        mask_grid((16, 16, 16), (16, 16, 16), MaskConfig())


def test_unetr_takes_only_powers_of_two():
    assert unetr_halvings((4, 16, 16)) == (2, 4, 4)
    assert unetr_halvings((1, 8, 8)) == (0, 3, 3)
    for patch in ((12, 16, 16), (1, 1, 1)):
        with pytest.raises(ValueError, match="UNETR doubles the resolution level by level"):
            unetr_halvings(patch)
