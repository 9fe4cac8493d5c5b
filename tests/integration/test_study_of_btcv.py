"""The packaged BTCV study on made CTs: Hounsfield units, thirteen organs, resampled and cropped, scored in folds."""

import json

import nibabel
import numpy as np
import pytest
import yaml
from small_study import NETWORK
from study_in_process import run_every_node

from mimscale.store.layout import read_info
from mimscale.store.manifest import load_manifest
from mimscale.study.checks import used_rows
from mimscale.study.comparisons import shared_seeds
from mimscale.study.nodes import resolve, use_of
from mimscale.study.results import read_groups

SHAPE, SPACING_MM = (60, 56, 24), (1.0, 1.0, 2.5)  # of the files: X, Y, Z
BODY = (slice(14, 46), slice(12, 44), slice(5, 19))  # 14 mm of air in front of it, and as much behind
NAMES = ("spleen", "rkid", "lkid", "gall", "eso", "liver", "sto", "aorta", "IVC", "veins", "pancreas", "rad", "lad")
ARMS = ("scratch", "mae")
VOLUMES = 6
pytestmark = pytest.mark.timeout(600)


def abdomen(subject):
    """Labels 1 to 13, each a block of the body, in a place of its own in each subject; one has no gallbladder."""
    blocks = np.random.default_rng(subject).permutation(16).reshape(4, 4)  # from 0; above 13 is no organ
    label = np.zeros(SHAPE, np.uint8)
    label[BODY] = np.kron(np.where(blocks > 13, 0, blocks), np.ones((8, 8)))[..., None]
    return np.where((label == 4) & (subject == 0), 0, label).astype(np.uint8)


def write_scans(folder):
    """Volumes and a dataset_0.json in the form of the released one; unlabelled volumes in it were not downloaded."""
    entries = []
    for subject in range(VOLUMES):
        label = abdomen(subject)
        hounsfield = np.full(SHAPE, -1024.0)
        hounsfield[BODY] = -150 + 28.0 * label[BODY]
        hounsfield += np.random.default_rng(100 + subject).normal(0, 5, SHAPE)
        entry = {"image": f"imagesTr/img{subject:04d}.nii.gz", "label": f"labelsTr/label{subject:04d}.nii.gz"}
        for name, voxels in ((entry["image"], hounsfield.astype(np.int16)), (entry["label"], label)):
            (folder / name).parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*SPACING_MM, 1.0])), folder / name)
        entries.append(entry)
    tree = {
        "labels": dict(enumerate(("background", *NAMES))),
        "modality": {"0": "CT"},
        "training": entries[:4],
        "validation": entries[4:],
    }
    (folder / "dataset_0.json").write_text(json.dumps(tree))
    return folder / "dataset_0.json"


def recipe_of(folder):
    """The packaged study with a tiny network, and of its questions two folds and one fraction of labels."""
    network = {**NETWORK, "checkpoint": {"every_steps": 2, "keep": 1}, "steps": 4, "optim": {"warmup_steps": 1}}
    network["stream"] = {"workers": 0, "crops_per_volume": 2}
    folds = {"fold 1": {"both.stream.fold": "0/2"}, "fold 2": {"both.stream.fold": "1/2"}}
    tree = {
        "extends": "studies/paper_btcv",
        "data": {
            "btcv": {
                "config": {"sources": str(write_scans(folder)), "workers": 1, "parts": 1},
                "expect": {"train": 4, "val": 2},
            }
        },
        "pretrain": {"config": {**network, "mae": {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}}},
        "finetune": {
            "config": {**network, "unetr": {"feature_size": 4}, "validation": {"every_steps": 2, "crops_per_volume": 1}}
        },
        "evaluate": {"overlap": 0.25, "pictures": 1, "threads": 1},
        "reconstructions": False,
        "finetune_seeds": [0],
        "bootstrap": {"replicates": 200},
        "experiments": {
            "folds": {"arms": list(ARMS), "settings": {**folds, **dict.fromkeys(("fold 3", "fold 4", "fold 5"))}},
            "labels": {
                "arms": ["mae"],
                "settings": dict.fromkeys(("10 %", "25 %", "100 %")),
                "reference_setting": "50 %",
            },
        },
        "only": ["folds", "labels"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Its config and graph with every node run, and its report."""
    folder = tmp_path_factory.mktemp("btcv")
    config, graph, view = run_every_node(folder, recipe_of(folder), checked="btcv")
    return folder, config, graph, view


def scores_of(study, experiment, arm):
    _, config, graph, _ = study
    trials = [trial for trial in graph.trials if (trial.experiment, trial.arm) == (experiment, arm)]
    places = [graph.scores_folder(config.run_dir, graph.nodes[trial.evaluate]) for trial in trials]
    return [(place, json.loads((place / "scores.json").read_text())) for place in places]


def scored_volumes(study, arm):
    return [case["volume"] for _, scores in scores_of(study, "folds", arm) for case in scores["cases"]]


def test_the_store_is_in_the_window_resampled_and_cropped_to_the_body_and_its_margin(study):
    _, config, graph, _ = study
    store = config.run_dir / "nodes" / graph.data["btcv"]
    info, manifest = read_info(store), load_manifest(store)
    assert (info.modality, tuple(info.intensity.window)) == ("ct", (-175, 250))
    assert info.overlays["label"].class_names[4] == "gallbladder"  # by the recipe's names, not by those of the file
    assert {tuple(spacing) for spacing in manifest.column("spacing_mm")} == {(2.0, 1.5, 1.5)}
    # [C, Z, Y, X]: the body of 35 x 32 x 32 mm, and 10 mm on each side, in voxels of 2.0 x 1.5 x 1.5 mm.
    for _, *shape in manifest.column("shape"):
        assert np.all(np.abs(np.array(shape) * (2.0, 1.5, 1.5) - (55, 52, 52)) <= (5.0, 3.0, 3.0)), shape


def test_every_volume_is_scored_once_over_the_folds_and_pretraining_saw_none_of_its_fold(study):
    _, config, graph, _ = study
    manifest = load_manifest(config.run_dir / "nodes" / graph.data["btcv"])
    for arm in ARMS:
        assert sorted(scored_volumes(study, arm)) == sorted(manifest.column("id"))
    for trial in graph.trials:
        if trial.pretrain is not None:
            pretraining = resolve(graph, config.run_dir, graph.nodes[trial.pretrain])
            seen = set(manifest.column("id")[used_rows(use_of(pretraining, "train"), manifest)])
            place = graph.scores_folder(config.run_dir, graph.nodes[trial.evaluate])
            scored = {case["volume"] for case in json.loads((place / "scores.json").read_text())["cases"]}
            assert seen
            assert not seen & scored


def test_the_report_pools_the_folds_into_one_row_of_all_volumes(study):
    folder, config, graph, view = study
    (section,) = [section for section in view.sections if section.name == "folds"]
    table = section.tables[0]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == list(ARMS)
    groups = {
        group.arm: group
        for group in read_groups(config, graph, config.run_dir, set(graph.nodes))
        if group.experiment == "folds"
    }
    for arm in ARMS:
        assert rows[arm]["runs"] == "2 of 2"
        dice = [scores["mean"]["without_background"]["dice"] for _, scores in scores_of(study, "folds", arm)]
        assert rows[arm]["Dice"].startswith(f"{np.mean(dice):.3f}")
        seeds = shared_seeds(groups[arm].scored, groups[arm].scored)
        by_case = groups[arm].scores(seeds.ours, seeds.finetune, scored_volumes(study, arm))
        assert by_case.shape == (1, 1, VOLUMES)
        assert np.isfinite(by_case).all()
    (difference,) = section.tables[1].rows
    assert difference[:2] == ["mae", "scratch"]
    assert difference[4].endswith(f"{VOLUMES} cases")
    (labels,) = [section for section in view.sections if section.name == "labels"]
    assert [row[:3] for row in labels.tables[0].rows] == [["mae", "50 %", "1 of 1"]]
    text = (folder / "study" / "report" / "results.md").read_text()
    assert "| gallbladder |" in text
    assert "| left adrenal gland |" in text


def test_scores_are_of_the_grid_of_the_files_and_of_the_labels_in_them(study):
    folder, *_ = study
    truth = {}
    for subject in range(VOLUMES):
        label = np.asarray(nibabel.load(folder / f"labelsTr/label{subject:04d}.nii.gz").dataobj)
        truth[label.tobytes()] = subject
    counts = {tuple(np.bincount(np.frombuffer(label, np.uint8), minlength=14)): s for label, s in truth.items()}
    found = set()
    for place, scores in scores_of(study, "folds", "mae"):
        classes = scores["classes"]
        assert len(classes) == 14
        assert scores["store_grid"]["mean"]["without_background"]["dice"] is not None
        assert scores["best"]["mean"]["without_background"]["dice"] is not None
        for case in scores["cases"]:
            found.add(tuple(case["scores"][name]["truth_voxels"] for name in classes))
            # On the store's grid, of other voxels and without the air around the body, there are other numbers.
            assert case["store_grid_scores"]["spleen"]["truth_voxels"] != case["scores"]["spleen"]["truth_voxels"]
            prediction = nibabel.load(next(place.rglob(f"*{case['volume']}*.nii.gz")))
            assert prediction.shape == SHAPE
            np.testing.assert_allclose(prediction.header.get_zooms(), SPACING_MM, atol=1e-4)
    assert found == set(counts)


def test_half_of_the_labels_are_those_of_half_of_the_subjects_and_all_volumes_pretrain(study):
    _, config, graph, _ = study
    manifest = load_manifest(config.run_dir / "nodes" / graph.data["btcv"])
    (trial,) = [trial for trial in graph.trials if trial.experiment == "labels"]
    used = {
        verb: used_rows(use_of(resolve(graph, config.run_dir, graph.nodes[node]), "train"), manifest)
        for verb, node in (("pretrain", trial.pretrain), ("finetune", trial.finetune))
    }
    assert len(used["pretrain"]) == 4
    assert len(used["finetune"]) == 2
    assert set(used["finetune"]) < set(used["pretrain"])
