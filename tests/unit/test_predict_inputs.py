"""What words stand for, and what is written of them is called."""

import nibabel
import numpy as np
import pytest
from predict_samples import write_series

from mimscale.errors import ConfigError
from mimscale.ingest.config import IngestConfig
from mimscale.predict.inputs import find_inputs
from mimscale.predict.run import runs_and_inputs


def volume(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    return path


def found(*words, channels=1, series=None):
    config = IngestConfig(sources="", out="", channels=channels)
    return find_inputs([str(word) for word in words], config, series)


def test_words_in_front_that_are_run_directories_are_folds_and_all_others_inputs(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))
    runs, inputs = runs_and_inputs([a, b, "x.nii", c])
    assert ([str(run) for run in runs], inputs) == ([a, b], ["x.nii", c])
    with pytest.raises(ConfigError, match="expected RUN_DIR"):
        runs_and_inputs([a, b])
    runs, inputs = runs_and_inputs(["no_run", "x.nii"])  # the first word is one, or an error
    assert inputs == ["x.nii"]


def test_a_file_with_brackets_in_its_name_means_itself(tmp_path):
    path = volume(tmp_path / "scan[1].nii.gz")
    volume(tmp_path / "scan1.nii.gz")
    (one,) = found(path)
    assert one.source.channels == ((str(path),),)
    assert one.name == "scan[1]"


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["case_10_0000.nii.gz", "case_10_0001.nii.gz"], "case_10"),
        (["sub-1_T1w.nii", "sub-1_T2w.nii"], "sub-1"),
        (["t1.nii", "t2.nii"], "patient"),
        (["BraTS-7-t1n.nii.gz", "BraTS-7-t1c.nii.gz"], "BraTS-7"),
    ],
)
def test_a_case_of_several_files_is_called_what_they_have_in_common(names, name, tmp_path):
    paths = [volume(tmp_path / "patient" / one) for one in names]
    (one,) = found(",".join(map(str, paths)), channels=2)
    assert one.problem is None
    assert (one.name, len(one.source.channels)) == (name, 2)


def test_inputs_of_one_name_get_those_of_their_folders_and_a_number_at_last(tmp_path):
    paths = [volume(tmp_path / folder / "scan.nii") for folder in ("a", "b")]
    assert [one.name for one in found(*paths)] == ["a_scan", "b_scan"]
    assert [one.name for one in found(paths[0], paths[0])] == ["a_scan_1", "a_scan_2"]


def test_series_are_called_after_their_folders(tmp_path):
    for patient in ("p1", "p2"):
        write_series(tmp_path / patient / "ct", shape=(4, 8, 8))
    assert [one.name for one in found(tmp_path / "p1" / "ct")] == ["ct"]
    assert [one.name for one in found(tmp_path / "p1", tmp_path / "p2")] == ["p1_ct", "p2_ct"]


def test_what_lies_beside_volumes_is_no_input_and_a_damaged_volume_is(tmp_path):
    volume(tmp_path / "good.nii.gz")
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "pair.hdr").write_bytes(b"")  # its .img is missing, which reading it says
    names = {one.name: one for one in found(tmp_path)}
    assert sorted(names) == ["good", "pair"]


def test_a_folder_of_nothing_says_so(tmp_path):
    (one,) = found(tmp_path)
    assert one.source is None
    assert str(tmp_path) in one.problem
    assert not one.problem.startswith("sources=")
