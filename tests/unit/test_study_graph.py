import re

import pytest
import yaml
from rich.console import Console
from small_study import study_tree

from mimscale import console
from mimscale.cli import main
from mimscale.config import build_config
from mimscale.errors import ConfigError
from mimscale.study.config import StudyConfig, load_study
from mimscale.study.graph import expand
from mimscale.study.nodes import resolve
from mimscale.study.view import NodeState, study_view


def graph_of(folder, **changes):
    return expand(build_config(StudyConfig, study_tree(folder, **changes), "test"))


def verbs(graph):
    found = {}
    for node in graph.nodes.values():
        found[node.verb] = found.get(node.verb, 0) + 1
    return found


def experiment(arms=("scratch", "mae"), **more):
    return {"question": "?", "arms": list(arms), **more}


def test_a_study_is_every_arm_with_every_seed_and_each_node_once(tmp_path):
    graph = graph_of(tmp_path, pretrain_seeds=[0, 1, 2], finetune_seeds=[0, 1])
    # From scratch there is no pretraining seed: 2 runs; of the pretrained arm 3 x 2.
    assert verbs(graph) == {"cohort": 1, "ingest": 1, "pretrain": 3, "finetune": 2 + 6, "evaluate": 2 + 6}
    assert len(graph.trials) == 8


def test_parents_come_first_and_scores_lie_in_the_run_that_they_are_of(tmp_path):
    graph = graph_of(tmp_path)
    seen = set()
    for node in graph.nodes.values():
        assert seen.issuperset(node.parents)
        seen.add(node.id)
    trial = graph.trials[-1]
    assert trial.pretrain in graph.nodes[trial.finetune].parents
    evaluate = graph.nodes[trial.evaluate]
    assert graph.config_of(tmp_path, evaluate)["run_dir"] == str(tmp_path / "nodes" / trial.finetune)


def test_two_experiments_share_the_nodes_that_are_the_same(tmp_path):
    masks = {"0.75": {"pretrain.mask.ratio": 0.75}, "0.5": {"pretrain.mask.ratio": 0.5}}
    one = graph_of(tmp_path, pretrain={**study_tree(tmp_path)["pretrain"], "recipe": "demo/pretrain"})
    both = graph_of(
        tmp_path,
        pretrain={**study_tree(tmp_path)["pretrain"], "recipe": "demo/pretrain"},
        experiments={"main": experiment(), "mask": experiment(["mae"], settings=masks)},
    )
    assert one.nodes.keys() < both.nodes.keys()
    assert verbs(both)["pretrain"] == 2  # 0.75 is what the recipe says anyway
    assert verbs(both)["finetune"] == 3


def test_every_arm_is_fine_tuned_by_the_same_plan(tmp_path):
    tree = study_tree(tmp_path)
    graph = graph_of(tmp_path, arms={**tree["arms"], "other": {"pretrain": {"mask": {"ratio": 0.5}}}})
    configs = [graph.nodes[trial.finetune].config for trial in graph.trials]
    assert len({yaml.safe_dump({k: v for k, v in config.items() if k != "init_from"}) for config in configs}) == 1


def test_an_arm_may_differ_from_the_plan_only_where_the_recipe_says_why(tmp_path):
    arms = {"scratch": {"finetune": {"optim": {"lr": 1e-3}}}, "mae": {"pretrain": {}}}
    with pytest.raises(ConfigError, match=r"arms.scratch.finetune: optim.lr differ.* may_differ"):
        graph_of(tmp_path, arms=arms)
    graph = graph_of(tmp_path, arms=arms, may_differ={"optim.lr": "the best of the same three, on validation seeds"})
    assert [graph.nodes[trial.finetune].config.get("optim") for trial in graph.trials] == [{"lr": 1e-3}, None]


def test_weights_from_outside_are_of_a_pretraining_seed_and_of_no_node(tmp_path):
    tree = study_tree(tmp_path)
    tree["data"]["hub"] = {"path": "/hub"}
    arms = {**tree["arms"], "theirs": {"weights": "@hub/seed_{seed}"}}
    question = experiment(["scratch", "mae", "theirs"])
    graph = graph_of(
        tmp_path,
        data=tree["data"],
        arms=arms,
        pretrain_seeds=[3, 4],
        finetune_seeds=[0],
        experiments={"main": question},
    )
    found = {
        (trial.arm, trial.pretrain_seed): graph.nodes[trial.finetune].config.get("init_from") for trial in graph.trials
    }
    assert found["theirs", 3] == "/hub/seed_3"
    assert found["theirs", 4] == "/hub/seed_4"
    assert found["scratch", None] is None
    assert all(trial.pretrain is None for trial in graph.trials if trial.arm == "theirs")
    labels = [graph.nodes[trial.finetune].label for trial in graph.trials if trial.arm == "theirs"]
    assert labels == ["finetune theirs, seeds 3, 0", "finetune theirs, seeds 4, 0"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"weights": "@hub"}, r"arms.theirs.*weights=@hub: must have \{seed\} in it"),
        ({"weights": "@hub/{seed}", "pretrain": {}}, r"arms.theirs.*leave out pretrain"),
        ({"weights": "@hub/{seed}", "finetune": {"init_from": "/x"}}, r"leave out pretrain and finetune.init_from"),
    ],
)
def test_weights_from_outside_stand_alone(arm, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        graph_of(tmp_path, arms={**study_tree(tmp_path)["arms"], "theirs": arm})


def test_a_changed_recipe_makes_new_nodes_only_where_it_matters(tmp_path):
    before, after = graph_of(tmp_path), graph_of(tmp_path, evaluate={"overlap": 0.25})
    changed = {after.nodes[node_id].verb for node_id in after.nodes.keys() - before.nodes.keys()}
    assert changed == {"evaluate"}
    tree = study_tree(tmp_path)
    tree["data"]["phantoms"]["config"]["seed"] = 9
    assert not graph_of(tmp_path, data=tree["data"]).nodes.keys() & before.nodes.keys()


def test_each_way_to_score_one_run_has_scores_of_its_own(tmp_path):
    settings = {"none": {}, "flips": {"evaluate.flips": ["y"]}, "the same": {"evaluate.overlap": 0}}
    graph = graph_of(tmp_path, experiments={"flips": experiment(["scratch"], settings=settings)})
    plain, flipped, same = graph.trials
    assert plain.finetune == flipped.finetune
    assert plain.evaluate == same.evaluate != flipped.evaluate
    run, apart = tmp_path / "nodes" / plain.finetune, tmp_path / "nodes" / flipped.evaluate
    scores = [graph.scores_folder(tmp_path, graph.nodes[trial.evaluate]) for trial in graph.trials]
    assert scores == [run / "evaluate", apart, run / "evaluate"]
    config = resolve(graph, tmp_path, graph.nodes[flipped.evaluate])
    assert (config.run_dir, config.folder, config.flips) == (run, apart, ("y",))


def test_where_the_study_lies_changes_no_name(tmp_path):
    other = graph_of(tmp_path, run_dir=str(tmp_path / "elsewhere"), title="Another", workers=2)
    assert other.nodes.keys() == graph_of(tmp_path).nodes.keys()


def test_both_means_pretraining_and_fine_tuning(tmp_path):
    settings = {"8": {}, "4": {"both.patch_voxels": [4, 4, 4]}}
    graph = graph_of(tmp_path, experiments={"patch": experiment(["mae"], settings=settings)})
    trial = graph.trials[1]
    for node in (trial.pretrain, trial.finetune):
        assert resolve(graph, tmp_path, graph.nodes[node]).patch_voxels == (4, 4, 4)


def test_an_existing_store_is_no_node(tmp_path):
    data = {"store": {"path": "/stores/btcv"}}
    graph = graph_of(tmp_path, data=data)
    assert verbs(graph) == {"pretrain": 1, "finetune": 2, "evaluate": 2}
    assert graph.config_of(tmp_path, graph.nodes[graph.trials[0].finetune])["store"] == "/stores/btcv"


def test_files_that_the_user_must_give_are_one_key_of_all_stores_that_are_made_of_them(tmp_path):
    stores = {name: {"verb": "ingest", "config": {"sources": "@scans"}} for name in ("store", "other")}
    scans = {"needs": "thirty volumes; give data.scans.path=FOLDER"}
    settings = {"here": {}, "there": {"both.store": "@other"}}
    changes = {"experiments": {"main": experiment(["scratch"], settings=settings)}}
    graph = graph_of(tmp_path, data={**stores, "scans": scans}, **changes)
    ingests = [node for node in graph.nodes.values() if node.verb == "ingest"]
    assert len(ingests) == 1  # of two that differ in nothing
    with pytest.raises(ConfigError, match=r"ingest store: data.scans.path: missing; needs thirty volumes; give data"):
        resolve(graph, tmp_path, ingests[0])
    stores["other"]["config"] = {"sources": "@scans", "spacing_mm": 2.0}
    graph = graph_of(tmp_path, data={**stores, "scans": {**scans, "path": "/downloaded"}}, **changes)
    ingests = [resolve(graph, tmp_path, node) for node in graph.nodes.values() if node.verb == "ingest"]
    assert [(config.sources, config.spacing_mm) for config in ingests] == [("/downloaded", None), ("/downloaded", 2.0)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"experiments": {"main": experiment(["scratch", "moco"])}}, "no such arm; there are scratch, mae"),
        ({"only": ["mian"]}, "no such experiment; there are main"),
        ({"experiments": {"main": experiment(settings={"a": {"mask.ratio": 0.5}})}}, "a varied key starts with"),
        ({"experiments": {"main": experiment(reference_arm="x")}}, "reference_arm=x: must be one of"),
        ({"pretrain_on_validation": "yes"}, "say in words why"),
        ({"target": {}}, "give dice, or the arm"),
        ({"finetune_seeds": []}, "at least one of each"),
        ({"data": {"store": {}}}, "give path=FOLDER, a verb that makes it, or in `needs`"),
        ({"data": {}}, "@store, which finetune scratch, seed 0 needs: no such data"),
        ({"data": {"store": {"verb": "ingest", "config": {"sources": "@store/x"}}}}, "is made from itself"),
        ({"arms": {"scratch": {}, "mae": {"pretrian": {}}}}, "did you mean"),
    ],
)
def test_a_wrong_study_is_explained_before_anything_runs(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        graph_of(tmp_path, **changes)


def test_a_recipe_extends_another_and_the_command_line_has_the_last_word(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(study_tree(tmp_path)))
    (tmp_path / "quick.yaml").write_text(f"extends: {tmp_path}/base.yaml\nfinetune: {{config: {{steps: 3}}}}\n")
    config = load_study([str(tmp_path / "quick.yaml"), "finetune_seeds=[4]"])
    assert config.finetune.config["steps"] == 3
    assert config.finetune.config["unetr"] == {"num_classes": 2, "feature_size": 4}
    assert config.finetune_seeds == (4,)
    (tmp_path / "circle.yaml").write_text(f"extends: {tmp_path}/circle.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_study([str(tmp_path / "circle.yaml")])


def test_a_dry_run_shows_a_node_that_cannot_be_and_what_depends_on_it(tmp_path, capsys):
    tree = study_tree(tmp_path)
    tree["arms"]["mae"] = {"pretrain": {"mask": {"ratio": 1.5}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["study", str(tmp_path / "recipe.yaml"), "--dry-run", "--json"]) == 2
    states = {node["label"]: node for node in yaml.safe_load(capsys.readouterr().out)["nodes"]}
    assert states["pretrain mae, seed 0"]["state"] == "failed"
    assert "mask.ratio" in states["pretrain mae, seed 0"]["reason"]
    assert states["finetune mae, seeds 0, 0"]["state"] == "left out"
    assert states["finetune scratch, seed 0"]["state"] == "to do"
    assert not (tmp_path / "study").exists()


def test_a_dry_run_names_what_is_given_by_path_and_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "human", lambda: Console(stderr=True, width=300))
    weights = tmp_path / "weights"
    (weights / "0").mkdir(parents=True)
    tree = study_tree(tmp_path, arms={"scratch": {}, "theirs": {"weights": "@theirs/{seed}"}}, pretrain_seeds=[0, 1])
    tree["experiments"] = {"main": experiment(["scratch", "theirs"])}
    tree["target"] = {"arm": "scratch"}
    tree["data"]["theirs"] = {"path": str(weights)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    words = ["study", str(tmp_path / "recipe.yaml"), "--dry-run"]
    assert main(words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no such file" in line]
    assert said == [
        f"finetune theirs, seeds 1, 0: init_from={weights}/1: no such file or folder; a study that starts here needs it"
    ]
    assert main([*words, "data.theirs.path=/none"]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "no such file" in line]
    assert said.startswith("data.theirs.path=/none: no such file or folder")


def test_a_dry_run_shows_what_each_node_comes_after(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "human", lambda: Console(stderr=True, width=300))  # no line is wrapped
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(study_tree(tmp_path)))
    assert main(["study", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    shown = [[cell.strip() for cell in re.split("[│┃]", line)] for line in capsys.readouterr().err.splitlines()]
    after = {cells[2]: cells[3] for cells in shown if len(cells) > 4}
    assert after["what"] == "after"
    assert after["ingest store"] == "cohort phantoms"
    assert after["finetune mae, seeds 0, 0"] == "ingest store; pretrain mae, seed 0"
    assert after["evaluate mae, seeds 0, 0"] == "finetune mae, seeds 0, 0"


def test_nodes_of_one_label_are_told_apart_in_what_comes_after_them(tmp_path):
    mask = {"pretrain.mask.ratio": 0.5}
    config = build_config(
        StudyConfig,
        study_tree(tmp_path, experiments={"main": experiment(), "mask": experiment(["mae"], config=mask)}),
        "test",
    )
    graph = expand(config)
    states = {node_id: NodeState("to do", "") for node_id in graph.nodes}
    after = {row[0]: row[2] for row in study_view(config, graph, tmp_path, states).nodes.rows}
    for trial in (trial for trial in graph.trials if trial.arm == "mae"):
        assert after[trial.finetune] == f"ingest store; pretrain mae, seed 0 ({trial.pretrain})"


def test_scoring_the_best_checkpoint_needs_runs_that_keep_it(tmp_path):
    graph = graph_of(tmp_path, evaluate={"best": True})
    with pytest.raises(ConfigError, match=r"evaluate scratch, seed 0: best=true, but its run keeps no checkpoint"):
        resolve(graph, tmp_path, graph.nodes[graph.trials[0].evaluate])
    tree = study_tree(tmp_path)["finetune"]
    tree["config"]["checkpoint"] = {"every_steps": 2, "keep_best": "val_dice"}
    graph = graph_of(tmp_path, evaluate={"best": True}, finetune=tree)
    assert resolve(graph, tmp_path, graph.nodes[graph.trials[0].evaluate]).best


def test_a_setting_can_put_another_recipe_below_all_keys():
    graph = expand(load_study(["studies/e10_encoder", "run_dir=none"]))
    methods = {}
    for trial in graph.trials:
        if trial.experiment == "other_encoders":
            pretrain = {} if trial.pretrain is None else graph.nodes[trial.pretrain].config
            finetune = graph.nodes[trial.finetune].config
            assert "recipe" not in {**pretrain, **finetune}

            assert finetune["steps"] == 20000  # the study's, over the recipe's own
            methods.setdefault(trial.setting, set()).add((pretrain.get("method"), finetune["head"]))
    assert methods == {
        "Primus-M": {("mae", "primus"), (None, "primus")},
        "residual-encoder U-Net": {("resenc_mae", "resenc"), (None, "resenc")},
        "Swin, SimMIM": {("swin_simmim", "swin_unetr"), (None, "swin_unetr")},
        "Swin, SimMIM, UperNet": {("swin_simmim", "swin_upernet"), (None, "swin_upernet")},
    }
