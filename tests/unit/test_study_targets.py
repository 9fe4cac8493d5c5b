"""What a run is to reach: the Dice of an arm that was validated on the same, by the same plan."""

from types import SimpleNamespace

import pytest
from small_study import study_tree

from mimscale.config import build_config
from mimscale.study.comparisons import comparisons
from mimscale.study.config import StudyConfig
from mimscale.study.graph import Trial
from mimscale.study.results import Group, Result
from mimscale.study.statistics import Time
from mimscale.study.targets import race_targets
from mimscale.study.view import _section

STEPS = 40


def a_result(experiment, setting, arm, final, reached=STEPS, **config):
    """A run that ends at a validation Dice, and has it from a step on."""
    trial = Trial(
        experiment=experiment,
        setting=setting,
        arm=arm,
        pretrain_seed=None,
        finetune_seed=0,
        pretrain=None,
        finetune=f"{experiment} {setting} {arm}",
        evaluate="",
    )
    curve = [{"step": step, "val_dice": final if step >= reached else 0.0} for step in (10, 20, 30, STEPS)]
    run = SimpleNamespace(
        config={"store": "s", "steps": STEPS, "head": "unetr", **config}, validations=curve, percentile=lambda *_: None
    )
    return Result(trial=trial, run=run, pretraining=None, scores=None)


def a_group(experiment, setting, arm, *results):
    return Group(experiment=experiment, setting=setting, arm=arm, planned=len(results), results=results)


def groups_of(experiment, settings):
    """setting -> arm -> final, or final and config."""
    return [
        a_group(experiment, setting, arm, a_result(experiment, setting, arm, final, **config))
        for setting, arms in settings.items()
        for arm, (final, config) in arms.items()
    ]


def a_study(folder, **experiments):
    arms = {"scratch": {}, "simclr": {"pretrain": {}}, "mae": {"pretrain": {}}}
    tree = study_tree(folder, arms=arms, target={"arm": "scratch"}, experiments=experiments)
    return build_config(StudyConfig, tree, "test")


def two_settings(arms, **changes):
    return {"question": "?", "arms": arms, "settings": {"t1": {}, "flair": {}}, **changes}


def test_a_target_from_another_experiment_is_that_of_the_setting_of_the_same_name(tmp_path):
    config = a_study(tmp_path, contrasts=two_settings(["scratch"]), against=two_settings(["simclr", "mae"]))
    stores = {"t1": {"store": "t1"}, "flair": {"store": "flair"}}
    finals = {"t1": 0.8, "flair": 0.5}
    groups = groups_of("contrasts", {name: {"scratch": (finals[name], stores[name])} for name in stores})
    groups += groups_of(
        "against", {name: dict.fromkeys(("simclr", "mae"), (0.9, stores[name])) for name in ("flair", "t1")}
    )
    for group in groups[2:]:
        assert set(race_targets(config, groups, group, group).values()) == {finals[group.setting]}


def test_a_setting_of_the_same_volumes_is_no_setting_of_the_same_name(tmp_path):
    """All contrasts may be of one store, told apart by a filter: the name decides then."""
    config = a_study(tmp_path, contrasts=two_settings(["scratch"]), against=two_settings(["simclr", "mae"]))
    groups = groups_of("contrasts", {"t1": {"scratch": (0.8, {})}, "flair": {"scratch": (0.5, {})}})
    groups += groups_of("against", {"flair": {"mae": (0.9, {})}})
    assert set(race_targets(config, groups, groups[2], groups[2]).values()) == {0.5}


@pytest.mark.parametrize("other", [{"head": "linear"}, {"steps": 2 * STEPS}, {"optim": {"schedule": "frozen"}}])
def test_what_the_arm_ends_at_by_another_plan_is_no_target(tmp_path, other):
    config = a_study(tmp_path, probe=two_settings(["scratch"]), against=two_settings(["simclr", "mae"]))
    groups = groups_of("probe", {"t1": {"scratch": (0.3, other)}}) + groups_of("against", {"t1": {"mae": (0.9, {})}})
    assert race_targets(config, groups, groups[1], groups[1]) == {}


def test_settings_that_are_validated_on_other_crops_have_no_times_against_each_other(tmp_path):
    config = a_study(tmp_path, crop=two_settings(["scratch", "mae"]))
    crops = {"t1": {"crop_voxels": [96] * 3}, "flair": {"crop_voxels": [128] * 3}}
    groups = groups_of("crop", {name: {"scratch": (0.5, crops[name]), "mae": (0.6, crops[name])} for name in crops})
    found = {(one.ours.name, one.theirs.name): one for one in comparisons(config, "crop", groups)}
    for arm in ("scratch", "mae"):
        across = found[f"{arm}, flair", f"{arm}, t1"]
        assert (across.steps.ratio.value, across.ours_times) == (None, [])
    within = found["mae, flair", "scratch, flair"]
    assert within.steps.ratio.value == 1.0
    rows = {tuple(row[:2]): row[2] for row in _section(config, "crop", groups, []).tables[2].rows}
    assert rows == {(arm, name): "0.500" for arm in ("scratch", "mae") for name in ("t1", "flair")}


def test_each_fold_has_the_target_of_its_own_volumes(tmp_path):
    config = a_study(tmp_path, folds=two_settings(["scratch", "mae"], pool_settings=True))
    folds = {"t1": (0.8, {"stream": {"fold": "0/2"}}), "flair": (0.4, {"stream": {"fold": "1/2"}})}
    groups = [
        a_group(
            "folds", "", arm, *(a_result("folds", name, arm, final, 20, **own) for name, (final, own) in folds.items())
        )
        for arm in ("scratch", "mae")
    ]
    targets = race_targets(config, groups, groups[0], *groups)
    assert {(trial.arm, trial.setting): dice for trial, dice in targets.items()} == {
        (arm, name): final for arm in ("scratch", "mae") for name, (final, _) in folds.items()
    }
    assert (
        groups[1].times(targets) == [Time(value=20, censored=False)] * 2
    )  # with one mean, 0.6, the hard one never would
    section = _section(config, "folds", groups, [])
    assert {row[2] for row in section.tables[2].rows} == {"0.400 to 0.800"}
    assert section.target == pytest.approx(0.6)
