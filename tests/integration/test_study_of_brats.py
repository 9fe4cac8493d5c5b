"""The packaged BraTS study on made volumes: four contrasts, labels 1, 2 and 4, scored as three regions."""

import json

import nibabel
import numpy as np
import pytest
import yaml
from small_study import NETWORK
from study_in_process import run_every_node

from mimscale.evaluate.slices import load_planes

CONTRASTS = ("t1", "t1ce", "t2", "flair")
SHAPE = (24, 26, 22)  # of the files: X, Y, Z


def tumour(seed):
    """Labels as BraTS writes them: oedema 2 around enhancing tumour 4 around a necrotic core 1."""
    centre = np.random.default_rng(seed).uniform(9, 13, 3)
    distance = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(np.indices(SHAPE), centre, strict=True)))
    return np.select([distance < 3, distance < 5, distance < 7.5], [1, 4, 2], 0).astype(np.uint8)


def write_scans(folder):
    """Four subjects as they are downloaded, and a fifth that lacks a contrast."""
    for subject in range(5):
        name, label, noise = f"BraTS2021_0000{subject}", tumour(subject), np.random.default_rng(100 + subject)
        (folder / name).mkdir(parents=True)
        for number, word in enumerate((*CONTRASTS, "seg")):
            voxels = label if word == "seg" else (50 + 30 * (number + 1) * label + noise.normal(0, 5, SHAPE))
            voxels = voxels.astype(np.uint8 if word == "seg" else np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / name / f"{name}_{word}.nii.gz")
    (folder / "BraTS2021_00004" / "BraTS2021_00004_t2.nii.gz").unlink()
    return folder


def recipe_of(folder):
    """The packaged study with a tiny network, and of its stores and settings only that of all four contrasts."""
    network = {**NETWORK, "checkpoint": {"every_steps": 2, "keep": 1}, "steps": 4, "optim": {"warmup_steps": 1}}
    tree = {
        "extends": "studies/paper_brats",
        "data": {
            "scans": {"path": str(write_scans(folder / "downloaded"))},
            "all": {
                "config": {"val_fraction": 0.5, "workers": 1},
                "expect": {"volumes": 4, "shape": [[22, 26, 24], [22, 26, 24]]},
            },
        },
        "pretrain": {"config": {**network, "mae": {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}}},
        "finetune": {
            "config": {**network, "unetr": {"feature_size": 4}, "validation": {"every_steps": 2, "crops_per_volume": 1}}
        },
        "evaluate": {"overlap": 0.25, "flips": ["y"], "pictures": 1, "threads": 1},
        "finetune_seeds": [0],
        "experiments": {
            "contrasts": {"arms": ["scratch", "mae"], "settings": dict.fromkeys(("t1", "t1ce", "t2", "flair"))}
        },
        "only": ["contrasts"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Its graph with every node run, its report and the run of MAE."""
    folder = tmp_path_factory.mktemp("brats")
    config, graph, view = run_every_node(folder, recipe_of(folder), checked="all")
    run = next(graph.folder(config.run_dir, graph.nodes[t.finetune]) for t in graph.trials if t.arm == "mae")
    return folder, graph, view, run


def test_the_graph_is_one_store_of_four_contrasts_without_a_subject_that_lacks_one_and_two_arms(study):
    folder, graph, _, _ = study
    assert [node.verb for node in graph.nodes.values()].count("ingest") == 1
    assert [(trial.arm, trial.setting) for trial in graph.trials] == [("scratch", "all four"), ("mae", "all four")]
    (store,) = (graph.folder(folder / "study", node) for node in graph.nodes.values() if node.verb == "ingest")
    journal = map(json.loads, store.with_name(f"{store.name}.sources.jsonl").read_text().splitlines())
    (lame,) = (line for line in journal if line["outcome"] != "stored")
    assert (lame["outcome"], lame["detail"]) == ("quarantined", "channel 2 (t2) of 4 has no file")
    assert "BraTS2021_00004" in json.dumps(lame)


def test_whole_volumes_are_scored_as_nested_regions_against_the_labels_of_the_files(study):
    folder, _, _, run = study
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    assert scores["classes"] == ["TC", "WT", "ET"]
    assert scores["settings"]["flips"] == ["y"]
    truth = {}
    for subject in range(4):
        label = np.asarray(nibabel.load(next(folder.glob(f"downloaded/*{subject}/*_seg.nii.gz"))).dataobj)
        truth[tuple(int(np.isin(label, members).sum()) for members in ((1, 4), (1, 2, 4), (4,)))] = subject
    found = {tuple(case["scores"][name]["truth_voxels"] for name in ("TC", "WT", "ET")) for case in scores["cases"]}
    assert found < set(truth)
    assert len(found) == len(scores["cases"]) == 2
    assert scores["best"]["mean"]["without_background"]["dice"] is not None
    # In pictures the smaller region lies above the larger one.
    (slices,) = (run / "evaluate" / "slices").iterdir()
    assert {1, 2, 3} <= {int(v) for plane in load_planes(slices).values() for v in np.unique(plane.layers["truth"])}


def test_its_report_has_a_row_for_each_region_and_none_for_a_background(study):
    folder, _, view, run = study
    (section,) = view.sections
    dice = section.classes[0]
    assert [row[0] for row in dice.rows] == ["TC", "WT", "ET"]
    assert dice.columns == ["class", "scratch, all four", "mae, all four"]
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    assert dice.rows[0][2] == f"{scores['per_class']['TC']['dice']['mean']:.3f}"
    table = section.tables[0]
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["Dice"] == f"{scores['mean']['without_background']['dice']:.3f}"
    assert row["Dice with background"] == "n/a"
    assert row["Dice, best on validation"] != "n/a"
    assert view.classes == ["TC", "WT", "ET"]
    page = (folder / "study" / "report" / "index.html").read_text()
    assert len(list((folder / "study" / "report").glob("*_segmentation_*.png"))) == 2
    assert "no leaderboard" in page
    assert "| TC |" in (folder / "study" / "report" / "results.md").read_text()
