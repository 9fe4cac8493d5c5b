import os
from pathlib import Path

import numpy as np
import pytest
from source_lists import counted_calls, found_in, names_of, problems_of, touch

from mimscale.config import build_config
from mimscale.errors import ConfigError, DataError
from mimscale.ingest import sources, statistics
from mimscale.ingest import subjects as subjects_of
from mimscale.ingest.config import IngestConfig


def test_a_glob_and_a_folder_find_the_same_volumes(tmp_path):
    touch(tmp_path, "b.nii.gz", "deep/a.nii", "c.npy", "notes.txt", "._b.nii.gz", ".git/d.nii.gz")
    assert names_of(found_in(tmp_path)) == ["b", "c", "a"]
    assert names_of(found_in(f"{tmp_path}/**/[a-z]*.n*[iyz]")) == ["b", "c", "a"]


def test_a_list_is_the_union_without_repeats(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nii")
    pair = {"image": str(tmp_path / "z.nii"), "label": "y.nii"}
    assert names_of(found_in([f"{tmp_path}/*", f"{tmp_path}/b*", pair])) == ["a", "b", "z"]


def test_what_two_lists_name_is_kept_as_the_one_says_it_that_says_more(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "l.nii", "m.nii")
    (tmp_path / "t.csv").write_text("image,label,split,site\na.nii,l.nii,val,x\n")
    pair = {"image": str(tmp_path / "b.nii"), "label": str(tmp_path / "l.nii")}
    other = {"image": str(tmp_path / "b.nii"), "label": str(tmp_path / "m.nii")}
    a, b, also_b = found_in([f"{tmp_path}/[ab].nii", str(tmp_path / "t.csv"), pair, other]).sources
    assert (a.split, dict(a.tags), Path(a.label[0]).name) == ("val", {"site": "x"}, "l.nii")
    assert [Path(one.label[0]).name for one in (b, also_b)] == ["l.nii", "m.nii"]


def test_a_subject_in_both_splits_of_two_lists_is_named_by_its_rows_only(tmp_path):
    (tmp_path / "one.csv").write_text("image,subject,split\na.nii,Rosa Amsel,train\n")
    (tmp_path / "two.csv").write_text("image,subject,split\nx.nii,Bo,val\nb.nii,Rosa Amsel,val\n")
    with pytest.raises(DataError, match=r"train: line 2 of .*one\.csv, val: line 3 of .*two\.csv") as raised:
        found_in([str(tmp_path / "one.csv"), str(tmp_path / "two.csv")])
    assert "Rosa" not in str(raised.value)
    (tmp_path / "two.csv").write_text("image,subject,split\na.nii,Bo,val\n")
    with pytest.raises(DataError, match=r"one image is in train \(line 2 of .*\) and in val"):
        found_in([str(tmp_path / "one.csv"), str(tmp_path / "two.csv")])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("{}/*.nii", r"sources=.*\*\.nii: matches no file"),
        ("{}/none.nii", r"none\.nii: no such file or folder"),
        ("{}", "the folder holds no .nii.gz"),
        ("{}/none.json", r"none\.json: No such file"),
        ("{}/none.csv", r"none\.csv: No such file"),
        ("{}/DICOMDIR", r"DICOMDIR: no such file"),
        ([], "the list is empty"),
    ],
)
def test_sources_that_match_nothing_are_named(tmp_path, wanted, message):
    with pytest.raises(DataError, match=message):
        found_in(wanted.format(tmp_path) if isinstance(wanted, str) else wanted)


def test_images_and_labels_are_paired_by_name(tmp_path):
    touch(tmp_path, "i/a_0000.nii.gz", "i/b_0000.nii.gz", "l/a.nii.gz")
    globs = {"images": f"{tmp_path}/i/*", "labels": f"{tmp_path}/l/*"}
    first, second = found_in(globs).sources
    assert (first.label, second.label) == ((str(tmp_path / "l/a.nii.gz"),), ())
    touch(tmp_path, "l/c.nii.gz")
    assert problems_of(found_in(globs)) == {"a_0000": None, "b_0000": None, "c": "label_without_image"}
    touch(tmp_path, "l/deep/a.nii.gz")
    with pytest.raises(DataError, match="1 of the labels have the name of another one"):
        found_in({**globs, "labels": f"{tmp_path}/l/**/*.gz"})


def test_labels_that_all_have_other_names_are_an_error_that_shows_no_name(tmp_path):
    touch(tmp_path, "i/amsel.nii", "l/amsel_seg.nii")
    with pytest.raises(DataError, match=r"none of 1 label\(s\) has an image of its name") as raised:
        found_in({"images": f"{tmp_path}/i/*.nii", "labels": f"{tmp_path}/l/*.nii"})
    assert "amsel" not in str(raised.value)


def test_numbers_at_the_end_of_names_count_channels_only_where_labels_have_none(tmp_path):
    touch(tmp_path, *(f"i/case_00{number:02d}.nii" for number in range(3)), "l/case_0001.nii")
    globs = {"images": f"{tmp_path}/i/*", "labels": f"{tmp_path}/l/*"}
    assert [(len(one.channels), one.subject) for one in found_in(globs).sources] == [
        (1, "case_0000"),
        (1, "case_0001"),
        (1, "case_0002"),
    ]
    (tmp_path / "l/case_0001.nii").rename(tmp_path / "l/case.nii")
    (volume,) = found_in(globs).sources
    assert (len(volume.channels), volume.subject, len(volume.label)) == (3, "case", 1)


def test_a_pair_may_give_each_channel_a_file(tmp_path):
    (volume,) = found_in([{"image": ["t1.nii", "t2.nii"], "label": "seg.nii"}]).sources
    assert volume.channels == (("t1.nii",), ("t2.nii",))


def test_files_that_a_pattern_matches_and_that_are_no_volume_get_an_answer(tmp_path):
    touch(tmp_path, "a.nii", "scan.npy", "scan.json", "notes.txt")
    found = found_in(f"{tmp_path}/*")
    assert problems_of(found) == {"a": None, "scan": None, "notes.txt": "not_dicom"}
    assert [Path(file).name for file in found.sources[2].channels[0]] == ["scan.npy", "scan.json"]


def test_a_pattern_that_matches_only_folders_means_what_is_in_them(tmp_path):
    touch(tmp_path, "2021/a.nii", "2022/deep/b.nii", "old/c.nii")
    assert names_of(found_in(f"{tmp_path}/20*")) == ["a", "b"]


def test_files_that_a_folder_holds_beside_volumes_are_counted(tmp_path, capsys):
    touch(tmp_path, "a.nii", "notes.txt", "README")
    assert names_of(found_in(tmp_path)) == ["a"]
    assert "2 file(s) are no volumes and were left out" in capsys.readouterr().err


def test_a_header_and_its_voxels_are_one_volume(tmp_path):
    touch(tmp_path, "a.hdr", "a.img", "b.raw")
    (tmp_path / "b.mhd").write_text("ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementDataFile = b.raw\n")
    (tmp_path / "c.mhd").write_text("ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementDataFile = ../x.raw\n")
    found = found_in(tmp_path)
    assert [[Path(file).name for file in one.channels[0]] for one in found.sources] == [
        ["a.hdr", "a.img"],
        ["b.mhd", "b.raw"],
        ["c.mhd"],
    ]
    assert problems_of(found)["c"] == "outside_source"


def test_a_folder_that_cannot_be_listed_is_a_source_with_a_problem(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii", "locked/b.nii")
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list every folder
    assert problems_of(found_in(tmp_path)) == {"a": None, "locked": "unreadable"}


def test_a_folder_is_listed_without_a_question_for_each_file(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{number % 4}/{number:04d}.nii.gz" for number in range(2000)))
    with counted_calls(monkeypatch, os, "stat", "lstat", "scandir") as calls:
        assert len(found_in(tmp_path).sources) == 2000
        assert len(found_in(f"{tmp_path}/*/*.nii.gz").sources) == 2000
    assert calls["stat"] + calls["lstat"] < 50
    assert calls["scandir"] < 20


@pytest.mark.parametrize(
    ("name", "subject"),
    [("sub-01_ses-2_T1w.nii.gz", "sub-01"), ("BRATS_001.nii.gz", "BRATS_001"), ("x/real_000.nii", "real_000")],
)
def test_the_subject_is_in_the_file_name(name, subject):
    assert sources.subject_of(name, IngestConfig(sources="x", out="y").subject_pattern) == subject


def test_the_split_is_by_subject_and_independent_of_order():
    subjects = {f"s{number}" for number in range(50)}
    held_out = subjects_of.held_out_subjects(subjects, 0.1, seed := 3)
    assert len(held_out) == 5
    assert held_out < subjects
    assert subjects_of.held_out_subjects({f"s{number}" for number in reversed(range(50))}, 0.1, seed) == held_out
    assert subjects_of.held_out_subjects(subjects, 0.1, 4) != held_out
    assert subjects_of.held_out_subjects(subjects, 0, seed) == subjects_of.held_out_subjects({"a"}, 0.5, seed) == set()
    assert len(subjects_of.held_out_subjects({"a", "b"}, 0.01, seed)) == 1
    assert len(subjects_of.held_out_subjects({"a", "b"}, 0.99, seed)) == 1


def test_every_wrong_field_is_named_with_its_full_key():
    tree = {"sources": "x", "out": "y", "modalty": "ct", "intensity": {"kind": "windw"}, "workers": "many"}
    with pytest.raises(ConfigError, match=r"(?s)3 problem.*intensity\.kind.*workers.*modalty"):
        build_config(IngestConfig, tree, "recipe")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"val_fraction": 1}, "val_fraction=1"),
        ({"overlay": "../x"}, "becomes a folder name"),
        ({"subject_pattern": "("}, "subject_pattern"),
        ({"subject_pattern": "x"}, "needs a"),
        ({"workers": 0}, "ingest.workers=0: must be above 0"),
        ({"parts": 0}, "ingest.parts=0"),
        ({"class_names": ["x"] * 256}, "at most 255"),
    ],
)
def test_an_impossible_value_is_named(option, message):
    with pytest.raises(ConfigError, match=message):
        build_config(IngestConfig, {"sources": "x", "out": "y", **option}, "recipe")


def test_ct_padding_stays_out_of_the_statistics_and_air_is_air():
    volume = np.full((1, 10, 10, 10), -1000, np.int16)
    volume[:, :5] = -3024
    volume[:, 6:9, 2:7, 3:6] = 40
    (stats,), box = statistics.describe(volume, "ct")
    assert stats.p0_5 == -1000
    assert stats.foreground_mean == 40
    assert stats.foreground_std == 0
    assert box == ((6, 9), (2, 7), (3, 6))
    assert statistics.fill_value(volume, "ct") == -1024
    assert statistics.fill_value(volume.astype(np.uint8), "ct") == volume.astype(np.uint8).min()
    assert statistics.fill_value(volume, "mr") == -3024


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_voxels_that_were_never_measured_count_for_nothing(dtype):
    volume = np.random.RandomState(0).randint(0, 500, (1, 9, 9, 9)).astype(dtype)
    inside = volume[:, 3:].copy()
    volume[:, :3] = 4000
    (stats,), _ = statistics.describe(volume, "mr", padding_value=4000.0)
    assert (stats.mean, stats.p99_5) == (pytest.approx(inside.mean()), pytest.approx(np.percentile(inside, 99.5)))
    (stats,), _ = statistics.describe(np.full((1, 2, 2, 2), 7, dtype), "mr", padding_value=7.0)
    assert stats.mean == 7  # nothing else is there


def test_mr_foreground_is_what_is_brighter_than_air():
    random = np.random.RandomState(0)
    volume = np.abs(random.randn(1, 20, 20, 20) * 10).astype(np.float32)
    volume[:, 4:15, 5:12, 6:9] += 300
    (stats,), box = statistics.describe(volume, "mr")
    assert box == ((4, 15), (5, 12), (6, 9))
    assert stats.foreground_mean == pytest.approx(308, abs=2)
    assert stats.p50 < 20


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_a_constant_volume_has_statistics_and_all_of_it_is_foreground(modality):
    (stats,), box = statistics.describe(np.full((1, 2, 3, 4), -2000, np.int16), modality)
    assert (stats.mean, stats.std, stats.foreground_std) == (-2000, 0, 0)
    assert box == ((0, 2), (0, 3), (0, 4))


def test_the_subject_key_is_private_and_must_not_change(tmp_path):
    store = tmp_path / "store"
    key = subjects_of.subject_key(store, None)
    file = tmp_path / "store.subject_key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert subjects_of.subject_key(store, str(file)) == key
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0644 lets others read the subject key; run chmod 600"):
        subjects_of.subject_key(store, None)
    file.write_text("hello")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="not a subject key"):
        subjects_of.subject_key(store, None)
