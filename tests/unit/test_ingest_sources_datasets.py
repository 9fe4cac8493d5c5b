"""Decathlon and nnU-Net folders as sources."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_lists import found_in, names_of, problems_of, touch, write_json

from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources.find import find


def decathlon(folder, **changes):
    tree = {
        "modality": {"0": "CT"},
        "labels": {"1": "liver", "0": "background"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    }
    touch(folder, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz")
    write_json(folder / "dataset.json", {**tree, **changes})
    return found_in(folder)


def test_volumes_without_a_label_map_are_left_out_where_only_labelled_ones_are_wanted(tmp_path, capsys):
    everything = decathlon(tmp_path)
    labelled = [source for source in everything.sources if source.label]
    assert 0 < len(labelled) < len(everything.sources)
    config = IngestConfig(sources=str(tmp_path), out="x", labelled_only=True)
    assert list(find(config.sources, config).sources) == labelled
    left_out = len(everything.sources) - len(labelled)
    assert f"labelled_only: {left_out} volume(s) without a label map are left out" in capsys.readouterr().err
    decathlon(tmp_path, training=[])
    with pytest.raises(DataError, match=r"labelled_only=true: none of the 1 volume"):
        find(config.sources, config)


def test_a_decathlon_gives_labels_names_modality_and_unlabelled_volumes(tmp_path):
    found = decathlon(tmp_path)
    assert (found.class_names, found.channel_names) == (("background", "liver"), ("CT",))
    assert [(one.subject, len(one.label), one.modality, one.split, one.problem) for one in found.sources] == [
        ("a", 1, "ct", None, None),
        ("b", 0, "ct", None, None),
    ]
    assert found_in(str(tmp_path / "dataset.json")) == found


def test_an_image_with_several_modalities_is_one_file_whose_channels_have_names(tmp_path):
    found = decathlon(tmp_path, modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"})
    assert found.channel_names == ("FLAIR", "T1w", "t1gd", "T2w")
    assert [(len(one.channels), one.modality) for one in found.sources] == [(1, "mr"), (1, "mr")]
    assert decathlon(tmp_path, modality={"0": "CT", "1": "PET"}).sources[0].modality is None


def test_a_validation_list_fixes_the_split(tmp_path):
    found = decathlon(tmp_path, validation=[{"image": ["v_1.nii", "v_2.nii"]}])
    assert {one.subject: one.split for one in found.sources} == {"a": "train", "b": None, "v_1": "val"}
    assert [len(one.channels) for one in found.sources] == [1, 1, 2]
    with pytest.raises(DataError, match=r"train: training\[0\] of .*json, val: validation\[0\] of"):
        decathlon(tmp_path, validation=[{"image": "imagesTr/a.nii"}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": [{"img": 3}]}, r"training\[0\] of .*not an entry of a Decathlon dataset\.json"),
        ({"training": ["ok.nii", 7]}, r"training\[1\] of"),
        ({"training": [{"image": "a.nii", "label": 1}]}, "its label is no file name"),
        ({"training": "a.nii"}, "training must be a list, not a str"),
        ({"training": [], "test": []}, "lists no volume"),
        ({"labels": {"0": "a", "2": "b"}}, r"labels \[0, 2\] must run 0, 1, 2"),
        ({"labels": ["a"]}, "labels must be"),
        ({"modality": {"1": "CT"}}, r"modality \[1\] must run 0, 1, 2"),
        ({"modality": "CT"}, "modality must be"),
    ],
)
def test_a_broken_decathlon_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        decathlon(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "it holds a list"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(DataError, match=message):
        found_in(tmp_path)


def test_entries_that_leave_the_folder_or_are_not_there_are_problems(tmp_path):
    touch(tmp_path, "secret.nii", "d/in.nii")
    training = ["../secret.nii", str(tmp_path / "secret.nii"), "in.nii", "gone.nii", "\ud800/folder.nii"]
    write_json(tmp_path / "d/dataset.json", {"training": training})
    reasons = [one.problem[0] if one.problem else None for one in found_in(tmp_path / "d").sources]
    assert sorted(map(str, reasons)) == ["None", "missing_file", "missing_file", "outside_source", "outside_source"]
    allowed = found_in(tmp_path / "d", allow_outside=True).sources
    assert sorted(str(one.problem and one.problem[0]) for one in allowed) == [
        *("None", "None", "None", "missing_file", "missing_file"),
    ]


V2 = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
V1 = {
    "modality": {"0": "T1", "1": "FLAIR"},
    "labels": {"0": "background", "1": "tumour"},
    "training": [{"image": "./imagesTr/p_1.nii.gz", "label": "./labelsTr/p_1.nii.gz"}],
    "test": ["./imagesTs/q.nii.gz"],
}


def nnunet(folder, tree):
    touch(folder, *(f"imagesTr/p_1_000{channel}.nii.gz" for channel in (0, 1)), "labelsTr/p_1.nii.gz")
    touch(folder, *(f"imagesTs/q_000{channel}.nii.gz" for channel in (0, 1)))
    if tree is not None:
        write_json(folder / "dataset.json", tree)
    return found_in(folder)


@pytest.mark.parametrize("tree", [V1, V2, None], ids=["version 1", "version 2", "no dataset.json"])
def test_channel_files_of_a_case_become_channels_of_one_source(tmp_path, tree):
    found = nnunet(tmp_path, tree)
    names = [[Path(file).name for (file,) in one.channels] for one in found.sources]
    assert names == [["p_1_0000.nii.gz", "p_1_0001.nii.gz"], ["q_0000.nii.gz", "q_0001.nii.gz"]]
    assert [(one.subject, len(one.label), one.problem) for one in found.sources] == [("p_1", 1, None), ("q", 0, None)]
    if tree is not None:
        assert (found.class_names, found.channel_names) == (("background", "tumour"), ("T1", "FLAIR"))
        assert {one.modality for one in found.sources} == {"mr"}
        assert found_in(str(tmp_path / "dataset.json")) == found


def test_cases_that_end_in_a_number_are_no_channels_when_a_decathlon_lists_them(tmp_path):
    touch(tmp_path, "imagesTr/case_0000.nii", "imagesTr/case_0001.nii")
    training = [{"image": f"imagesTr/case_000{number}.nii"} for number in (0, 1)]
    write_json(tmp_path / "dataset.json", {"training": training})
    assert [one.subject for one in found_in(tmp_path).sources] == ["case_0000", "case_0001"]


def test_a_case_without_a_channel_and_a_label_without_an_image_are_problems(tmp_path):
    touch(tmp_path, "imagesTr/lame_0001.nii.gz", "labelsTr/stray.nii.gz")
    found = nnunet(tmp_path, V2)
    assert problems_of(found) == {
        "p_1_0000": None,
        "q_0000": None,
        "lame_0001": "missing_channel",
        "stray": "label_without_image",
    }
    (lame,) = (one for one in found.sources if one.subject == "lame")
    assert lame.problem[1] == "channel 0 (T1) of 2 has no file"


def test_regions_and_the_ignore_label_of_nnunet_give_each_value_one_name(tmp_path, capsys):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    found = nnunet(tmp_path, {**V2, "labels": labels})
    assert found.class_names == ("background", "whole", "core", "enhancing")
    assert "label value 4 means `ignore`" in capsys.readouterr().err
    labels = {"background": 0, "both": [1, 2]}
    assert nnunet(tmp_path, {**V2, "labels": labels}).class_names == ("background", "both", "both 2")


def test_cases_that_version_2_lists_lie_anywhere_in_the_folder(tmp_path):
    touch(tmp_path, "x/t1.nii.gz", "x/flair.nii.gz", "y/seg.nii.gz")
    listed = {"case": {"images": ["x/t1.nii.gz", "x/flair.nii.gz"], "label": "y/seg.nii.gz"}}
    (volume,) = (one for one in nnunet(tmp_path, {**V2, "dataset": listed}).sources)
    assert ([Path(file).name for (file,) in volume.channels], volume.problem) == (["t1.nii.gz", "flair.nii.gz"], None)
    listed["out"] = {"images": ["../t1.nii.gz", "../flair.nii.gz"]}
    reasons = [one.problem for one in nnunet(tmp_path, {**V2, "dataset": listed}).sources]
    assert sorted(str(reason and reason[0]) for reason in reasons) == ["None", "outside_source"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": {"0": "T1"}}, r"names 1 channel\(s\), and there are files _0001"),
        ({"file_ending": ".png"}, "file_ending .png is no format"),
        ({"dataset": {"a": {"image": "x"}}}, "entry 0 is not understood"),
        ({"dataset": {"a": {"images": []}}}, "empty list of images"),
        ({"labels": {"background": 0, "x": "one"}}, "must be whole numbers"),
        ({"dataset": {}}, "holds no CASE_0000 volume"),
    ],
)
def test_a_broken_nnunet_folder_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        nnunet(tmp_path, {**V2, **changes})


def test_lists_whose_classes_or_channels_contradict_each_other_are_refused(tmp_path):
    nnunet(tmp_path / "a", V2)
    nnunet(tmp_path / "b", {**V2, "channel_names": {"0": "FLAIR", "1": "T1"}})
    with pytest.raises(DataError, match=r"channel names \['FLAIR', 'T1'\] of one list are not \['T1', 'FLAIR'\]"):
        found_in([str(tmp_path / "a"), str(tmp_path / "b")])
    nnunet(tmp_path / "b", {**V2, "labels": {"background": 0, "liver": 1}})
    with pytest.raises(DataError, match="class names"):
        found_in([str(tmp_path / "a"), str(tmp_path / "b")])
    decathlon(tmp_path / "c")
    decathlon(tmp_path / "d", modality={"0": "MRI"})
    found = found_in([str(tmp_path / "c"), str(tmp_path / "d")])
    assert (found.channel_names, names_of(found)) == ((), ["a", "b", "a", "b"])


def test_a_folder_of_images_that_is_linked_elsewhere_needs_permission(tmp_path):
    touch(tmp_path, "elsewhere/p_0000.nii.gz", "d/dataset.json")
    (tmp_path / "d/imagesTr").symlink_to(tmp_path / "elsewhere")
    write_json(tmp_path / "d/dataset.json", {**V2, "channel_names": {"0": "T1"}})
    with pytest.raises(DataError, match=r"imagesTr: leads out of the folder of its list; allow_outside=true"):
        found_in(tmp_path / "d")
    assert names_of(found_in(tmp_path / "d", allow_outside=True)) == ["p_0000"]


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["..", "/", "\0/x", "\ud800/x"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
KEYS = ["training", "validation", "test", "labels", "modality", "channel_names", "file_ending", "dataset"]
ENTRIES = st.lists(st.fixed_dictionaries({"image": VALUES}, optional={"label": VALUES}), max_size=2)
NAMES = st.dictionaries(st.sampled_from(["0", "1", "background", "ignore"]), VALUES)
CASES = st.dictionaries(st.text(), st.fixed_dictionaries({"images": VALUES}, optional={"label": VALUES}), max_size=2)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(st.sampled_from(KEYS), VALUES | ENTRIES | NAMES | CASES))
def test_a_dataset_json_of_any_content_is_read_or_refused(tmp_path, tree):
    touch(tmp_path, "imagesTr/p_0000.nii")
    write_json(tmp_path / "dataset.json", tree)
    with suppress(DataError):  # anything else would stop an ingest with words that nobody can use
        assert found_in(tmp_path).sources
