"""Every packaged study is one that its verbs take, once its data are there."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_segmentation import make_store

from mimscale.cli import main
from mimscale.config import recipe_names
from mimscale.store.layout import OverlayInfo, read_info, write_info
from mimscale.store.manifest import load_manifest, write_manifest
from mimscale.stream.config import AugmentConfig, fold_share
from mimscale.study.checks import store_problems
from mimscale.study.config import load_study
from mimscale.study.graph import expand
from mimscale.study.nodes import resolve

STUDIES = [
    name
    for name, line in recipe_names().items()
    if name.startswith("studies/") and "a part of studies/small" not in line
]


def data_of(study):
    """One key, whatever the number of stores."""
    return ["data.scans.path=/data"] if "scans" in load_study([study, "run_dir=x"]).data else []


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
    # SimCLR of the paper's studies needs 8 ranks, or another micro_batch.
    words = [f"run_dir={tmp_path}", *data_of(study), *(["processes=8"] if data_of(study) else [])]
    assert main(["study", study, *words, "--dry-run", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {node["state"] for node in nodes} == {"to do"}, [node for node in nodes if node["state"] == "failed"][:3]


@pytest.mark.parametrize("study", ["studies/paper_btcv", "studies/paper_brats"])
def test_a_study_without_its_data_says_what_is_needed_and_how_to_give_it(study, tmp_path, capsys):
    assert main(["study", study, f"run_dir={tmp_path}", "--dry-run", "--json"]) == 2
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    failed = [node for node in nodes if node["state"] == "failed"]
    assert failed
    assert all("data.scans.path: missing; needs the" in node["reason"] for node in failed)
    assert all("give data.scans.path=" in node["reason"] for node in failed)
    assert not any(node["state"] == "to do" for node in nodes)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 64), (2, 32), (8, 8)])
def test_simclr_of_the_paper_s_studies_runs_on_any_ranks_that_its_comment_names_and_others_are_said(
    ranks, micro_batch, tmp_path, capsys
):
    words = ["study", "studies/e03_convergence", f"run_dir={tmp_path}", "data.scans.path=/data", "only=[main]"]
    words += ["finetune_seeds=[0]", f"processes={ranks}", "--dry-run", "--json"]
    assert main([*words, f"pretrain.config.micro_batch={micro_batch}"]) == 0
    assert {node["state"] for node in json.loads(capsys.readouterr().out)["nodes"]} == {"to do"}
    other = micro_batch // 2
    assert main([*words, f"pretrain.config.micro_batch={other}"]) == 2
    nodes = {node["label"]: node for node in json.loads(capsys.readouterr().out)["nodes"]}
    refused = nodes.pop("pretrain simclr, seed 0")
    assert refused["state"] == "failed"
    assert f"micro_batch={other} on {ranks} rank(s) computes {other * ranks} at once" in refused["reason"]
    assert f"set micro_batch={micro_batch}" in refused["reason"]
    left_out = {label for label, node in nodes.items() if node["state"] == "left out"}
    assert left_out == {"finetune simclr, seeds 0, 0", "evaluate simclr, seeds 0, 0"}
    assert {node["state"] for label, node in nodes.items() if label not in left_out} == {"to do"}
    assert not any(tmp_path.iterdir())


def test_a_dry_run_for_slurm_counts_the_ranks_of_its_profile(tmp_path, capsys):
    profile = Path(__file__).parents[2] / "slurm" / "profiles" / "example.yaml"  # 8 GPUs a node
    words = ["study", "studies/e03_convergence", f"run_dir={tmp_path}", "data.scans.path=/data", "only=[main]"]
    words += ["--profile", str(profile), "--dry-run", "--json"]
    assert main(words) == 0
    assert {node["state"] for node in json.loads(capsys.readouterr().out)["nodes"]} == {"to do"}
    assert main([*words, "--nodes", "2"]) == 2
    reasons = {node["label"]: node["reason"] for node in json.loads(capsys.readouterr().out)["nodes"]}
    assert "micro_batch=8 does not divide among 16 ranks" in reasons["pretrain mae, seed 0"]
    assert "legal numbers of nodes are 1" in reasons["finetune scratch, seed 0"]


def counts_of(study, graph, store):
    """Volumes to train and to validate of a store that a study makes."""
    (name,) = (name for name, node in graph.data.items() if f"@{node}" == store)
    data = study.data[name]
    if data.expect.train is not None:
        return data.expect.train, data.expect.val
    val = round(data.config["val_fraction"] * data.expect.volumes)
    return data.expect.volumes - val, val


@pytest.mark.parametrize("name", STUDIES)
def test_an_epoch_of_every_run_holds_a_global_batch(name):
    study = load_study([name, "run_dir=x", *data_of(name)])
    graph = expand(study)
    trained = {(t.pretrain, t.finetune) for t in graph.trials}
    for node_id in {node for pair in trained for node in pair if node is not None}:
        run = graph.nodes[node_id].config
        stream = run["stream"]
        train, val = counts_of(study, graph, run["store"])
        if stream.get("fold") is not None:
            train = train + val - math.ceil((train + val) / fold_share(stream["fold"])[1])
        samples = math.ceil(stream.get("train_fraction", 1) * train) * stream["crops_per_volume"]
        assert samples >= run["global_batch"], graph.nodes[node_id].label


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


def runs_of(name, experiment):
    """Resolved configs of an experiment: (arm, setting) -> pretraining (None: scratch), fine-tuning, evaluation."""
    study = load_study([name, "run_dir=x", "data.scans.path=/data", f"only=[{experiment}]"])
    graph = expand(study)

    def config(node):
        return None if node is None else resolve(graph, Path("x"), graph.nodes[node])

    trials = {(trial.arm, trial.setting): trial for trial in graph.trials}
    return {key: tuple(map(config, (t.pretrain, t.finetune, t.evaluate))) for key, t in trials.items()}


# Volumes; rate, its end, warm-up (epochs) and decay of pretraining by arm, as released (domain notes 1.3-1.5).
RELEASED = {
    "paper_btcv": (
        24,
        {
            "scratch": None,
            "mae, as released": (3e-4, 1e-4, 300, 0.05),
            "mae, as released, light decoder": (3e-4, 1e-4, 300, 0.05),
            "simmim, as released": (1e-4, 1e-4, 50, 1e-5),
        },
    ),
    "paper_brats": (1251, {"scratch": None, "simmim, as released": (3e-4, 3e-4, 0, 1e-5)}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_settings_can_be_run_and_are_those_that_were_released(name):
    volumes, arms = RELEASED[name]
    runs = runs_of(f"studies/{name}", "as_released")
    assert {arm for arm, _ in runs} == set(arms)
    steps_an_epoch = volumes * 4 / 16
    for (arm, _), (pretrain, finetune, evaluate) in runs.items():
        assert (pretrain is None) == (arms[arm] is None)
        wanted = {"finetune": (finetune, (3e-4, 1e-4, 300, 0.05))}
        if pretrain is not None:
            wanted["pretrain"] = (pretrain, arms[arm])
        for run, (lr, end, warmup_epochs, decay) in wanted.values():
            assert run.steps == 3000 * steps_an_epoch
            assert (run.global_batch, run.stream.crops_per_volume, run.crop_voxels) == (16, 4, (96, 96, 96))
            assert (run.patch_voxels, run.model.dim, run.model.depth, run.model.heads) == ((16, 16, 16), 768, 12, 12)
            assert (run.model.mlp_ratio, run.model.positions, run.model.drop_path) == (4.0, "learned", 0.0)
            assert run.optim.warmup_steps == warmup_epochs * steps_an_epoch
            assert (run.optim.schedule, run.optim.lr, run.optim.weight_decay) == ("full", lr, decay)
            assert run.optim.lr * run.optim.min_lr_ratio == pytest.approx(end, rel=1e-4)
            assert (run.optim.betas, run.optim.layer_decay, run.optim.head_lr_ratio) == ((0.9, 0.999), 1.0, 1.0)
            assert run.engine.clip_grad_norm == 0
        if pretrain is not None:
            assert (pretrain.mask.ratio, pretrain.mask.unit_voxels, pretrain.mask.style) == (0.75, None, "random")
            assert (pretrain.target.target, pretrain.target.loss, pretrain.target.loss_on) == ("raw", "l1", "masked")
            assert (pretrain.stream.origins, pretrain.stream.region_voxels) == ("uniform", None)
            assert pretrain.augment == AugmentConfig()
            decoder = {"mae, as released": (512, 8, 8), "mae, as released, light decoder": (768, 1, 8)}.get(arm)
            mae = pretrain.mae
            assert decoder in (None, (mae.decoder_dim, mae.decoder_depth, mae.decoder_heads))
            assert pretrain.method == arm.split(",")[0]
        assert (finetune.stream.origins, finetune.stream.pos_neg) == ("labelled", (1.0, 1.0))
        changes = {key: value for key, value in vars(finetune.augment).items() if key.endswith("_prob")}
        assert changes.pop("flip_prob") == (0.1, 0.1, 0.1)
        assert {key: value for key, value in changes.items() if value} == {"rot90_prob": 0.1, "shift_prob": 0.5}
        assert finetune.augment.shift_by == 0.1
        assert (evaluate.overlap, evaluate.blending, evaluate.best) == (0.25, "constant", True)


def test_the_decoders_are_the_paper_s_grid_and_resolutions_are_coarser_and_finer():
    runs = runs_of("studies/e06_decoder", "decoder")
    found = {(run[0].mae.decoder_depth, run[0].mae.decoder_dim) for run in runs.values()}
    assert found == {(depth, dim) for depth in (1, 2, 4, 8) for dim in (128, 256, 384, 512, 768)} | {(0, 384)}
    for (_, setting), (pretrain, _, _) in runs.items():
        if setting != "linear":
            assert setting == f"{pretrain.mae.decoder_depth} x {pretrain.mae.decoder_dim}"
    study = load_study(["studies/e08_resolution", "run_dir=x", "data.scans.path=/data"])
    graph = expand(study)
    spacings = set()
    for trial in graph.trials:
        if trial.experiment == "resolution":
            run = resolve(graph, Path("x"), graph.nodes[trial.finetune])
            (store,) = (one for one in graph.nodes[trial.finetune].parents if one.startswith("ingest"))
            spacings.add(run.stream.target_spacing_mm or tuple(graph.nodes[store].config["spacing_mm"]))
    assert spacings == {(1.3333, 1.0, 1.0), (2.0, 1.5, 1.5), (3.0, 2.25, 2.25), (4.0, 3.0, 3.0)}


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
