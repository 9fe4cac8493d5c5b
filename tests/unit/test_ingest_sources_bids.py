"""BIDS folders as sources."""

from pathlib import Path

import pytest
from source_lists import found_in, touch

from mimscale.errors import DataError


@pytest.fixture
def bids(tmp_path):
    touch(
        tmp_path,
        "dataset_description.json",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/sub-01_FLAIR.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_acq-mprage_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_mod-T1w_defacemask.nii.gz",
        "derivatives/manual/sub-01/anat/sub-01_desc-tumour_dseg.nii.gz",
        "derivatives/manual/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
    )
    return tmp_path


def described(found):
    return [
        (one.subject, [Path(files[0]).name for files in one.channels], [Path(file).name for file in one.label])
        for one in found.sources
    ]


def test_each_contrast_is_a_volume_and_the_t1w_has_the_label(bids):
    found = found_in(bids)
    assert described(found) == [
        ("sub-01", ["sub-01_FLAIR.nii.gz"], []),
        ("sub-01", ["sub-01_T1w.nii.gz"], ["sub-01_desc-tumour_dseg.nii.gz"]),
        ("sub-02", ["sub-02_ses-a_acq-mprage_T1w.nii.gz"], []),
    ]
    assert [(one.modality, dict(one.tags)) for one in found.sources] == [
        ("mr", {"suffix": "FLAIR"}),
        ("mr", {"suffix": "T1w"}),
        ("mr", {"suffix": "T1w", "acquisition": "mprage"}),
    ]


def test_contrasts_that_channel_names_lists_are_channels_of_one_volume(bids, capsys):
    touch(bids, "sub-01/anat/sub-01_T2w.nii.gz")
    found = found_in(bids, channel_names=["T1w", "FLAIR"])
    assert found.channel_names == ("T1w", "FLAIR")
    assert described(found)[0] == (
        "sub-01",
        ["sub-01_T1w.nii.gz", "sub-01_FLAIR.nii.gz"],
        ["sub-01_desc-tumour_dseg.nii.gz"],
    )
    assert found.sources[1].problem == ("missing_channel", "channel 1 (FLAIR) of 2 has no file")
    assert "channel_names does not list them: T2w 1" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"has no suffix of channel_names=\[DWI\]; it has FLAIR 1, T1w 2, T2w 1"):
        found_in(bids, channel_names=["DWI"])


def test_columns_of_participants_become_tags(bids, capsys):
    text = "participant_id\tsex\tage\tname\nsub-01\tF\t33\tRosa Amsel\n02\tn/a\t40\tBo\n"
    (bids / "participants.tsv").write_text(text)
    found = found_in(bids)
    assert dict(found.sources[0].tags) == {"sex": "F", "age": "33", "suffix": "FLAIR"}
    assert dict(found.sources[2].tags) == {"age": "40", "suffix": "T1w", "acquisition": "mprage"}
    assert "Rosa" not in capsys.readouterr().err
    (bids / "participants.tsv").write_text("id\nsub-01\n")
    with pytest.raises(DataError, match="has no column participant_id; its columns are id"):
        found_in(bids)


def test_several_labels_of_an_image_need_a_choice(bids):
    touch(bids, "derivatives/robot/sub-01/anat/sub-01_desc-aseg_dseg.nii.gz")
    with pytest.raises(DataError, match=r"2 label maps for 1 image\(s\) match bids_labels=.*narrow it"):
        found_in(bids)
    found = found_in(bids, bids_labels="derivatives/robot/*desc-aseg_dseg.nii.gz")
    assert described(found)[1][2] == ["sub-01_desc-aseg_dseg.nii.gz"]


def test_labels_on_other_grids_are_left_out_and_those_of_no_image_are_problems(bids, capsys):
    folder = "derivatives/manual/sub-02/anat"
    touch(
        bids,
        f"{folder}/sub-02_space-MNI152NLin6Asym_dseg.nii.gz",
        f"{folder}/sub-02_ses-a_acq-mprage_res-2_dseg.nii.gz",
        "derivatives/manual/sub-03/anat/sub-03_dseg.nii.gz",
        "derivatives/manual/tpl_dseg.nii.gz",
    )
    found = found_in(bids)
    assert [one.label for one in found.sources if one.subject == "sub-02"] == [()]
    assert [one.problem[0] for one in found.sources if one.subject == "sub-03"] == ["label_without_image"]
    assert "3 label map(s) of derivatives/ lie in a template's space" in capsys.readouterr().err


def test_the_space_of_a_label_tells_its_contrast(bids):
    touch(bids, "derivatives/manual/sub-01/anat/sub-01_space-FLAIR_desc-lesion_dseg.nii.gz")
    assert [one[2] for one in described(found_in(bids))] == [
        ["sub-01_space-FLAIR_desc-lesion_dseg.nii.gz"],
        ["sub-01_desc-tumour_dseg.nii.gz"],
        [],
    ]


def test_a_label_that_leaves_entities_away_belongs_to_the_only_image_that_has_them(bids):
    touch(bids, "derivatives/manual/sub-02/anat/sub-02_ses-a_dseg.nii.gz")
    assert described(found_in(bids))[2][2] == ["sub-02_ses-a_dseg.nii.gz"]


def test_folders_of_other_data_and_names_that_are_not_of_bids_are_counted(bids, capsys):
    touch(bids, "sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-01/anat/scan.nii.gz")
    assert len(found_in(bids).sources) == 3
    said = capsys.readouterr().err
    assert "only anat/ and ct/ are read; left out: func" in said
    assert "1 file(s) of anat/ and ct/ have no name of BIDS" in said


def test_a_folder_is_known_by_where_its_images_lie(tmp_path):
    touch(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-1/dwi/sub-01_ses-1_dwi.nii.gz")
    assert [one[1] for one in described(found_in(tmp_path))] == [["sub-01_ses-1_T1w.nii.gz"]]


def test_images_that_an_annex_holds_are_links_inside_the_folder(bids, tmp_path_factory):
    image = bids / "sub-01/anat/sub-01_T1w.nii.gz"
    content = bids / ".git/annex/objects/x.nii.gz"
    content.parent.mkdir(parents=True)
    image.rename(content)
    image.symlink_to(content)
    assert found_in(bids).sources[1].problem is None
    content.unlink()  # not fetched
    assert found_in(bids).sources[1].problem[0] == "missing_file"
    image.unlink()
    outside = tmp_path_factory.mktemp("elsewhere") / "y.nii.gz"
    outside.write_bytes(b"x")
    image.symlink_to(outside)
    assert found_in(bids).sources[1].problem[0] == "outside_source"


def test_a_bids_folder_without_images_or_with_two_of_one_name_is_an_error(bids, tmp_path):
    touch(bids, "sub-01/anat/sub-01_T1w.nii")
    with pytest.raises(DataError, match=r"1 image\(s\) are there in two formats"):
        found_in(bids)
    touch(tmp_path, "empty/dataset_description.json")
    with pytest.raises(DataError, match="holds an image"):
        found_in(tmp_path / "empty")


def test_a_subject_that_is_linked_elsewhere_is_a_source_with_a_problem(bids, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    touch(elsewhere, "anat/sub-04_T1w.nii.gz")
    (bids / "sub-04").symlink_to(elsewhere)
    (linked,) = (one for one in found_in(bids).sources if one.subject == "sub-04")
    assert linked.problem[0] == "outside_source"
    (allowed,) = (one for one in found_in(bids, allow_outside=True).sources if one.subject == "sub-04")
    assert (allowed.problem, Path(allowed.channels[0][0]).name) == (None, "sub-04_T1w.nii.gz")


def test_words_of_names_that_are_not_of_bids_are_not_repeated(bids, capsys):
    touch(bids, "sub-01/anat/sub-01_amsel.nii.gz", "sub-01/amsel/x.nii.gz")
    found = found_in(bids)
    assert {one.tags["suffix"] for one in found.sources} == {"T1w", "FLAIR", "other"}
    found_in(bids, channel_names=["T1w"])
    said = capsys.readouterr().err
    assert "left out: folders of other names" in said
    assert "FLAIR 1, other 1" in said
    assert "amsel" not in said
