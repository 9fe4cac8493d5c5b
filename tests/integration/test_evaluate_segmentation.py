import csv
import json

import nibabel
import numpy as np
import pytest
import torch
from small_segmentation import CLASSES, SOURCES, Threshold, make_finetune_run, make_store

from mimscale.cli import main
from mimscale.evaluate import weights
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.evaluate.slices import load_planes
from mimscale.store.manifest import load_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    return make_finetune_run(tmp_path_factory.mktemp("runs") / "finetune", store)


@pytest.fixture(scope="module")
def scores(run):
    return evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=2))


@pytest.mark.parametrize("volume", SOURCES)
def test_a_prediction_lies_on_the_grid_of_the_source_file_whatever_its_orientation(volume, run, store, scores):
    source = nibabel.load(store.parent / "sources" / f"{volume}.nii.gz")
    prediction = nibabel.load(run / "evaluate" / "predictions" / f"{volume}.nii.gz")
    assert "".join(nibabel.aff2axcodes(prediction.affine)) == SOURCES[volume][0]
    assert prediction.shape == source.shape
    assert np.array_equal(prediction.affine, source.affine)
    assert prediction.get_data_dtype() == np.uint8
    assert int(prediction.header["sform_code"]) == 1


def test_a_network_that_is_right_scores_one_and_its_files_equal_the_source_labels(store, monkeypatch, tmp_path):
    # The label files went another way than the predictions: drawn on the source's axes, read back by nibabel alone.
    run = make_finetune_run(tmp_path / "run", store)
    contract = json.loads(next((run / "checkpoints").glob("step_*/contract.json")).read_text())
    monkeypatch.setattr(weights, "load_model", lambda *arguments: (Threshold(), contract))
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0))
    assert scores["mean"]["with_background"]["dice"] == 1.0
    assert scores["mean"]["without_background"] == {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0}
    assert scores["store_grid"]["mean"]["with_background"]["dice"] == 1.0
    for name in SOURCES:
        label = nibabel.load(store.parent / "sources" / f"{name}_label.nii.gz")
        predicted = nibabel.load(run / "evaluate" / "predictions" / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(predicted.dataobj), np.asarray(label.dataobj)), name


def test_a_network_of_another_spacing_is_scored_on_the_grids_of_store_and_source(store, monkeypatch, tmp_path):
    spacing_mm = load_manifest(store).row(0).spacing_mm
    run = make_finetune_run(tmp_path / "run", store)
    text = (run / "config.yaml").read_text()
    assert text.count("target_spacing_mm: null") == 1
    finer = f"target_spacing_mm: {[0.5 * mm for mm in spacing_mm]}"
    (run / "config.yaml").write_text(text.replace("target_spacing_mm: null", finer))
    contract = json.loads(next((run / "checkpoints").glob("step_*/contract.json")).read_text())
    seen = []

    class Counting(Threshold):
        def forward(self, windows):
            seen.append(windows.shape)
            return super().forward(windows)

    monkeypatch.setattr(weights, "load_model", lambda *arguments: (Counting(), contract))
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0))
    fine = len(seen)
    seen.clear()
    monkeypatch.setattr(weights, "load_model", lambda *arguments: (Counting(), contract))
    run = make_finetune_run(tmp_path / "plain", store)
    evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0))
    assert fine > 2 * len(seen), "the network did not see more voxels"
    # There and back again blurs what a threshold makes of noise, and little else.
    assert scores["mean"]["without_background"]["dice"] > 0.9
    for name in SOURCES:
        label = nibabel.load(store.parent / "sources" / f"{name}_label.nii.gz")
        predicted = nibabel.load(run / "evaluate" / "predictions" / f"{name}.nii.gz")
        assert predicted.shape == label.shape


def test_scores_are_per_case_and_class_with_both_means(scores):
    assert [case["volume"] for case in scores["cases"]] == list(SOURCES)
    assert list(scores["per_class"]) == list(CLASSES)
    dice = {name: scores["per_class"][name]["dice"]["mean"] for name in CLASSES}
    assert scores["mean"]["with_background"]["dice"] == pytest.approx(np.mean(list(dice.values())))
    assert scores["mean"]["without_background"]["dice"] == pytest.approx((dice["grey"] + dice["white"]) / 2)


def test_the_stored_grid_gives_the_same_dice_since_it_is_only_turned(scores):
    for name in CLASSES:
        source, stored = (tree["per_class"][name]["dice"]["mean"] for tree in (scores, scores["store_grid"]))
        assert source == stored


def test_scores_json_holds_what_was_returned_and_no_nan(run, scores):
    text = (run / "evaluate" / "scores.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["kind"] == scores["kind"] == "finetune"


def test_the_table_of_cases_has_a_line_for_each_volume_and_class(run, scores):
    lines = list(csv.DictReader((run / "evaluate" / "cases.csv").read_text().splitlines()))
    assert [(line["volume"], line["class"]) for line in lines] == [(v, c) for v in SOURCES for c in CLASSES]
    first = scores["cases"][0]["scores"]["grey"]
    assert [float(lines[1][name]) for name in ("dice", "hd95_mm", "nsd")] == [
        first[name] for name in ("dice", "hd95_mm", "nsd")
    ]
    assert float(lines[1]["store_grid_dice"]) == scores["cases"][0]["store_grid_scores"]["grey"]["dice"]
    assert lines[0]["hd95_mm"] == ""


def test_slices_are_kept_for_as_many_volumes_as_asked_for(run, scores):
    assert [case.get("slices") for case in scores["cases"]] == ["slices/aaaa.npz", "slices/bbbb.npz", None]
    planes = load_planes(run / "evaluate" / "slices" / "bbbb.npz")
    assert planes["axial"].layers.keys() == {"image", "truth", "prediction"}
    assert planes["axial"].layers["truth"].max() == 2


def test_the_verb_prints_scores_as_json_on_stdout_and_the_table_on_stderr(store, capsys, tmp_path):
    run = make_finetune_run(tmp_path / "run", store)
    words = [
        "threads=1",
        f"run_dir={run}",
        f"store={store}",
        "save_predictions=false",
        "store_grid=false",
        "pictures=0",
        "batch=4",
    ]
    assert main(["evaluate", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert tree["per_class"]["grey"]["dice"]["cases"] == 3
    assert tree["mean"].keys() == {"with_background", "without_background"}
    assert "without background" in err
    assert "evaluate 3 volumes" in err
    assert sorted(path.name for path in (run / "evaluate").iterdir()) == ["cases.csv", "scores.json"]


def test_a_new_evaluation_leaves_nothing_of_the_one_before(store, tmp_path):
    run = make_finetune_run(tmp_path / "run", store)
    evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=1))
    assert (run / "evaluate" / "slices").exists()
    evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0, save_predictions=False))
    assert sorted(path.name for path in (run / "evaluate").iterdir()) == ["cases.csv", "scores.json"]


def test_volumes_without_label_are_refused_by_name_or_left_out(tmp_path, capsys):
    store = make_store(tmp_path / "data", labelled=("aaaa", "cccc"))
    run = make_finetune_run(tmp_path / "run", store)
    assert main(["evaluate", "threads=1", f"run_dir={run}"]) == 3
    assert "1 of 3 volumes of split=val have no overlay 'label': bbbb; leave them out" in capsys.readouterr().err
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, unlabelled="skip", pictures=0, batch=4, store_grid=False))
    assert [case["volume"] for case in scores["cases"]] == ["aaaa", "cccc"]


def test_a_split_without_any_label_is_an_error(tmp_path, capsys):
    store = make_store(tmp_path / "data", labelled=())
    run = make_finetune_run(tmp_path / "run", store)
    assert main(["evaluate", "threads=1", f"run_dir={run}", "unlabelled=skip"]) == 3
    assert "none of the 3 volumes of split=val has overlay 'label'" in capsys.readouterr().err


def test_an_empty_split_is_an_error_that_names_it(run, capsys):
    assert main(["evaluate", "threads=1", f"run_dir={run}", "split=test"]) == 3
    assert "no volume with {'split': 'test'}" in capsys.readouterr().err


def test_a_store_with_another_intensity_contract_is_refused_with_both(tmp_path, store, capsys):
    window = {"kind": "window", "window": [-1000, 1000]}
    run = make_finetune_run(tmp_path / "run", store, intensity=window)
    assert main(["evaluate", "threads=1", f"run_dir={run}"]) == 2
    err = capsys.readouterr().err
    assert "[0.0, 1000.0]" in err
    assert "[-1000, 1000]" in err


def test_a_store_with_other_classes_is_refused_with_both(tmp_path, store, capsys):
    run = make_finetune_run(tmp_path / "run", store, class_names=["background", "liver", "spleen"])
    assert main(["evaluate", "threads=1", f"run_dir={run}"]) == 2
    err = capsys.readouterr().err
    assert "'grey'" in err
    assert "'liver'" in err


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(run, capsys):
    assert main(["evaluate", "threads=1", f"run_dir={run}", "checkpoint=step_00000099"]) == 4
    assert "step_00000099: no such checkpoint; there are: step_00000005" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(tmp_path, store, capsys):
    run = make_finetune_run(tmp_path / "run", store)
    config = (run / "config.yaml").read_text()
    assert "feature_size: 4" in config
    (run / "config.yaml").write_text(config.replace("feature_size: 4", "feature_size: 6"))
    assert main(["evaluate", "threads=1", f"run_dir={run}"]) == 4
    assert "its weights are not those of config.yaml's network" in capsys.readouterr().err


def test_a_network_that_answers_nan_is_a_checkpoint_error_that_names_the_volume(tmp_path, store, capsys, monkeypatch):
    run = make_finetune_run(tmp_path / "run", store)
    real = weights.load_model

    def broken(*arguments):
        model, contract = real(*arguments)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model, contract

    monkeypatch.setattr(weights, "load_model", broken)
    assert main(["evaluate", "threads=1", f"run_dir={run}"]) == 4
    assert "volume aaaa: the network answered with numbers that are not finite" in capsys.readouterr().err
    assert not (run / "evaluate" / "scores.json").exists()
