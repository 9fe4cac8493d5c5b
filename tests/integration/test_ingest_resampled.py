"""Stores whose volumes lie on another grid than their sources: from ingest to scores and exports on the source grid."""

import json

import nibabel
import numpy as np
import pytest
from small_segmentation import CLASSES, SOURCES, Threshold, make_finetune_run
from small_segmentation import make_store as make_small_store
from store_samples import config_of, opened, phantom, rows_of, write_key, write_nifti

from mimscale.cli import main
from mimscale.errors import ConfigError, DataError
from mimscale.evaluate import weights
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.ingest.geometry import spacing_zyx_mm
from mimscale.ingest.run import ingest
from mimscale.store.manifest import load_manifest
from mimscale.store.verify import verify
from mimscale.train.config import load_run_config
from mimscale.train.training_data import TrainingData

WINDOW = {"kind": "window", "window": [0.0, 1000.0]}
OPTIONS = {"class_names": list(CLASSES), "val_fraction": 0, "intensity": WINDOW, "parts": 2, "chunk_voxels": 16}
RESAMPLED = {"spacing_mm": [1.6, 1.2, 1.2]}
CROPPED = {"crop": "foreground", "crop_margin_mm": 2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Oblique volumes of three orientations with labels, in air without noise: so they have a box of foreground."""
    folder = tmp_path_factory.mktemp("sources")
    make_small_store(folder)
    for name in SOURCES:
        image = nibabel.load(folder / "sources" / f"{name}.nii.gz")
        label = voxels(folder / "sources" / f"{name}_label.nii.gz")
        write_nifti(
            folder / "sources" / f"{name}.nii.gz", np.where(label, image.dataobj, 20).astype(np.int16), image.affine
        )
    return folder / "sources"


def pairs_of(sources):
    return [
        {"image": str(sources / f"{name}.nii.gz"), "label": str(sources / f"{name}_label.nii.gz")} for name in SOURCES
    ]


def options_of(store):
    """What `store` was made with."""
    rows = rows_of(store)
    return OPTIONS | (RESAMPLED if rows[0].resampled else {}) | (CROPPED if any(row.crop_box for row in rows) else {})


def names_of(store):
    """Volume id -> name of its source."""
    lines = [json.loads(line) for line in store.with_name(f"{store.name}.sources.jsonl").read_text().splitlines()]
    return {line["id"]: line["source"].rpartition("/")[2].partition(".")[0] for line in lines if line.get("id")}


def voxels(path):
    return np.asarray(nibabel.load(path).dataobj)


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.fixture(scope="module", params=[RESAMPLED, CROPPED, RESAMPLED | CROPPED], ids=["resampled", "cropped", "both"])
def store(request, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "store"
    summary = ingest(config_of(pairs_of(sources), out, **OPTIONS, **request.param))
    assert (summary["stored"], summary["quarantined"]) == (3, 0)
    return out


def test_the_manifest_says_what_is_stored_and_statistics_are_of_that(store):
    _, reader = opened(store)
    for row in rows_of(store):
        name = names_of(store)[row.id]
        if row.resampled:
            assert row.spacing_mm == pytest.approx((1.6, 1.2, 1.2))
        else:
            assert sorted(row.spacing_mm) == pytest.approx(sorted(SOURCES[name][2]), rel=1e-6)
        assert row.spacing_mm == spacing_zyx_mm(np.reshape(row.affine, (4, 4)))
        stored = reader.read_volume(row)
        assert stored.shape == row.shape
        assert row.stats[0].mean == pytest.approx(stored.mean(), rel=1e-9)
        assert row.dtype == "int16"
        assert all(
            0 <= start < stop <= edge for (start, stop), edge in zip(row.foreground_box, row.shape[1:], strict=True)
        )
        if row.crop_box is not None:
            assert all(stop <= edge for (_, stop), edge in zip(row.crop_box, row.source_zyx, strict=True))
            assert row.crop_box != tuple((0, edge) for edge in row.source_zyx)
        assert set(row.overlays) == {"label", "label_source"}
        assert (row.overlays["label"].source_zyx, row.overlays["label_source"].source_zyx) == (None, row.source_zyx)
        assert reader.read_volume(row, "label").shape == row.shape
        assert reader.read_volume(row, "label_source").shape == (1, *row.source_zyx)
    assert any(row.crop_box for row in rows_of(store)) or all(row.resampled for row in rows_of(store))
    assert verify(store) == []


def test_an_exported_label_is_its_file_again_whatever_was_stored(store, sources, tmp_path):
    for volume_id, name in names_of(store).items():
        out = tmp_path / f"{name}.nii.gz"
        assert main(["export", str(store), volume_id, str(out), "overlay=label"]) == 0
        assert np.array_equal(voxels(out), voxels(sources / f"{name}_label.nii.gz"))
        assert np.array_equal(nibabel.load(out).affine, nibabel.load(sources / f"{name}_label.nii.gz").affine)


def test_an_exported_image_lies_on_the_grid_of_its_file_and_what_it_is_not_is_said(store, sources, tmp_path, capsys):
    for row in rows_of(store):
        name = names_of(store)[row.id]
        out = tmp_path / f"{name}.nii.gz"
        assert main(["export", str(store), row.id, str(out)]) == 0
        said = capsys.readouterr().err
        assert ("was resampled to 1.6 x 1.2 x 1.2 mm" in said) == row.resampled
        assert ("no longer those of the scanner" in said) == row.resampled
        assert (f"outside stands its fill value {row.fill_value:g}" in said) == (row.crop_box is not None)
        exported, scanned = nibabel.load(out), nibabel.load(sources / f"{name}.nii.gz")
        assert exported.shape == scanned.shape
        assert exported.get_data_dtype() == np.int16
        assert np.array_equal(exported.affine, scanned.affine)
        difference = np.abs(voxels(out).astype(float) - voxels(sources / f"{name}.nii.gz"))
        if row.resampled:
            assert difference.mean() < 30  # inside, the noise has a deviation of 30, and there are steps of 300
        else:
            assert not difference.any()  # what was cropped off is air, and so is the fill value


def test_a_network_is_scored_on_the_grid_of_the_source_against_its_label(store, sources, tmp_path, monkeypatch):
    run = make_finetune_run(tmp_path / "run", store)
    contract = json.loads(next((run / "checkpoints").glob("step_*/contract.json")).read_text())
    monkeypatch.setattr(weights, "load_model", lambda *arguments: (Threshold(), contract))
    scores = evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=1, split="train"))
    for case in scores["cases"]:
        name = names_of(store)[case["volume"]]
        label = voxels(sources / f"{name}_label.nii.gz")
        predicted = nibabel.load(run / "evaluate" / "predictions" / f"{case['volume']}.nii.gz")
        assert np.array_equal(predicted.affine, nibabel.load(sources / f"{name}_label.nii.gz").affine)
        predicted = voxels(run / "evaluate" / "predictions" / f"{case['volume']}.nii.gz")
        assert predicted.shape == label.shape
        for value, class_name in enumerate(CLASSES):
            score = case["scores"][class_name]
            assert score["truth_voxels"] == (label == value).sum()  # of the file, not of what is stored
            assert score["dice"] == pytest.approx(dice(predicted == value, label == value), abs=1e-6)
            assert score["dice"] > 0.9


def test_labels_that_come_later_are_stored_as_those_that_came_at_once(store, sources, tmp_path):
    options, later = options_of(store), tmp_path / "later"
    images = [{"image": pair["image"]} for pair in pairs_of(sources)]
    ingest(config_of(images, later, **options))
    assert all(row.overlays == {} for row in rows_of(later))
    assert ingest(config_of(pairs_of(sources), later, **options))["overlays"] == 3

    def overlays(folder):
        return {row.id: {name: one.sha256 for name, one in row.overlays.items()} for row in rows_of(folder)}

    assert overlays(later) == overlays(store)
    assert verify(later) == []


def test_a_subject_leaves_with_the_labels_on_its_source_grid(store, sources, tmp_path):
    options, key = options_of(store), write_key(tmp_path / "key")
    out = tmp_path / "store"
    config = {**options, "subject_key": key}
    ingest(config_of([{"image": pair["image"]} for pair in pairs_of(sources)], out, **config))
    ingest(config_of(pairs_of(sources), out, **config))  # labels in parts of their own
    gone = next(volume_id for volume_id, name in names_of(out).items() if name == "bbbb")
    assert ingest(config_of(pairs_of(sources), out, **config, remove="bbbb"))["stored"] == 2
    assert verify(out) == []
    assert gone not in {row.id for row in rows_of(out)}
    assert not [path for path in out.rglob("*") if path.is_file() and gone.encode() in path.read_bytes()]
    _, reader = opened(out)
    for row in rows_of(out):
        assert reader.read_volume(row, "label_source").any()


def test_inspect_counts_the_spacing_that_is_stored(store, capsys):
    assert main(["inspect", str(store), "--json"]) == 0
    spacings = json.loads(capsys.readouterr().out)["spacings_mm"]
    scanned = {"2 x 1.5 x 1": 1, "3 x 1 x 0.5": 1, "2 x 1 x 1": 1}
    assert spacings == ({"1.6 x 1.2 x 1.2": 3} if rows_of(store)[0].resampled else scanned)


def test_a_crop_that_cuts_off_label_voxels_keeps_them_for_the_score_and_for_the_export(tmp_path):
    image = np.zeros((40, 36, 30), dtype=np.int16)
    image[12:28, 10:26, 8:22] = 500
    label = np.zeros(image.shape, dtype=np.uint8)
    label[14:38, 12:20, 10:20] = 2  # far into the air
    pair = {
        "image": str(write_nifti(tmp_path / "i.nii", image, np.diag([1.0, 1.0, 1.0, 1.0]))),
        "label": str(write_nifti(tmp_path / "l.nii", label, np.diag([1.0, 1.0, 1.0, 1.0]))),
    }
    ingest(config_of([pair], tmp_path / "store", crop="foreground", crop_margin_mm=3))
    row = rows_of(tmp_path / "store")[0]
    assert row.crop_box == ((5, 25), (7, 29), (9, 31))
    assert row.overlays["label"].class_voxels[2] == 17 * 8 * 10
    assert row.overlays["label_source"].class_voxels[2] == 24 * 8 * 10
    words = ["export", str(tmp_path / "store"), row.id]
    assert main([*words, str(tmp_path / "label.nii"), "overlay=label"]) == 0
    assert np.array_equal(voxels(tmp_path / "label.nii"), label)
    assert main([*words, str(tmp_path / "image.nii")]) == 0
    assert np.array_equal(voxels(tmp_path / "image.nii"), image)


def test_a_constant_image_and_one_that_fills_its_grid_are_kept_whole(tmp_path):
    write_nifti(tmp_path / "s" / "constant.nii.gz", np.full((30, 31, 32), 7, dtype=np.int16))
    full = (np.random.RandomState(0).rand(30, 31, 33) * 100 + 1000).astype(np.int16)
    full[0, 0, 0] = 0
    write_nifti(tmp_path / "s" / "full.nii.gz", full)
    summary = ingest(config_of(str(tmp_path / "s"), tmp_path / "store", crop="foreground", crop_margin_mm=0))
    assert summary["stored"] == 2
    for row in rows_of(tmp_path / "store"):
        assert row.crop_box is None
        assert row.shape[1:] == row.source_zyx


def test_several_channels_are_cropped_by_the_foreground_of_all_and_resampled_each_by_itself(tmp_path):
    channels = []
    for number, box in enumerate((np.s_[10:20, 10:30, 10:30], np.s_[15:34, 12:20, 10:30])):
        image = np.zeros((40, 40, 40), dtype=np.int16 if number else np.uint8)
        image[box] = 200
        channels.append(str(write_nifti(tmp_path / f"{number}.nii", image, np.diag([1.0, 1.0, 1.0, 1.0]))))
    options = {"crop": "foreground", "crop_margin_mm": 2, "spacing_mm": 2}
    ingest(config_of([{"image": channels}], tmp_path / "store", **options))
    _, reader = opened(tmp_path / "store")
    row = rows_of(tmp_path / "store")[0]
    assert row.crop_box == ((8, 32), (8, 32), (8, 36))
    stored = reader.read_volume(row)
    assert stored.shape == (2, 12, 12, 14)
    assert [int((channel > 100).sum()) for channel in stored] == [10 * 10 * 5, 10 * 4 * 9]  # half of its ends is air


def test_spacings_that_cannot_be_are_typed_reasons_in_the_summary(tmp_path):
    write_nifti(tmp_path / "s" / "good.nii.gz", phantom(0))
    write_nifti(tmp_path / "s" / "metres.nii.gz", phantom(1), np.diag([1000.0, 1500.0, 2000.0, 1.0]))
    write_nifti(tmp_path / "s" / "micro.nii.gz", phantom(2), np.diag([0.001, 0.0015, 0.002, 1.0]))
    summary = ingest(config_of(str(tmp_path / "s"), tmp_path / "store", spacing_mm=2))
    assert summary["reasons"] == {"too_coarse": 1, "too_large": 1}
    assert summary["stored"] == 1
    assert (
        "21 x 37 x 40 voxels of 0.002 x 0.0015 x 0.001 mm at spacing_mm 2 x 2 x 2" in summary["examples"]["too_coarse"]
    )
    assert "more than 32 times as many voxels" in summary["examples"]["too_large"]


def test_gates_judge_the_scan_and_not_what_is_stored_of_it(tmp_path):
    write_nifti(tmp_path / "s" / "thick.nii.gz", phantom(0), np.diag([1.1, 1.1, 9.0, 1.0]))
    options = {"spacing_mm": [9, 3, 3], "crop": "foreground", "crop_margin_mm": 0}
    ingest(config_of(str(tmp_path / "s"), tmp_path / "store", **options))
    row = rows_of(tmp_path / "store")[0]
    assert min(row.shape[1:]) < 16
    assert min(edge * mm for edge, mm in zip(row.shape[1:], row.spacing_mm, strict=True)) < 40
    assert row.warnings == ("coarse_spacing",)
    summary = ingest(config_of(str(tmp_path / "s"), tmp_path / "fine", spacing_mm=1))
    assert summary["warnings"] == {"coarse_spacing": 1}


def test_volumes_of_another_spacing_or_crop_are_refused_for_a_store_that_stands(sources, tmp_path):
    pairs = pairs_of(sources)
    ingest(config_of(pairs[:1], tmp_path / "store", **OPTIONS, **RESAMPLED))
    for changed, message in (({"spacing_mm": 2}, "spacing_mm"), (RESAMPLED | CROPPED, "crop: 'none' -> 'foreground'")):
        with pytest.raises(ConfigError, match=f"(?s)another config.*{message}"):
            ingest(config_of(pairs, tmp_path / "store", **OPTIONS, **changed))
    assert ingest(config_of(pairs, tmp_path / "store", **OPTIONS, **RESAMPLED))["stored"] == 3


def test_training_on_labels_of_the_source_grid_is_refused_with_the_name_to_use(store, tmp_path):
    with pytest.raises(ConfigError, match=r"train with overlay=label$"):
        TrainingData(load_run_config(make_finetune_run(tmp_path / "run", store)), "label_source")
    manifest, reader = load_manifest(store), opened(store)[1]
    with pytest.raises(DataError, match=r"'label_source' lies on the grid of the source.*use overlay=label"):
        reader.read(manifest.sample_row(0), (0, 0, 0), (8, 8, 8), overlay="label_source")
    assert reader.read(manifest.sample_row(0), (0, 0, 0), (8, 8, 8), overlay="label").shape == (1, 8, 8, 8)
