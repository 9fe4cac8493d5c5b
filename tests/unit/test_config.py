from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mimscale import config
from mimscale.cli import main, usage
from mimscale.errors import ConfigError
from mimscale.train.config import PretrainConfig

COMPLETE = """
store: /data/store
run_dir: /runs/a
steps: 10
global_batch: 4
micro_batch: 2
crop_voxels: [32, 32, 32]
patch_voxels: [8, 8, 8]
"""


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1.0

    def __post_init__(self) -> None:
        config.require_positive("inner", lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 1
    inner: Inner = field(default_factory=Inner)


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_every_mistake_is_named_at_once_with_its_full_key(tmp_path):
    path = recipe(tmp_path, "name: 3\ncount: many\ninner: {lr: fast, colour: red}\n")
    with pytest.raises(ConfigError) as caught:
        config.load_config(Outer, path)
    message = str(caught.value)
    assert "4 problem(s)" in message
    assert all(key in message for key in ("  name:", "  count:", "  inner.lr:", "  inner.colour:"))
    assert "'many'" in message


def test_an_unknown_key_comes_with_the_one_that_was_meant_or_with_those_that_there_are():
    with pytest.raises(ConfigError) as caught:
        config.load_config(PretrainConfig, None, ["optim.warm_up_steps=3", "model.colour=red", "zzz=1"])
    message = str(caught.value)
    assert "optim.warm_up_steps: no such key, got 3; did you mean optim.warmup_steps?" in message
    assert "model.colour: no such key, got 'red'\n" in message
    assert "\n  keys of model: drop_path, checkpoint_activations, dim, depth, heads" in message
    assert "\n  keys at the top: store, run_dir" in message


def test_a_missing_key_says_how_to_give_it_and_a_rule_speaks_for_itself():
    with pytest.raises(ConfigError) as caught:
        config.load_config(Outer, None, ["inner.lr=-1"])
    assert str(caught.value).splitlines()[1:] == [
        "  name: missing; write it into the recipe, or give name=VALUE",
        "  inner: inner.lr=-1.0: must be above 0",
    ]


def test_a_rule_of_a_class_names_its_value():
    with pytest.raises(ConfigError, match=r"inner\.lr=-1\.0: must be above 0"):
        config.load_config(Outer, None, ["name=a", "inner.lr=-1"])


def test_overrides_win_and_one_e_minus_four_is_a_number(tmp_path):
    path = recipe(tmp_path, "name: a\ninner:\n  lr: 1e-4\n")
    assert config.load_config(Outer, path).inner.lr == 1e-4
    assert config.load_config(Outer, path, ["inner.lr=2e-3", "count=7"]) == Outer(
        name="a", count=7, inner=Inner(lr=2e-3)
    )


def test_an_override_keeps_a_glob_as_it_is():
    assert config.load_config(Outer, None, ["name=*.nii.gz"]).name == "*.nii.gz"


def test_an_override_below_a_plain_value_is_refused(tmp_path):
    path = recipe(tmp_path, "name: a\ncount: 2\n")
    with pytest.raises(ConfigError, match="count holds 2, which has no field below it"):
        config.load_config(Outer, path, ["count.x=1"])


def test_the_resolved_config_reads_back_equal(tmp_path):
    first = config.load_config(PretrainConfig, recipe(tmp_path, COMPLETE), ["optim.lr=3e-5", "mask.ratio=0.6"])
    again = config.load_config(PretrainConfig, recipe(tmp_path, config.config_yaml(first)))
    assert again == first


def test_an_unknown_recipe_lists_the_packaged_ones():
    with pytest.raises(ConfigError, match=r"no packaged recipe; packaged are: .*demo/pretrain"):
        config.load_config(PretrainConfig, "no_such_recipe")


def test_broken_yaml_and_a_list_at_the_top_are_config_errors(tmp_path):
    for text in ("a: [1, 2", "- a\n- b\n"):
        with pytest.raises(ConfigError, match=r"recipe\.yaml"):
            config.load_config(Outer, recipe(tmp_path, text))


def test_differing_keys_show_both_values():
    lines = config.differing_keys({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}, "e": 6})
    assert lines == ["b.c: 2 -> 5", "e: None -> 6"]


def test_words_with_an_equals_sign_are_overrides_and_paths_are_not():
    named = "arms.mae, own rate.note=x"
    positional, overrides = config.split_arguments(["demo/pretrain", "a.b=1", "/x/y=z", named, "a.b/c=d"])
    assert (positional, overrides) == (["demo/pretrain", "/x/y=z", "a.b/c=d"], ["a.b=1", named])


def test_every_packaged_recipe_has_a_description_and_is_printed(capsys):
    names = config.recipe_names()
    assert {"demo/ingest", "demo/pretrain", "demo/finetune"} <= names.keys()
    assert all(len(line) > 10 for line in names.values())
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names)
    assert main(["recipes", "demo/pretrain"]) == 0
    assert "crop_voxels" in capsys.readouterr().out


def test_a_text_that_looks_like_a_number_stays_a_text_in_the_resolved_config():
    text = config.tree_yaml({"site": ["1e5", "2.5E-3", "yes", "07"], "lr": 1e-5})
    assert config.parse_yaml(text, "test") == {"site": ["1e5", "2.5E-3", "yes", "07"], "lr": 1e-5}


def test_check_prints_the_resolved_config_and_starts_nothing(tmp_path, capsys):
    assert main(["pretrain", recipe(tmp_path, COMPLETE), "steps=7", "--check"]) == 0
    assert "steps: 7" in capsys.readouterr().out


def test_a_typo_in_a_recipe_ends_with_exit_code_2_and_its_name(tmp_path, capsys):
    assert main(["pretrain", recipe(tmp_path, COMPLETE), "optim.learning_rate=1", "--check"]) == 2
    assert "optim.learning_rate: " in capsys.readouterr().err


def test_a_crop_that_does_not_divide_into_patches_is_refused_before_anything_starts(tmp_path, capsys):
    assert main(["pretrain", recipe(tmp_path, COMPLETE), "patch_voxels=[8, 8, 12]", "--check"]) == 2
    assert "is no multiple of patch_voxels" in capsys.readouterr().err


def test_an_unknown_verb_lists_the_verbs(capsys):
    assert main(["pretran"]) == 2
    assert "pretrain" in capsys.readouterr().err
    assert "pretrain" in usage()
