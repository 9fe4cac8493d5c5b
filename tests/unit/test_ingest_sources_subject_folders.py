"""BraTS as it is published, as a source: a folder for each subject, whose files begin with its name."""

from pathlib import Path

import pytest
from source_lists import found_in, names_of, problems_of, touch

from mimscale.errors import DataError

CONTRASTS = ["t1", "t1ce", "t2", "flair"]


def brats(folder, *subjects, words=(*CONTRASTS, "seg"), dash="_"):
    touch(folder, *(f"{subject}/{subject}{dash}{word}.nii.gz" for subject in subjects for word in words))
    return folder


@pytest.mark.parametrize("names", [["t1ce"], CONTRASTS], ids=["one contrast", "all four"])
def test_files_that_begin_with_the_name_of_their_folder_are_channels_and_seg_is_the_label(tmp_path, names):
    found = found_in(brats(tmp_path, "BraTS2021_00000", "BraTS2021_00002"), channel_names=names)
    assert found.channel_names == tuple(names)
    assert [one.subject for one in found.sources] == ["BraTS2021_00000", "BraTS2021_00002"]
    for one in found.sources:
        folder = tmp_path / one.subject
        assert one.channels == tuple((str(folder / f"{one.subject}_{name}.nii.gz"),) for name in names)
        assert one.label == (str(folder / f"{one.subject}_seg.nii.gz"),)
        assert (one.modality, one.split, one.problem) == ("mr", None, None)


def test_names_with_dashes_are_read_and_a_pattern_keeps_the_scans_of_a_patient_together(tmp_path):
    scans = ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001")
    folder = brats(tmp_path, *scans, words=("t1c", "t2f", "seg"), dash="-")
    found = found_in(folder, channel_names=["t1c", "t2f"], subject_pattern=r"(.+)-\d+")
    assert {one.subject for one in found.sources} == {"BraTS-GLI-00005"}
    assert [len(one.channels) for one in found.sources] == [2, 2]


def test_a_subject_that_lacks_a_contrast_is_a_problem_that_names_it(tmp_path):
    folder = brats(tmp_path, "a", "b", "c", "d", "e")
    (folder / "b/b_t1ce.nii.gz").unlink()
    (folder / "c/c_seg.nii.gz").unlink()  # what a study expects of a store finds it
    for word in CONTRASTS:
        (folder / f"d/d_{word}.nii.gz").unlink()
    for file in (folder / "e").iterdir():
        file.rename(file.with_name(file.name.replace("e_", "W39_", 1)))
    found = found_in(folder, channel_names=CONTRASTS)
    assert {one.subject: one.problem and one.problem[1] for one in found.sources} == {
        "a": None,
        "b": "channel 1 (t1ce) of 4 has no file",
        "c": None,
        "d": "channel 0 (t1) of 4 has no file",
        "e": "channel 0 (t1) of 4 has no file",
    }
    assert set(problems_of(found).values()) == {None, "missing_channel"}
    assert {one.subject: len(one.label) for one in found.sources} == {"a": 1, "b": 1, "c": 0, "d": 0, "e": 0}
    assert {Path(one.channels[0][0]).parts[-2:] for one in found.sources if one.subject in "de"} == {
        ("d", "d_seg.nii.gz"),
        (tmp_path.name, "e"),
    }


def test_a_file_that_is_there_in_two_formats_is_refused(tmp_path):
    touch(brats(tmp_path, "a"), "a/a_t1.nii")
    with pytest.raises(DataError, match=r"1 file\(s\) have the name of another one, in another format"):
        found_in(tmp_path, channel_names=["t1"])


def test_what_belongs_to_no_subject_is_counted(tmp_path, capsys):
    touch(brats(tmp_path, "a"), "loose.nii.gz", "list.csv", "notes/read.txt")
    assert names_of(found_in(tmp_path, channel_names=["t1"])) == ["a_t1"]
    said = capsys.readouterr().err
    assert "1 folder(s) hold no volume and were left out" in said
    assert "1 volume(s) lie outside of the subjects' folders and were left out" in said


def test_the_folder_above_is_refused_with_the_one_that_is_meant(tmp_path):
    brats(tmp_path / "BraTS2021_Training_Data", "a")
    with pytest.raises(DataError, match=r"lie one deeper; give sources=.*/BraTS2021_Training_Data"):
        found_in(tmp_path, channel_names=["t1"])


def test_without_channel_names_a_folder_is_every_volume_in_it(tmp_path):
    assert len(found_in(brats(tmp_path, "a")).sources) == 5


def test_links_that_leave_the_folder_are_problems_until_they_are_allowed(tmp_path):
    brats(tmp_path / "elsewhere", "b", "c")
    folder = brats(tmp_path / "here", "a")
    (folder / "b").symlink_to(tmp_path / "elsewhere/b")
    (folder / "c").mkdir()
    (folder / "c/c_t1.nii.gz").symlink_to(tmp_path / "elsewhere/c/c_t1.nii.gz")
    problems = {one.subject: one.problem and one.problem[0] for one in found_in(folder, channel_names=["t1"]).sources}
    assert problems == {"a": None, "b": "outside_source", "c": "outside_source"}
    allowed = found_in(folder, channel_names=["t1"], allow_outside=True)
    assert set(problems_of(allowed).values()) == {None}
