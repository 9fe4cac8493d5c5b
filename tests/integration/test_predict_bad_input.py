"""What predict refuses: one clear message each, and nothing half written."""

import os

import dicom_samples
import nibabel
import numpy as np
import pydicom
import pytest
from predict_samples import write_series
from small_segmentation import make_finetune_run, make_pretrain_run, make_store

from mimscale.cli import main
from mimscale.evaluate.outputs import file_name
from mimscale.predict import write
from mimscale.stream.config import StreamConfig

WORDS = ["threads=1", "batch=4"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return make_finetune_run(tmp_path_factory.mktemp("runs") / "run", store)


@pytest.fixture
def image(store):
    return store.parent / "sources" / "aaaa.nii.gz"


def predict(*words):
    return main(["predict", *map(str, words), *WORDS])


def test_a_run_that_only_pretrained_has_nothing_to_segment_with(store, image, tmp_path, capsys):
    pretrained = make_pretrain_run(tmp_path / "pre", store)
    assert predict(pretrained, image, f"out={tmp_path / 'out'}") == 2
    err = capsys.readouterr().err
    assert f"{pretrained}: has no segmentation model, it pretrained an encoder (method=mae)" in err
    assert f"init_from={pretrained}" in err


def test_a_folder_that_is_no_run_and_a_run_without_a_checkpoint_are_named(store, image, tmp_path, capsys):
    assert predict(tmp_path, image) == 2
    assert f"{tmp_path}: no config.yaml, so this is no run directory" in capsys.readouterr().err
    young = make_finetune_run(tmp_path / "young", store)
    (tag,) = (young / "checkpoints").iterdir()
    tag.rename(tmp_path / "elsewhere")
    assert predict(young, image) == 4
    assert "no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["run"]])
def test_a_run_and_an_input_are_needed(words, run, capsys):
    assert predict(*(run if word == "run" else word for word in words)) == 2
    assert "expected RUN_DIR [RUN_DIR ...] INPUT [INPUT ...]" in capsys.readouterr().err


def test_one_bad_input_among_many_is_named_and_the_others_are_done(run, image, store, tmp_path, capsys):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(image.read_bytes()[:200])
    text = tmp_path / "notes.txt"
    text.write_text("no volume")
    gone = tmp_path / "gone.nii.gz"
    other = store.parent / "sources" / "cccc.nii.gz"
    out = tmp_path / "out"
    assert predict(run, image, bad, text, gone, other, f"out={out}") == 3
    stdout, err = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["aaaa.nii.gz", "cccc.nii.gz"]
    assert stdout.split() == [str(out / "aaaa.nii.gz"), str(out / "cccc.nii.gz")]
    assert "2 of 5 inputs done" in err
    assert f"{bad}: " in err
    assert "unreadable" in err or "truncated" in err
    assert f"{text}: is neither DICOM nor named like another format (not_dicom" in err
    assert f"{gone}: no such file" in err or f"sources={gone}: no such file or folder" in err


def test_another_number_of_channels_is_one_message_with_both(run, store, image, tmp_path, capsys):
    voxels = np.asarray(nibabel.load(image).dataobj)
    four = tmp_path / "four.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels] * 4, -1), nibabel.load(image).affine), four)
    assert predict(run, four, f"out={tmp_path / 'out'}") == 3
    err = capsys.readouterr().err
    assert f"{four}: has not the axes that were asked for" in err
    assert "the networks were trained on 1 channel(s): give a file of three axes" in err
    assert predict(run, f"{image},{image}", f"out={tmp_path / 'out'}") == 3
    assert f"{image},{image}: has 2 channels, the networks were trained on 1" in capsys.readouterr().err
    many = make_finetune_run(tmp_path / "many", store, channels=4)
    assert predict(many, image, f"out={tmp_path / 'out'}") == 3
    assert "trained on 4 channel(s): give a file of four axes, the fourth of 4, or 4 files joined by commas" in (
        capsys.readouterr().err
    )
    series, _ = write_series(tmp_path / "series")
    assert predict(many, series[0].parent, f"out={tmp_path / 'out'}") == 3
    assert "a DICOM series has one channel, channels=4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_two_series_is_refused_with_a_list_and_series_chooses(run, tmp_path, capsys):
    folder = tmp_path / "study"
    uids = []
    for number, name in enumerate(("t1", "t2")):
        files, _ = write_series(folder / name, seed=number)
        uids.append(str(pydicom.dcmread(files[0]).SeriesInstanceUID))
    scout = dicom_samples.slices(np.zeros((1, 8, 8), np.int16), modality="MR", ImageType=["ORIGINAL", "LOCALIZER"])
    dicom_samples.save(scout, folder / "scout")
    out = tmp_path / "out"
    assert predict(run, folder, f"out={out}") == 3
    err = capsys.readouterr().err
    assert f"{folder}: holds 2 DICOM series" in err
    assert all(f"{uid}: 14 files, mr, in {folder}" in err for uid in uids)
    assert "choose one with series=UID, take all with series=all, or give the folder of one" in err
    assert not out.exists()
    assert predict(run, folder, f"out={out}", "series=1.2.3", "format=nifti") == 3
    assert f"{folder}: holds no series 1.2.3; there are:" in capsys.readouterr().err
    assert predict(run, folder, f"out={out}", f"series={uids[1]}", "format=nifti") == 0
    assert [path.name for path in out.iterdir()] == ["t2.nii.gz"]
    assert predict(run, folder, f"out={out}", "series=all", "format=nifti", "existing=skip") == 0
    assert sorted(path.name for path in out.iterdir()) == ["t1.nii.gz", "t2.nii.gz"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"class_names": ["background", "liver", "spleen"]}, "class_names: ['background', 'grey', 'white'] -> ["),
        ({"intensity": {"kind": "zscore", "window": None}}, "intensity.kind: 'window' -> 'zscore'"),
        ({"stored_as": {"spacing_mm": 1.5}}, "stored_as.spacing_mm: None -> 1.5"),
        ({"modality": "ct"}, "modality: 'mr' -> 'ct'"),
        ({"channels": 2}, "channels: 1 -> 2"),
        (
            {"fields": {"stream": StreamConfig(target_spacing_mm=(1, 1, 1))}},
            "target_spacing_mm: None -> [1.0, 1.0, 1.0]",
        ),
        ({"outputs": 2, "fields": {"regions": {"all": ["grey", "white"], "core": ["white"]}}}, "regions"),
        ({"spacing_mm": [5.0, 1.0, 1.0]}, "spacing_mm of the training volumes: [1.0, 1.0, 1.0] -> [5.0, 1.0, 1.0]"),
    ],
)
def test_folds_that_were_trained_on_different_things_are_refused_with_both_values(
    changes, line, store, image, tmp_path, capsys
):
    first = make_finetune_run(tmp_path / "first", store, spacing_mm=[1.0, 1.0, 1.0])
    other = make_finetune_run(tmp_path / "other", store, **changes)
    assert predict(first, other, image, f"out={tmp_path / 'out'}") == 2
    err = capsys.readouterr().err
    assert f"{first} and {other} cannot answer together" in err
    assert line in err
    assert not (tmp_path / "out").exists()


def test_folds_may_differ_in_weights_and_windows(store, image, tmp_path):
    folds = [
        make_finetune_run(tmp_path / str(seed), store, seed=seed, fields={"crop_voxels": crop})
        for seed, crop in enumerate([(16, 16, 16), (24, 16, 16)])
    ]
    assert predict(*folds, image, f"out={tmp_path / 'out'}") == 0
    assert nibabel.load(tmp_path / "out" / "aaaa.nii.gz").shape == nibabel.load(image).shape


def test_what_is_there_is_overwritten_only_when_told(run, image, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(run, image, f"out={out}") == 0
    path = out / "aaaa.nii.gz"
    right = path.read_bytes()
    path.write_bytes(b"mine")
    capsys.readouterr()
    assert predict(run, image, f"out={out}") == 3
    assert f"{path}: exists; existing=skip leaves it and goes on, existing=overwrite replaces it" in (
        capsys.readouterr().err
    )
    assert path.read_bytes() == b"mine"
    assert predict(run, image, f"out={out}", "existing=skip") == 0
    assert path.read_bytes() == b"mine"
    assert predict(run, image, f"out={out}", "existing=overwrite") == 0
    assert path.read_bytes() == right


def test_masks_of_regions_replace_those_that_are_there_all_together(store, image, tmp_path):
    regions = {"all": ["grey", "white"], "core": ["white"]}
    run = make_finetune_run(tmp_path / "run", store, outputs=2, fields={"regions": regions})
    out = tmp_path / "out"
    (out / "aaaa").mkdir(parents=True)
    (out / "aaaa" / "old.nii.gz").write_bytes(b"old")
    assert predict(run, image, f"out={out}") == 3
    assert [path.name for path in (out / "aaaa").iterdir()] == ["old.nii.gz"]
    assert predict(run, image, f"out={out}", "existing=overwrite") == 0
    assert sorted(path.name for path in (out / "aaaa").iterdir()) == sorted(
        f"{file_name(one)}.nii.gz" for one in regions
    )
    assert [path.name for path in out.iterdir()] == ["aaaa"]


def test_a_full_disk_leaves_nothing_half_written(store, image, tmp_path, monkeypatch, capsys):
    regions = {"all": ["grey", "white"], "core": ["white"]}
    run = make_finetune_run(tmp_path / "run", store, outputs=2, fields={"regions": regions})
    real, written = write.write_nifti, []

    def full(path, *arguments):
        if written:
            raise write.DataError(f"{path}: the disk is full")
        written.append(path)
        real(path, *arguments)

    monkeypatch.setattr(write, "write_nifti", full)
    assert predict(run, image, f"out={tmp_path / 'out'}") == 3
    assert "the disk is full" in capsys.readouterr().err
    assert written
    assert os.listdir(tmp_path / "out") == []


def test_dicom_seg_of_what_is_no_dicom_is_refused(run, image, tmp_path, capsys):
    assert predict(run, image, f"out={tmp_path / 'out'}", "format=dicom-seg") == 3
    assert f"{image}: is no DICOM, and DICOM-SEG refers to the instances that it was made of" in capsys.readouterr().err


def test_voxels_of_another_size_than_the_training_s_are_warned_about(store, image, tmp_path, capsys):
    run = make_finetune_run(tmp_path / "run", store, spacing_mm=[9.0, 9.0, 9.0])
    assert predict(run, image, f"out={tmp_path / 'out'}") == 0
    assert "the networks were trained on about 9 x 9 x 9: do not trust it" in capsys.readouterr().err


def test_a_code_for_a_class_that_is_not_drawn_is_refused(run, image, capsys):
    assert predict(run, image, 'codes={liver: [SCT, "10200004", Liver]}') == 2
    assert "codes: names liver; the networks draw grey, white" in capsys.readouterr().err
    assert predict(run, image, f"codes={{grey: [SCT, '1', {'m' * 65}]}}") == 2
    assert "give scheme (at most 16 characters), code and meaning (at most 64)" in capsys.readouterr().err
