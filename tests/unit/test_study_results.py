"""What a study makes of its runs' files: folds together, held-out volumes kept out of pretraining."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from fake_runs import add_segmentation_scores, fake_run, write_lines
from safetensors.torch import load_file
from small_segmentation import make_finetune_run, make_store
from small_study import study_tree

from mimscale.cli import main
from mimscale.config import build_config
from mimscale.study.comparisons import compare, comparisons
from mimscale.study.config import StudyConfig
from mimscale.study.cost import cost_table
from mimscale.study.graph import expand
from mimscale.study.results import read_groups
from mimscale.study.statistics import Ratio
from mimscale.study.tables import comparison_table, score_table
from mimscale.study.targets import race_targets
from mimscale.study.view import _section


def test_folds_are_one_group_whose_cases_are_those_of_all_folds(tmp_path):
    settings = {f"fold {fold}": {"both.stream.fold": f"{fold}/2"} for fold in range(2)}
    experiment = {"question": "?", "arms": ["scratch", "mae"], "settings": settings, "pool_settings": True}
    tree = study_tree(
        tmp_path, data={"store": {"path": "gone"}}, experiments={"folds": experiment}, finetune_seeds=[0, 1]
    )
    config = build_config(StudyConfig, tree, "test")
    graph = expand(config)
    for trial in graph.trials:
        run = graph.folder(tmp_path, graph.nodes[trial.finetune])
        fold = trial.setting[-1]
        if not run.exists():
            fake_run(run, "finetune")
            dice = 0.5 + 0.2 * (trial.arm == "mae") + 0.1 * int(fold)
            add_segmentation_scores(run, volumes=[f"{fold}a", f"{fold}b"], dice=dice)
    groups = read_groups(config, graph, tmp_path, {*graph.nodes} - {t.pretrain for t in graph.trials})
    assert [(group.arm, group.setting, group.planned, len(group.results)) for group in groups] == [
        ("scratch", "", 4, 4),
        ("mae", "", 4, 4),
    ]
    assert groups[0].spread("dice").mean == pytest.approx(0.55)
    (found,) = comparisons(config, "folds", groups)
    assert found.dice.cases == 4
    assert found.dice.difference == pytest.approx(0.2)
    # What the deviation is one of is said, and that folds are not drawn; of one seed there is no interval of times.
    section = _section(config, "folds", groups, [found])
    scores, differences = section.tables[:2]
    assert "which differ by their fold, of 2, and within a fold by their seeds" in scores.note
    assert "which differ by their seeds." in score_table(groups).note
    assert "All 2 folds are in every replicate" in differences.note
    assert "folds" not in comparison_table(config, [found]).note
    # Every case is scored by the one fold that holds it out.
    table = groups[1].scores([0], [0, 1], ["0a", "0b", "1a", "1b"])
    assert table.tolist() == [[pytest.approx([0.7, 0.7, 0.8, 0.8])] * 2]


def made_up(folder, reached, **changes):
    """Scratch and MAE, whose runs reach the target when `reached` says, arm -> seeds -> step: what is made of them."""
    tree = study_tree(folder, data={"store": {"path": "gone"}}, target={"dice": 0.8}, **changes)
    config = build_config(StudyConfig, tree, "test")
    graph = expand(config)
    for trial in graph.trials:
        run = graph.folder(folder, graph.nodes[trial.finetune])
        fake_run(run, "finetune")  # of 40 steps at 0.5 s
        step = reached[trial.arm][(trial.pretrain_seed or 0, trial.finetune_seed)]
        lines = [{"step": at, "loss": 0.5, "step_s": 0.5} for at in range(1, 41)]
        lines += [{"step": at, "val_dice": 0.9 if at >= step else 0.1} for at in (10, 20, 30, 40)]
        write_lines(run / "metrics.jsonl", lines)
        add_segmentation_scores(run, volumes=["a", "b"], dice=0.5 + 0.2 * (trial.arm == "mae"))
    for trial in graph.trials:
        if trial.pretrain and not graph.folder(folder, graph.nodes[trial.pretrain]).exists():
            fake_run(graph.folder(folder, graph.nodes[trial.pretrain]))
    groups = read_groups(config, graph, folder, {*graph.nodes})
    (found,) = comparisons(config, "main", groups)
    return config, groups, found


def test_how_much_sooner_an_arm_is_has_an_interval_over_seeds(tmp_path):
    never = 50
    reached = {
        "scratch": {(0, 0): 20, (0, 1): 30, (0, 2): never},
        "mae": {(p, f): 10 for p in range(2) for f in range(3)},
    }
    config, groups, found = made_up(tmp_path, reached, pretrain_seeds=[0, 1], finetune_seeds=[0, 1, 2])
    assert (found.steps.ratio, found.steps.pretrain_seeds, found.steps.finetune_seeds) == (Ratio(value=3.0), 2, 3)
    # Three draws of scratch's seeds are all of the first one in 1 of 27, and mostly of the last one in 7 of 27.
    assert (found.steps.low, found.steps.high) == (Ratio(value=2.0), Ratio(value=4.0, bound="at least"))
    # Pretraining takes 40 steps of 0.5 s, so 20 s + 5 s against 10, 15 and more than 20 s.
    assert found.seconds.ratio == Ratio(value=pytest.approx(15 / 25))
    assert found.seconds.low == Ratio(value=pytest.approx(10 / 25))
    assert found.seconds.high == Ratio(value=pytest.approx(20 / 25), bound="at least")
    row = comparison_table(config, [found]).rows[0]
    assert row[4:] == ["2 x 3, 2 cases", "3.00 [2.00, at least 4.00]", "0.60 [0.40, at least 0.80]"]
    (said,) = _section(config, "main", groups, [found]).answers
    sooner = "3.00 [2.00, at least 4.00] times as fast in steps, sooner for 2 x 3 seeds, too few to speak of others"
    assert f"{sooner}, and 0.60 [0.40, at least 0.80] with" in said
    assert said.endswith("with the time of pretraining, not shown to differ.")


def test_of_one_seed_there_is_no_interval_of_a_ratio(tmp_path):
    config, _, found = made_up(tmp_path, {"scratch": {(0, 0): 30}, "mae": {(0, 0): 10}})
    assert comparison_table(config, [found]).rows[0][4:] == ["1 x 1, 2 cases", "3.00", "0.60"]


def test_ratios_are_of_the_fine_tuning_seeds_that_both_arms_have(tmp_path):
    reached = {"scratch": {(0, 0): 20, (0, 1): 40}, "mae": {(0, 0): 10, (0, 1): 10}}
    config, (scratch, mae), found = made_up(tmp_path, reached, finetune_seeds=[0, 1])
    assert found.steps.ratio.value == 3.0  # of the mean of 20 and 40
    left = replace(scratch, results=scratch.results[:1])
    assert compare(config, mae, left, race_targets(config, [scratch, mae], left, mae, left)).steps.ratio.value == 2.0
    other = replace(mae, results=mae.results[1:])
    nothing = compare(config, other, left, race_targets(config, [scratch, mae], left, other, left))
    assert (nothing.steps.ratio.value, nothing.dice.difference) == (None, None)
    assert comparison_table(config, [nothing]).rows[0][2:] == ["n/a"] * 5


def test_arms_without_pretraining_are_compared_over_their_fine_tuning_seeds(tmp_path):
    reached = {"scratch": {(0, 0): 20, (0, 1): 40}, "mae": {(0, 0): 10, (0, 1): 10}}
    config, (scratch, _), _ = made_up(tmp_path, reached, finetune_seeds=[0, 1])
    found = compare(config, scratch, scratch, race_targets(config, [scratch], scratch, scratch))
    assert (found.dice.pretrain_seeds, found.dice.finetune_seeds) == (0, 2)
    assert comparison_table(config, [found]).rows[0][4] == "2, 2 cases"


def dry_run(folder, capsys, **changes):
    store = make_store(folder / "data", split="train")
    tree = study_tree(folder, data={"store": {"path": str(store)}}, evaluate={"split": "train"}, **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    code = main(["study", str(folder / "recipe.yaml"), "--dry-run", "--json"])
    return code, {node["label"]: node for node in json.loads(capsys.readouterr().out)["nodes"]}


def test_pretraining_on_volumes_that_are_tested_on_is_refused(tmp_path, capsys):
    code, nodes = dry_run(tmp_path, capsys)
    assert code == 3
    assert nodes["pretrain mae, seed 0"]["state"] == "failed"
    assert "would read 3 volume(s) that are validated or tested on" in nodes["pretrain mae, seed 0"]["reason"]
    assert nodes["evaluate mae, seeds 0, 0"]["state"] == "left out"
    assert nodes["evaluate scratch, seed 0"]["state"] == "to do"


def test_pretraining_on_volumes_that_are_tested_on_is_allowed_where_the_recipe_says_why(tmp_path, capsys):
    why = "transductive, as in the paper's first version"
    code, nodes = dry_run(tmp_path, capsys, pretrain_on_validation=why)
    assert (code, {node["state"] for node in nodes.values()}) == (0, {"to do"})


def test_a_store_that_is_not_what_the_study_takes_it_for_stops_it_at_once(tmp_path, capsys):
    store = make_store(tmp_path / "data")
    data = {"store": {"path": str(store), "expect": {"train": 24, "val": 6}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(study_tree(tmp_path, data=data)))
    assert main(["study", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 3
    said = capsys.readouterr().err
    assert "data.store: 0 volumes to train, expected 24" in said
    assert "data.store: 3 volumes to val, expected 6" in said


@pytest.mark.parametrize("kept", [True, False])
def test_the_best_checkpoint_is_a_column_beside_the_last_and_changes_no_difference(tmp_path, kept):
    config = build_config(StudyConfig, study_tree(tmp_path, data={"store": {"path": "gone"}}), "test")
    graph = expand(config)
    for trial in graph.trials:
        run = graph.folder(tmp_path, graph.nodes[trial.finetune])
        fake_run(run, "finetune")
        last = 0.5 + 0.2 * (trial.arm == "mae")
        scores = add_segmentation_scores(run, volumes=["a", "b"], dice=last)
        if kept:
            mean = {key: {"dice": 0.9, "hd95_mm": 1.0, "nsd": 0.9} for key in scores["mean"]}
            mean["with_background"]["dice"] = 0.95
            scores["best"] = {"checkpoint": "step_00000030", "step": 30, "mean": mean}
        (run / "evaluate" / "scores.json").write_text(json.dumps(scores))
    groups = read_groups(config, graph, tmp_path, {*graph.nodes} - {t.pretrain for t in graph.trials})
    table = score_table(groups)
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["Dice"] == "0.700"
    assert row.get("Dice, best on validation") == ("0.900" if kept else None)
    assert row.get("Dice with background, best on validation") == ("0.950" if kept else None)
    assert ("looks better than it is" in table.note) == kept
    (found,) = comparisons(config, "main", groups)
    assert found.dice.difference == pytest.approx(0.2)


def one_run(folder):
    """A study, its graph and first trial, and that one's run."""
    config = build_config(StudyConfig, study_tree(folder, data={"store": {"path": "gone"}}), "test")
    graph = expand(config)
    trial = graph.trials[0]
    run = graph.folder(folder, graph.nodes[trial.finetune])
    fake_run(run, "finetune")
    return config, graph, trial, run


def test_regions_are_all_of_a_case_as_none_is_the_background(tmp_path):
    config, graph, trial, run = one_run(tmp_path)
    scores = add_segmentation_scores(run, volumes=["a"], dice=0.5)
    scores["cases"][0]["scores"]["background"]["dice"] = 0.8  # the first of three
    for regions, dice in ((None, 0.5), ({"background": ["x"]}, 0.6)):
        (run / "evaluate" / "scores.json").write_text(json.dumps({**scores, "regions": regions}))
        groups = read_groups(config, graph, tmp_path, {trial.finetune, trial.evaluate})
        assert groups[0].results[0].case_dice == {"a": pytest.approx(dice)}


def test_weights_from_outside_of_the_study_have_no_time_of_pretraining(tmp_path):
    config, graph, trial, run = one_run(tmp_path)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for init_from, known in ((None, 1), ("/weights", 0)):
        (run / "config.yaml").write_text(yaml.safe_dump({**tree, "init_from": init_from}))
        group = read_groups(config, graph, tmp_path, {trial.finetune})[0]
        targets = {result.trial: 0.0 for result in group.results}
        assert len(group.times(targets)) == 1
        assert len(group.seconds_to(targets)) == known


def test_costs_hold_each_run_once_with_the_size_of_what_is_trained_first(tmp_path):
    store = make_store(tmp_path / "data")
    question = {"question": "?", "arms": ["scratch"]}
    tree = study_tree(tmp_path, data={"store": {"path": str(store)}}, experiments={"main": question, "again": question})
    config = build_config(StudyConfig, tree, "test")
    graph = expand(config)
    trial = graph.trials[0]
    run = graph.folder(tmp_path, graph.nodes[trial.finetune])
    assert graph.trials[1].finetune == trial.finetune
    make_finetune_run(run, store, outputs=2, channels=2, trained_in="fp32")
    table = cost_table(read_groups(config, graph, tmp_path, {trial.finetune}))
    (row,) = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    weights = load_file(next((run / "checkpoints").glob("step_*/weights.safetensors")))
    assert float(row["weights, M"]) == pytest.approx(sum(t.numel() for t in weights.values()) / 1e6, abs=0.006)
    assert float(row["memory, GB, estimated"]) > 0
    measured = ["peak memory, GB, measured", "pretraining, wall clock, s", "fine-tuning, wall clock, s"]
    assert [row[column] for column in measured] == ["n/a"] * 3, "its code did not measure"
    assert float(row["GFLOP a sample"]) > 0
    # A run whose weights are gone has no size, and the table goes on.
    shutil.rmtree(run / "checkpoints")
    table = cost_table(read_groups(config, graph, tmp_path, {trial.finetune}))
    assert table.rows[0][3:6] == ["n/a"] * 3


def test_costs_show_the_largest_memory_of_a_rank_and_the_wall_clock_of_all_jobs(tmp_path):
    config = build_config(StudyConfig, study_tree(tmp_path, data={"store": {"path": "gone"}}), "test")
    graph = expand(config)
    trial = next(trial for trial in graph.trials if trial.pretrain is not None)
    folders = {kind: graph.folder(tmp_path, graph.nodes[getattr(trial, kind)]) for kind in ("pretrain", "finetune")}
    jobs = {
        "pretrain": [(2, 3.2e9, 70.0), (4, 3.25e9, 101.4), (4, 3.1e9, 160.6)],
        "finetune": [(2, 9e9, 30.0), (4, 9e9, 44.6)],
    }
    for kind, folder in folders.items():
        fake_run(folder, kind)
        with (folder / "metrics.jsonl").open("a") as file:
            for step, peak_bytes, wall_s in jobs[kind]:
                file.write(json.dumps({"step": step, "peak_memory_bytes": peak_bytes, "wall_s": wall_s}) + "\n")
    table = cost_table(read_groups(config, graph, tmp_path, {trial.pretrain, trial.finetune}))
    (row,) = [dict(zip(table.columns, row, strict=True)) for row in table.rows if row[1] == trial.arm]
    assert row["peak memory, GB, measured"] == "3.25"
    assert row["pretraining, wall clock, s"] == "161"
    assert row["fine-tuning, wall clock, s"] == "45"
