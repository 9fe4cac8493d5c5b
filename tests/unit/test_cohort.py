import json

import nibabel
import numpy as np
import pytest
from store_samples import phantom, write_nifti

from mimscale.cli import main
from mimscale.config import build_config
from mimscale.errors import ConfigError, DataError
from mimscale.ingest.cohort import write_cohort
from mimscale.ingest.config import CohortConfig
from mimscale.ingest.derive import ELASTIC_SCALES_MM, derive


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    voxels = phantom(0, (48, 44, 40))
    image = write_nifti(folder / "image.nii.gz", voxels, np.diag([3.0, 3.0, 3.0, 1.0]))
    label = write_nifti(folder / "label.nii.gz", (voxels > 200).astype(np.uint8), np.diag([3.0, 3.0, 3.0, 1.0]))
    return {"image": str(image), "label": str(label)}


def config_of(out, real, **options):
    return build_config(CohortConfig, {"out": str(out), "workers": 1, "subjects": 2, **real, **options}, "test")


def voxels_of(path):
    return np.asarray(nibabel.load(path).dataobj)


def test_the_real_subject_is_kept_and_the_others_differ(tmp_path, real):
    write_cohort(config_of(tmp_path, real))
    images = [
        voxels_of(tmp_path / "imagesTr" / f"{name}.nii.gz") for name in ("real_000", "derived_001", "derived_002")
    ]
    assert np.array_equal(images[0], voxels_of(real["image"]))
    assert images[1].dtype == np.int16
    assert not np.array_equal(images[1], images[2])
    labels = [voxels_of(tmp_path / "labelsTr" / f"{name}.nii.gz") for name in ("real_000", "derived_001")]
    assert np.array_equal(labels[0], voxels_of(real["label"]))
    assert 0.4 < labels[1].sum() / labels[0].sum() < 2.5
    # The label follows the image: inside it the derived volume is as much brighter as the real one.
    assert images[1][labels[1] == 1].mean() > 3 * images[1][labels[1] == 0].mean()
    tree = json.loads((tmp_path / "cohort.json").read_text())
    assert {name: subject["kind"] for name, subject in tree["subjects"].items()} == {
        "real_000": "real",
        "derived_001": "derived",
        "derived_002": "derived",
    }
    assert tree["subjects"]["derived_001"]["from"] == "real_000"


def test_a_subject_depends_on_seed_and_number_only(tmp_path, real):
    write_cohort(config_of(tmp_path / "a", real))
    write_cohort(config_of(tmp_path / "b", real, subjects=1))
    write_cohort(config_of(tmp_path / "c", real, subjects=1, seed=5))
    first, second, other = (
        (tmp_path / name / "imagesTr" / "derived_001.nii.gz").read_bytes() for name in ("a", "b", "c")
    )
    assert first == second
    assert first != other


def test_the_deformation_cannot_fold():
    assert sum(2.48 * amplitude / spacing for spacing, amplitude in ELASTIC_SCALES_MM) < 1


def test_a_source_without_skull_stays_without(real):
    image, label = phantom(0, (32, 32, 32)), np.zeros((32, 32, 32), np.uint8)
    image[image < 200] = 0
    subject = derive(image, label, np.ones(3), seed=0, number=1)
    assert (subject.image == 0).mean() > 0.3
    noisy = derive(phantom(0, (32, 32, 32)), label, np.ones(3), seed=0, number=1)
    assert (noisy.image == 0).mean() < 0.2


def test_another_spacing_resamples_the_real_volume_first(tmp_path, real):
    write_cohort(config_of(tmp_path, real, subjects=0, spacing_mm=6))
    image = nibabel.load(tmp_path / "imagesTr" / "real_000.nii.gz")
    assert image.shape == (24, 22, 20)
    assert np.allclose(np.diag(image.affine), [6, 6, 6, 1])
    assert np.allclose(image.affine[:3, 3], 1.5)  # the corner of the volume stays where it was
    assert json.loads((tmp_path / "cohort.json").read_text())["subjects"]["real_000"]["origin"].endswith("to 6.0 mm")


def test_a_label_on_another_grid_is_refused(tmp_path, real):
    other = write_nifti(tmp_path / "l.nii", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"\(4, 4, 4\) voxels, .* has \(48, 44, 40\); give a label on its grid"):
        write_cohort(config_of(tmp_path, {**real, "label": str(other)}))
    moved = write_nifti(tmp_path / "m.nii", np.zeros((48, 44, 40), np.uint8), np.diag([3.0, 3.0, 3.1, 1.0]))
    with pytest.raises(DataError, match="voxels away"):
        write_cohort(config_of(tmp_path, {**real, "label": str(moved)}))
    assert not (tmp_path / "dataset.json").exists()


def test_a_missing_or_broken_volume_is_named(tmp_path, real):
    with pytest.raises(DataError, match=r"none\.nii: No such file"):
        write_cohort(config_of(tmp_path, {**real, "image": str(tmp_path / "none.nii")}))
    (tmp_path / "cut.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"cut\.nii\.gz: 0 bytes"):
        write_cohort(config_of(tmp_path, {**real, "image": str(tmp_path / "cut.nii.gz")}))


def test_class_names_must_cover_the_labels(tmp_path, real):
    with pytest.raises(DataError, match="holds label 1, class_names has 1 names"):
        write_cohort(config_of(tmp_path, real, class_names=["background"]))


def test_a_lonely_image_and_a_typo_exit_with_2(tmp_path, real, capsys):
    assert main(["cohort", f"out={tmp_path}", f"image={real['image']}"]) == 2
    assert "give both, or neither" in capsys.readouterr().err
    assert main(["cohort", f"out={tmp_path}", "subject=3"]) == 2
    assert "subject" in capsys.readouterr().err


def test_json_lists_the_files(tmp_path, real, capsys):
    words = [f"{key}={value}" for key, value in real.items()]
    assert main(["cohort", f"out={tmp_path}", "subjects=1", "workers=1", "--json", *words]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(files) == 6
    assert files[-2:] == [f"{tmp_path}/dataset.json", f"{tmp_path}/cohort.json"]


def test_the_real_subject_and_the_last_derived_ones_are_for_validation_when_asked(tmp_path, real):
    write_cohort(config_of(tmp_path, real, subjects=3, validation=1))
    listed = json.loads((tmp_path / "dataset.json").read_text())
    names = {part: [entry["image"][11:-7] for entry in listed[part]] for part in ("training", "validation")}
    assert names == {"training": ["derived_001", "derived_002"], "validation": ["real_000", "derived_003"]}
    assert listed["numTraining"] == 2


def test_more_validation_subjects_than_there_are_is_refused(tmp_path, real):
    with pytest.raises(ConfigError, match="validation=3: must be from 0 to subjects=2"):
        config_of(tmp_path, real, validation=3)
