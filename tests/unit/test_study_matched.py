"""An arm that gets as much time as another, instead of as many crops."""

import json

import pytest
from fake_runs import fake_run
from small_study import study_tree

from mimscale.config import build_config
from mimscale.errors import ConfigError
from mimscale.study.config import StudyConfig
from mimscale.study.graph import expand
from mimscale.study.matched import is_matched
from mimscale.study.nodes import resolve

ARMS = {
    "scratch": {},
    "simclr": {"pretrain": {"mask": {"ratio": 0.5}}},
    "simclr, same time": {"pretrain": {"mask": {"ratio": 0.5}}, "same_time_as": "mae"},
    "mae": {"pretrain": {}},
}


def config_of(folder, arms=ARMS, **changes):
    experiments = {"main": {"question": "?", "arms": list(arms)}}
    tree = study_tree(folder, data={"store": {"path": "/store"}}, arms=arms, experiments=experiments, **changes)
    tree["pretrain"]["config"] |= {"steps": 400, "optim": {"warmup_steps": 40}}
    return build_config(StudyConfig, tree, "test")


def measured(run_dir, step_s, steps=400):
    """A finished run of that many steps of that length."""
    fake_run(run_dir, "pretrain", steps=steps)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "step_s": step_s} if "step_s" in line else line for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_it_waits_for_the_other_arm_and_for_its_own_run_with_as_many_crops_and_shares_both(tmp_path):
    graph = expand(config_of(tmp_path))
    by_label = {node.label: node for node in graph.nodes.values()}
    node = by_label["pretrain simclr, same time, seed 0"]
    pretrained = {trial.arm: trial.pretrain for trial in graph.trials}
    assert set(node.parents) == {pretrained["simclr"], pretrained["mae"]}
    assert node.waits_for_results
    assert [one.label for one in graph.nodes.values() if is_matched(one.config)] == [node.label]
    # Where the study has no such run of its own, it is added.
    alone = expand(config_of(tmp_path, {name: arm for name, arm in ARMS.items() if name != "simclr"}))
    assert {one.id for one in alone.nodes.values() if one.verb == "pretrain"} == {
        one.id for one in graph.nodes.values() if one.verb == "pretrain"
    }


def test_its_steps_are_those_that_fit_into_the_time_that_was_measured_and_its_warm_up_shrinks_with_them(tmp_path):
    graph = expand(config_of(tmp_path))
    pretrained = {trial.arm: graph.nodes[trial.pretrain] for trial in graph.trials if trial.pretrain}
    node = pretrained["simclr, same time"]
    before = resolve(graph, tmp_path, node)
    assert (before.steps, before.optim.warmup_steps) == (400, 40)  # nothing is measured yet
    measured(graph.folder(tmp_path, pretrained["mae"]), step_s=0.1)
    assert resolve(graph, tmp_path, node).steps == 400
    measured(graph.folder(tmp_path, pretrained["simclr"]), step_s=0.25)
    after = resolve(graph, tmp_path, node)
    assert (after.steps, after.optim.warmup_steps) == (160, 16)  # 400 x 0.1 s / 0.25 s
    # Everything else is as in the run with as many crops.
    own = resolve(graph, tmp_path, pretrained["simclr"])
    assert (after.mask, after.model, after.global_batch, after.seed) == (
        own.mask,
        own.model,
        own.global_batch,
        own.seed,
    )


def test_each_pretraining_seed_has_the_time_of_its_own_seed(tmp_path):
    graph = expand(config_of(tmp_path, pretrain_seeds=[0, 1]))
    nodes = [node for node in graph.nodes.values() if is_matched(node.config)]
    assert len(nodes) == 2
    for node, seed in zip(nodes, (0, 1), strict=True):
        assert {graph.nodes[parent].config["seed"] for parent in node.parents} == {seed}


@pytest.mark.parametrize(
    "arms",
    [
        {**ARMS, "simclr, same time": {"same_time_as": "mae"}},
        {**ARMS, "simclr, same time": {"pretrain": {}, "same_time_as": "scratch"}},
        {**ARMS, "simclr, same time": {"pretrain": {}, "same_time_as": "moco"}},
        {**ARMS, "simclr, same time": {"pretrain": {}, "same_time_as": "simclr, same time"}},
    ],
)
def test_only_the_time_of_another_pretrained_arm_can_be_given(tmp_path, arms):
    with pytest.raises(ConfigError, match=r"arms\.simclr, same time\.same_time_as=.*must both be pretrained"):
        config_of(tmp_path, arms)
