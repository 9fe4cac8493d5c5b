"""Every packaged study is one that its verbs take, once its data are there."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_segmentation import make_store

from mimscale.cli import main
from mimscale.config import recipe_names
from mimscale.store.layout import OverlayInfo, read_info, write_info
from mimscale.store.manifest import load_manifest, write_manifest
from mimscale.study.checks import store_problems
from mimscale.study.config import load_study
from mimscale.study.graph import expand
from mimscale.study.nodes import resolve

STUDIES = [
    name
    for name, line in recipe_names().items()
    if name.startswith("studies/") and "a part of studies/small" not in line
]
DATA = {
    "btcv": ["data.btcv.config.sources=dataset_0.json"],
    "brats": [f"data.{name}.config.sources=scans.csv" for name in ("t1", "t1ce", "t2", "flair", "all")],
}


def data_of(study):
    extends = load_study([study, "run_dir=x"]).data
    return DATA["btcv"] if "btcv" in extends else DATA["brats"] if "t1ce" in extends else []


def test_there_is_a_study_for_each_experiment_of_the_paper():
    wanted = {f"e{number:02d}" for number in range(1, 12)} | {
        "small",
        "small_quick",
        "small_lr_grid",
        "small_monai",
        "small_encoders",
        "paper_btcv",
        "paper_brats",
    }
    assert {name.removeprefix("studies/").split("_", 1)[0] if "/e" in name else name[8:] for name in STUDIES} == wanted


@pytest.mark.parametrize("study", STUDIES)
def test_a_packaged_study_has_no_node_that_cannot_be(study, tmp_path, capsys):
    assert main(["study", study, f"run_dir={tmp_path}", *data_of(study), "--dry-run", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {node["state"] for node in nodes} == {"to do"}, [node for node in nodes if node["state"] == "failed"][:3]


@pytest.mark.parametrize("study", ["studies/paper_btcv", "studies/paper_brats"])
def test_a_study_without_its_data_says_what_is_needed_and_how_to_give_it(study, tmp_path, capsys):
    assert main(["study", study, f"run_dir={tmp_path}", "--dry-run", "--json"]) == 2
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    failed = [node for node in nodes if node["state"] == "failed"]
    assert failed
    assert all("sources: missing" in node["reason"] and ".config.sources=" in node["reason"] for node in failed)
    assert not any(node["state"] == "to do" for node in nodes)


def test_the_small_study_has_simclr_in_the_time_of_mae_too_and_its_other_runs_are_those_of_the_other_questions():
    study = load_study(["studies/small", "run_dir=x"])
    assert study.arms["simclr, same time"].same_time_as == "mae"
    assert study.arms["simclr, same time"].pretrain == study.arms["simclr"].pretrain
    graph = expand(study)
    shared = {trial.finetune for trial in graph.trials if trial.experiment == "main"}
    own = {trial.arm for trial in graph.trials if trial.experiment == "same_time" and trial.finetune not in shared}
    assert own == {"simclr, same time"}


@pytest.mark.parametrize(
    ("name", "experiment"),
    [
        ("small", "main"),
        ("e01_main_ct", "main"),
        ("e02_main_mr", "contrasts"),
        ("e03_convergence", "main"),
    ],
)
def test_masked_methods_are_compared_with_scratch_and_by_the_same_runs_with_simclr(name, experiment):
    study = load_study([f"studies/{name}", "run_dir=x"])
    graph = expand(study)
    runs = {}
    for trial in graph.trials:
        runs.setdefault(trial.experiment, set()).add(trial.finetune)
    assert study.experiments[experiment].arms[0] == "scratch"
    assert study.experiments["against_simclr"].arms[0] == "simclr"
    assert runs["against_simclr"] < runs[experiment]


def test_the_control_of_monai_has_the_twin_that_make_looks_for():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (label,) = re.findall(r'n\["label"\] == "(.*?)"', makefile)
    (seeds,) = re.findall(r"foreach seed,(.*?),", makefile)
    study = load_study(["studies/small_monai", "run_dir=x", "data.monai.path=/weights"])
    graph = expand(study)
    trials = {(trial.arm, trial.pretrain_seed): trial for trial in graph.trials if trial.experiment == "monai_control"}
    assert {seed for _, seed in trials} == {int(seed) for seed in seeds.split()}
    for seed in seeds.split():
        assert graph.nodes[trials["mae", int(seed)].pretrain].label == label.replace("$*", seed)
        twins = [graph.nodes[trials[arm, int(seed)].finetune].config for arm in ("mae", "mae of MONAI")]
        assert twins[1]["init_from"] == f"/weights/{seed}"
        assert {key for key in twins[0] if twins[0][key] != twins[1][key]} == {"init_from", "model"}


def test_every_study_that_is_run_here_scores_with_flips_and_the_quick_one_the_best_checkpoint_too():
    for name in ("studies/small", "studies/small_quick"):
        study = load_study([name, "run_dir=x"])
        graph = expand(study)
        trials = [trial for trial in graph.trials if trial.experiment == "flips"]
        flips = [graph.nodes[trial.evaluate].config.get("flips", []) for trial in trials]
        assert [["x"] if trial.setting == "left and right" else [] for trial in trials] == flips
        assert len({trial.finetune for trial in trials}) == len(trials) / 2
    assert study.evaluate["best"]
    finetune = resolve(graph, Path("x"), graph.nodes[trials[0].finetune])
    assert finetune.checkpoint.every_steps == finetune.validation.every_steps


def test_the_paper_s_own_numbers_are_not_invented():
    for study in STUDIES:
        for experiment in load_study([study, "run_dir=x"]).experiments.values():
            assert experiment.paper_value is None


def as_downloaded(folder, study, data):
    """Rows of a store, and what is said of it, that is what a packaged study expects; of no voxels."""
    expect = load_study([study, "run_dir=x"]).data[data].expect
    sample = load_manifest(make_store(folder / "sample")).row(0)
    info = read_info(folder / "sample" / "store")
    counts = {"train": expect.train, "val": expect.val}
    if expect.train is None:
        counts = {"train": expect.volumes - 219, "val": 219}
    shape = expect.shape[0] if expect.shape is not None else (60, 200, 240)
    overlay = replace(sample.overlays["label"], class_voxels=(9,) * len(expect.class_names))
    rows = [
        replace(
            sample,
            id=f"{split}{number:05d}",
            split=split,
            modality=expect.modality,
            shape=(expect.channels, *shape),
            spacing_mm=expect.spacing_mm[0],
            stats=sample.stats * expect.channels,
            overlays={"label": overlay},
        )
        for split, count in counts.items()
        for number in range(count)
    ]
    overlays = {"label": OverlayInfo(class_names=expect.class_names)}
    return rows, replace(info, modality=expect.modality, overlays=overlays), expect


def problems(folder, rows, info, expect):
    write_info(folder, info)
    write_manifest(folder, rows)
    return store_problems(folder, expect)


@pytest.mark.parametrize(
    ("study", "data", "count"),
    [("studies/paper_btcv", "btcv", 30), ("studies/paper_brats", "t1ce", 1251), ("studies/paper_brats", "all", 1251)],
)
def test_data_as_they_are_downloaded_have_no_problem_and_others_are_named(study, data, count, tmp_path):
    rows, info, expect = as_downloaded(tmp_path, study, data)
    assert len(rows) == count
    assert problems(tmp_path / "good", rows, info, expect) == []
    assert any(
        f"expected {count}" in one or "expected 24" in one
        for one in problems(tmp_path / "fewer", rows[1:], info, expect)
    )
    coarse = [replace(rows[0], spacing_mm=(5.0, 0.8, 0.8)), *rows[1:]]
    (problem,) = problems(tmp_path / "coarse", coarse, info, expect)
    assert problem.startswith(f"spacing_mm of 1 volume(s): {rows[0].id} has 5 x 0.8 x 0.8; expected")
    bare = replace(info, overlays={"label": OverlayInfo(class_names=expect.class_names[:-1])})
    (problem,) = problems(tmp_path / "bare", rows, bare, expect)
    assert problem.endswith(f"expected {', '.join(expect.class_names)}")
    lost = replace(rows[0].overlays["label"], class_voxels=(9,) * (len(expect.class_names) - 1) + (0,))
    without = [replace(row, overlays={"label": lost}) for row in rows]
    (problem,) = problems(tmp_path / "without", without, info, expect)
    assert problem.startswith(f"class {expect.class_names[-1]} is in 0 of {count} labelled volumes")


def test_brats_is_learned_as_the_regions_that_it_is_scored_by():
    study = load_study(["studies/paper_brats", "run_dir=x"])
    regions = study.finetune.config["regions"]
    assert list(regions) == ["TC", "WT", "ET"]
    classes = study.data["t1ce"].config["class_names"]
    assert {name for members in regions.values() for name in members} == set(classes[1:])
    # The labels 1, 2 and 4 of its files: necrotic core, oedema, enhancing tumour.
    assert study.data["t1ce"].config["class_map"] == {4: 3}


def test_btcv_is_scored_in_five_folds_and_simclr_gets_the_time_of_mae_too():
    study = load_study(["studies/paper_btcv", "run_dir=x"])
    folds = study.experiments["folds"]
    assert folds.pool_settings
    assert [keys["both.stream.fold"] for keys in folds.points.values()] == [f"{fold}/5" for fold in range(5)]
    assert study.arms["simclr, same time"].same_time_as == "mae"
    assert study.arms["simclr, same time"].pretrain == study.arms["simclr"].pretrain
    assert study.pretrain_on_validation is None


def test_other_encoders_are_each_compared_with_their_own_scratch_on_the_data_of_the_small_study():
    study = load_study(["studies/small_encoders", "run_dir=x"])
    graph = expand(study)
    assert graph.data == expand(load_study(["studies/small", "run_dir=x"])).data
    found = set()
    for trial in graph.trials:
        run = graph.nodes[trial.finetune].config
        if trial.pretrain is not None:
            pretrained = graph.nodes[trial.pretrain].config
            assert pretrained["model"] == run["model"]
            assert pretrained["patch_voxels"] == run["patch_voxels"]
            assert trial.arm in ("pretrained", "pretrained, random blocks")
            found.add((trial.setting, pretrained["method"], run["head"]))
        frozen = trial.experiment == "frozen_encoders"
        assert (run["optim"].get("schedule") == "frozen") == frozen
        assert (run.get("init_blocks") == "random") == ("random blocks" in trial.arm)
        assert (run["model"].get("depth") == 0) == (trial.setting == "Primus without blocks")
    assert found == {
        ("Primus", "mae", "primus"),
        ("residual-encoder U-Net", "resenc_mae", "resenc"),
        ("Swin", "swin_simmim", "swin_unetr"),
    }
    arms = {(trial.setting, trial.arm) for trial in graph.trials if trial.experiment == "encoders"}
    assert len(arms) == 3 * len(study.experiments["encoders"].arms)
