"""Regions that may overlap, as BraTS has them: scored, written and drawn on whole volumes."""

import csv
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from small_segmentation import CLASSES, SOURCES, make_finetune_run, make_store
from torch import nn

from mimscale.cli import main
from mimscale.errors import ConfigError
from mimscale.evaluate import weights
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.outputs import Regions, outputs_of
from mimscale.evaluate.run import evaluate
from mimscale.evaluate.slices import load_planes
from mimscale.train.config import load_run_config

REGIONS = {"all": ["grey", "white"], "core": ["white"]}


class Threshold(nn.Module):
    """Tells by intensity what lies in which region, so it is never wrong: grey is at 0.32, white at 0.62."""

    def forward(self, windows):
        return 10 * (windows - torch.tensor([0.17, 0.47]).view(1, 2, 1, 1, 1))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A store, a run of regions that is right, and its scores."""
    folder = tmp_path_factory.mktemp("regions")
    store = make_store(folder / "data")
    run = make_finetune_run(folder / "run", store, outputs=2, fields={"regions": REGIONS})
    contract = json.loads(next((run / "checkpoints").glob("step_*/contract.json")).read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load_model", lambda *arguments: (Threshold(), contract))
        scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=1))
    return store, run, scores


def test_a_network_that_is_right_scores_one_in_every_region_and_there_is_no_background(scored):
    *_, scores = scored
    assert (scores["classes"], scores["regions"]) == (["all", "core"], REGIONS)
    assert list(scores["per_class"]) == ["all", "core"]
    assert scores["mean"]["without_background"] == {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0}
    assert set(scores["mean"]["with_background"].values()) == {None}
    assert scores["store_grid"]["mean"]["without_background"]["dice"] == 1.0
    for case in scores["cases"]:
        assert case["scores"]["all"]["truth_voxels"] > case["scores"]["core"]["truth_voxels"] > 0


@pytest.mark.parametrize("volume", SOURCES)
def test_each_region_is_a_mask_on_the_grid_of_the_source(volume, scored):
    store, run, scores = scored
    label = nibabel.load(store.parent / "sources" / f"{volume}_label.nii.gz")
    truth = np.asarray(label.dataobj)
    for region, inside in (("all", truth > 0), ("core", truth == 2)):
        predicted = nibabel.load(run / "evaluate" / "predictions" / volume / f"{region}.nii.gz")
        assert np.allclose(predicted.affine, label.affine)
        assert np.array_equal(np.asarray(predicted.dataobj), inside)
    case = next(case for case in scores["cases"] if case["volume"] == volume)
    assert case["predictions"] == [f"predictions/{volume}/{region}.nii.gz" for region in REGIONS]


def test_the_table_of_cases_has_a_line_for_each_region(scored):
    _, run, _ = scored
    lines = list(csv.DictReader((run / "evaluate" / "cases.csv").read_text().splitlines()))
    assert [(line["volume"], line["class"]) for line in lines] == [(v, r) for v in SOURCES for r in REGIONS]
    assert {(line["dice"], line["hd95_mm"], line["store_grid_dice"]) for line in lines} == {("1.0", "0.0", "1.0")}


def test_the_smaller_of_two_regions_is_drawn_above_the_larger_whatever_their_order(scored):
    _, run, _ = scored
    for plane in load_planes(run / "evaluate" / "slices" / "aaaa.npz").values():
        assert set(np.unique(plane.layers["truth"])) == {0, 1, 2}
        assert np.array_equal(plane.layers["truth"], plane.layers["prediction"])
    config = load_run_config(run)
    outputs = outputs_of(config, CLASSES)
    turned = Regions(outputs.names[::-1], outputs.classes_of_region[::-1])
    truth = np.array([[[0, 1, 2, 255]]], dtype=np.uint8)
    assert outputs.truth_drawn(truth).tolist() == [[[0, 1, 2, 255]]]
    assert turned.truth_drawn(truth).tolist() == [[[0, 2, 1, 255]]]


def test_the_verb_and_the_report_show_regions(tmp_path, capsys):
    store = make_store(tmp_path / "data")
    run = make_finetune_run(tmp_path / "run", store, outputs=2, fields={"regions": REGIONS})
    words = ["threads=1", f"run_dir={run}", "batch=4", "save_predictions=false", "pictures=1"]
    assert main(["evaluate", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["regions"] == REGIONS
    assert "core" in err
    assert main(["report", str(run)]) == 0
    text = (run / "report" / "index.html").read_text()
    assert '"></span>all' in text
    assert '"></span>core' in text
    assert "Dice of the whole volume: all " in text


def test_regions_of_any_name_are_files_and_two_of_one_name_are_refused(scored):
    *_, run, _ = scored
    config = load_run_config(run)
    outputs = outputs_of(replace(config, regions={"../a b": ["grey"], "": ["white"]}), CLASSES)
    assert list(outputs.files("v", np.zeros((2, 1, 1, 1), np.uint8))) == ["v/_a b.nii.gz", "v/_.nii.gz"]
    with pytest.raises(ConfigError, match="regions a/b, a:b: two of them would be files of one name"):
        outputs_of(replace(config, regions={"a/b": ["grey"], "a:b": ["white"]}), CLASSES)
