"""Methods and heads by name, the keys that they bring, and what is counted for one without formulas."""

import math
from dataclasses import fields, replace

import pytest
from fill_method import METHOD, ConvConfig

from mimscale.config import build_config, config_tree, load_config, tree_hash
from mimscale.errors import ConfigError
from mimscale.models.config import TargetConfig, VitConfig
from mimscale.models.flops import Flops
from mimscale.train.config import FREE_KEYS, FinetuneConfig, PretrainConfig
from mimscale.train.counted import counted
from mimscale.train.method import _with_keys_of, find_head, find_method, packaged, predicts_voxels, title_of
from mimscale.train.size import count_parameters, run_flops, visible_patches

OWN = "fill_method:METHOD"
SHAPE = {"steps": 1, "global_batch": 2, "micro_batch": 1, "crop_voxels": [16, 16, 16], "patch_voxels": [4, 4, 4]}
PLACES = {"store": "s", "run_dir": "r"}
# Of the configs of runs that began before: such a run goes on only where all but the free keys stays as it is.
HASHES = {
    "demo/finetune": "5a9a39fa23b992b3",
    "demo/pretrain": "181c872d960bac59",
    "finetune_linear_probe": "85da20035ccc9b4a",
    "finetune_unetr": "3b263cb2808e1ea4",
    "pretrain_mae_vit_b": "57266e1a3e873f46",
    "pretrain_simclr_vit_b": "55ef087d651aee9b",
    "pretrain_simmim_vit_b": "446f5dcb66ad44d7",
}


def own(**changes) -> PretrainConfig:
    return build_config(PretrainConfig, {**PLACES, **SHAPE, "method": OWN, **changes}, "test")


@pytest.mark.parametrize("recipe", HASHES)
def test_runs_that_began_before_go_on(recipe):
    kind = PretrainConfig if "pretrain" in recipe else FinetuneConfig
    tree = config_tree(load_config(kind, recipe, ["store=s", "run_dir=r"]))
    assert "engine.compile_blocks" in FREE_KEYS  # so its default may have become another
    tree["engine"]["compile_blocks"] = False
    assert tree_hash(tree) == HASHES[recipe]


def test_every_packaged_name_finds_itself():
    assert {"mae", "simmim", "simclr"} <= set(packaged("method"))
    assert {"unetr", "linear"} <= set(packaged("head"))
    assert all(find_method(name).name == name for name in packaged("method"))
    assert all(find_head(name).name == name for name in packaged("head"))


def test_a_head_for_targets_has_their_block_and_no_keys_of_segmentation():
    words = ["store=s", "run_dir=r", "targets.table=t.csv", "targets.classify=[a]"]
    for recipe in ("finetune_targets", "finetune_targets_swin", "finetune_targets_resenc"):
        config = load_config(FinetuneConfig, recipe, words)
        assert (config.overlay, config.regions, config.unetr) == (None, None, None)
        assert not config.network.segments
        assert isinstance(config.model, config.network.model)
        # Of the same class, however often a tree goes through it: a network is counted from such a tree.
        assert build_config(type(config), config_tree(config), "again") == config
        assert build_config(FinetuneConfig, config_tree(config), "again") == config


def test_a_method_of_another_file_brings_its_own_keys():
    config = own(model={"width": 4}, fill={"loss": "l2"})
    assert isinstance(config, PretrainConfig)
    assert config.network is METHOD
    assert config.model == ConvConfig(width=4)
    assert config.target == TargetConfig(loss="l2")
    assert build_config(PretrainConfig, config_tree(config), "again") == config
    assert {field.name for field in fields(config)} == {field.name for field in fields(PretrainConfig)} | {"fill"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "simmin"}, r"method=simmin: no such method; did you mean simmim\?; packaged are"),
        ({"method": "nowhere:METHOD"}, "nowhere cannot be imported .*; install it, or add its folder to PYTHONPATH"),
        ({"method": "fill_method:Fill"}, "fill_method has no Method called Fill"),
        ({"model": {"dim": 24}}, "model.dim: no such key"),
        ({"model": {"widht": 24}}, "did you mean model.width\\?"),
        ({"fill": {"loss": "l3"}}, "fill.loss: Input should be 'l1' or 'l2', got 'l3'"),
        ({"method": "mae", "fill": {}}, "fill: no such key"),
    ],
)
def test_a_wrong_method_or_key_is_named_with_the_way_out(changes, message):
    with pytest.raises(ConfigError, match=message):
        own(**changes)


def test_a_method_cannot_take_the_name_of_another_key(monkeypatch):
    monkeypatch.setattr(type(METHOD), "name", "mask")
    _with_keys_of.cache_clear()
    with pytest.raises(ConfigError, match="mask: is a key of every run"):
        own()


def test_a_wrong_head_is_named_with_the_way_out():
    with pytest.raises(ConfigError, match=r"head=unet: no such head; did you mean unetr\?"):
        load_config(FinetuneConfig, "finetune_unetr", ["store=s", "run_dir=r", "head=unet"])


def test_a_report_asks_without_needing_the_method_to_be_there():
    assert title_of("method", OWN) == "CNN that fills in hidden voxels"
    assert title_of("method", "gone:METHOD") == "gone:METHOD"
    assert predicts_voxels({"method": OWN})
    assert predicts_voxels({})
    assert not predicts_voxels({"method": "simclr"})
    assert not predicts_voxels({"method": "gone:METHOD"})


def test_what_has_no_formula_is_counted():
    config = own(model={"width": 4})
    assert count_parameters(config) == 4 * 125 + 4 + 4 + 1
    voxels = 16**3
    products = 2 * voxels * (4 * 125 + 4)  # the image needs no gradient: its convolution runs backward only once
    assert run_flops(config)["network"] == Flops(forward=products, backward=products + 2 * voxels * 4)
    # The image without what is hidden, the features behind their bend and the prediction; of hidden patches, where they
    # are, the error and which numbers of it count; and a few numbers.
    patch = math.prod(config.patch_voxels)
    hidden = voxels // patch - visible_patches(config, config.mask.ratio)
    kept = config.network.activations(config, 4, 1).kept
    assert 0 <= kept - 4 * voxels * (1 + 4 + 1) - hidden * (8 + patch * (4 + 1)) < 100


VIT = VitConfig(dim=48, depth=3, heads=4)
RECIPES = {
    "mae": (PretrainConfig, {"mae": {"decoder_dim": 24, "decoder_heads": 2}}),
    "mae, recomputed": (PretrainConfig, {"model": {"checkpoint_activations": True}}),
    "simmim": (PretrainConfig, {"method": "simmim"}),
    "unetr": (FinetuneConfig, {"unetr": {"num_classes": 3, "feature_size": 4}}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_counted_is_what_the_formulas_say(name):
    kind, changes = RECIPES[name]
    model = {"dim": 48, "depth": 3, "heads": 4, **changes.get("model", {})}
    shape = {**SHAPE, "crop_voxels": [32, 32, 32], "patch_voxels": [8, 8, 8]}
    config = build_config(kind, {**PLACES, **shape, **changes, "model": model}, "test")
    seen = counted(config, 2)
    assert sorted(seen.parameter_sizes) == sorted(config.network.parameter_sizes(config, 2))
    said = sum(run_flops(config, 2).values(), start=Flops(forward=0, backward=0))
    assert seen.flops.forward == said.forward
    assert seen.flops.training == pytest.approx(said.training, rel=1e-3)
    for width in (2, 4):
        formula = config.network.activations(config, width, 2)
        # What a convolution keeps of the image counts here, and by formula with the batch.
        assert seen.activations(width).kept == pytest.approx(formula.kept, rel=0.08)
    assert replace(config, seed=1).network is config.network
