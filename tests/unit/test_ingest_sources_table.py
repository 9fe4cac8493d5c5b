"""Tables as sources: CSV, TSV, Parquet."""

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from source_lists import counted_calls, found_in, names_of, touch

from mimscale.errors import DataError
from mimscale.ingest.sources import table


def write(folder, text, name="t.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def files(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "la.nii.gz", "t1.nii", "t2.nii")
    return tmp_path


def test_a_row_is_a_volume_and_further_columns_are_kept(files):
    text = (
        "image,label,subject,modality,split,site,age\na.nii.gz,la.nii.gz,P1,CT,train,Bonn,61\nb.nii.gz,,P2,MR,val,,\n"
    )
    first, second = found_in(write(files, text)).sources
    assert (first.channels, first.label) == (((f"{files}/a.nii.gz",),), (f"{files}/la.nii.gz",))
    assert (first.subject, first.modality, first.split, first.problem) == ("P1", "ct", "train", None)
    assert dict(first.tags) == {"site": "Bonn", "age": "61"}
    assert (second.label, second.subject, second.modality, second.split) == ((), "P2", "mr", "val")
    assert dict(second.tags) == {}


def test_only_the_image_column_is_needed(files):
    (volume,) = found_in(write(files, "image\na.nii.gz\n"), subject_pattern="(.+)").sources
    assert (volume.subject, volume.modality, volume.split, dict(volume.tags)) == ("a", None, None, {})


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        ("image\tsite\na.nii.gz\tx\n", "t.tsv", "utf-8"),
        ("image;site\na.nii.gz;x\n", "t.csv", "utf-8"),
        ("Image , site\r\na.nii.gz, x \r\n,\r\n\r\n", "T.CSV", "utf-8-sig"),
    ],
    ids=["tabs", "semicolons", "a spreadsheet's"],
)
def test_every_dialect_gives_the_same_row(files, text, name, encoding):
    found = found_in(write(files, text, name, encoding))
    assert (names_of(found), dict(found.sources[0].tags)) == (["a"], {"site": "x"})


def test_parquet_keeps_names_that_look_like_numbers_and_empty_cells(files):
    columns = {"image": ["a.nii.gz", "b.nii.gz"], "subject": ["007", "08"], "dose": [1.0, None], "ok": [True, False]}
    first, second = found_in(write_parquet(files / "t.parquet", columns)).sources
    assert (first.subject, dict(first.tags)) == ("007", {"dose": "1", "ok": "True"})
    assert dict(second.tags) == {"ok": "False"}


def test_channels_stand_in_one_cell_or_in_columns(files):
    both = ((f"{files}/t1.nii",), (f"{files}/t2.nii",))
    assert found_in(write(files, "image\nt1.nii;t2.nii\n")).sources[0].channels == both
    listed = write_parquet(files / "t.parquet", {"image": [["t1.nii", "t2.nii"]]})
    assert found_in(listed).sources[0].channels == both
    found = found_in(write(files, "t2,t1,site\nt2.nii,t1.nii,x\n"), channel_names=["t1", "t2"])
    assert (found.sources[0].channels, found.channel_names) == (both, ("t1", "t2"))
    assert dict(found.sources[0].tags) == {"site": "x"}


def test_a_row_without_one_of_its_channels_is_a_problem(files):
    found = found_in(write(files, "t1,t2\nt1.nii,\n"), channel_names=["t1", "t2"])
    assert found.sources[0].problem == ("missing_channel", "channel 1 (t2) of 2 has no file")


def test_columns_that_identify_people_are_left_out_unless_listed(files, capsys):
    text = (
        "image,PatientName,patient_id,BirthDate,StudyInstanceUID,MRN,report_text,sex,scan_time,uptake\n"
        "a.nii.gz,Rosa Amsel,4711,19500101,1.2.3,99,large,F,3,0.5\n"
    )
    assert dict(found_in(write(files, text)).sources[0].tags) == {"sex": "F", "uptake": "0.5"}
    said = capsys.readouterr().err
    assert "PatientName, patient_id, BirthDate, StudyInstanceUID, MRN, report_text, scan_time" in said
    assert "Rosa" not in said
    kept = found_in(write(files, text), keep_columns=["scan_time"]).sources[0].tags
    assert dict(kept) == {"sex": "F", "uptake": "0.5", "scan_time": "3"}


@pytest.mark.parametrize(
    ("column", "identifies"),
    [
        ("Name", True),
        ("dob", True),
        ("SeriesUID", True),
        ("accession_no", True),
        ("ID", True),
        ("site_id", True),
        ("mask_path", True),
        ("age", False),
        ("width", False),
        ("dose_mgy", False),
        ("idle", False),
    ],
)
def test_the_name_of_a_column_tells_whether_it_identifies(column, identifies):
    assert table.may_identify(column) is identifies


def test_paths_stay_in_the_folder_of_the_table(tmp_path):
    touch(tmp_path, "secret.nii", "elsewhere/x.nii", "d/in.nii")
    (tmp_path / "d/link.nii").symlink_to(tmp_path / "secret.nii")
    (tmp_path / "d/way").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/near.nii").symlink_to("in.nii")
    (tmp_path / "d/broken.nii").symlink_to("nothing.nii")
    expected = {
        "in.nii": None,
        "./in.nii ": "repeats",
        "near.nii": None,
        "broken.nii": "missing_file",
        str(tmp_path / "d/sub/../near.nii"): "missing_file",
        "../secret.nii": "outside_source",
        "link.nii": "outside_source",
        "way/x.nii": "outside_source",
        str(tmp_path / "secret.nii"): "outside_source",
        "/etc/passwd": "outside_source",
        "..": "outside_source",
        "a\0b.nii": "missing_file",
        "a\0b/c.nii": "missing_file",
    }
    del expected["./in.nii "]
    for path, reason in expected.items():
        columns = write_parquet(tmp_path / "d/t.parquet", {"image": [path]})  # a CSV holds no zero byte
        (volume,) = found_in(columns).sources
        assert (volume.problem and volume.problem[0]) == reason, path
        (volume,) = found_in(columns, allow_outside=True).sources
        assert volume.problem is None or volume.problem[0] != "outside_source"
    (volume,) = found_in(write(tmp_path / "d", "image,label\nin.nii,../secret.nii\n")).sources
    assert volume.problem[0] == "outside_source"


def test_a_header_in_the_folder_whose_voxels_are_linked_out_of_it_is_a_problem(tmp_path):
    touch(tmp_path, "secret.img", "d/a.hdr")
    (tmp_path / "d/a.img").symlink_to(tmp_path / "secret.img")
    (volume,) = found_in(write(tmp_path / "d", "image\na.hdr\n")).sources
    assert volume.problem[0] == "outside_source"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty"),
        ("image\n", "the table has no row"),
        ("file,Site\na.nii.gz,x\n", r"has no column image; it has file, Site; rename"),
        ("image,Image\na,b\n", "more than one column is called image"),
        ("image,site\na.nii.gz,x\n,y\nb.nii.gz,z\n", r"1 line\(s\) with an empty image: 3"),
        ("image,split\na.nii.gz,test\n", r"1 line\(s\) with a split that is none of train, val and empty: 2"),
        ("image,subject\na.nii.gz,\n", r"1 line\(s\) without a subject.*: 2"),
        ("image\na.nii.gz\nb.nii.gz\n./a.nii.gz\n", r"1 line\(s\) that repeat the image of an earlier one: 4"),
        ("image,site\na.nii.gz\n", "line 2 has 1 cells, the first line names 2 columns"),
        ('image\n"a.nii.gz"b\n', r"not a table of cells"),
        ('image,site\n"a.nii.gz","x\ny"\n,z\n', r"empty image: 4"),
        (
            "image,subject,split\na.nii.gz,Rosa,train\nb.nii.gz,Rosa,val\n",
            r"1 subject\(s\) are in both splits \(train: line 2 of .*, val: line 3 of",
        ),
    ],
)
def test_wrong_rows_are_named_by_their_lines(files, text, message):
    with pytest.raises(DataError, match=message) as raised:
        found_in(write(files, text))
    assert "Rosa" not in str(raised.value)
    assert "a.nii" not in str(raised.value)


def test_all_wrong_rows_are_named_at_once(files):
    text = "image,split\n,x\na.nii.gz,maybe\n" + ",\n,y\n" * 7
    with pytest.raises(
        DataError, match=r"(?s)9 line\(s\) with a split.*8 line\(s\) with an empty image: 2, 5, 7, 9, 11, \.\.\."
    ):
        found_in(write(files, text))


def test_what_is_no_table_is_named(tmp_path):
    with pytest.raises(DataError, match="not UTF-8"):
        found_in(write(tmp_path, "image\nÄ.nii\n", encoding="latin-1"))
    with pytest.raises(DataError, match="not a Parquet file"):
        found_in(write(tmp_path, "image\na.nii\n", "t.parquet"))
    with pytest.raises(DataError, match=r"t\.csv: has a column image and the channel\(s\) t1"):
        found_in(write(tmp_path, "image,t1\na,b\n"), channel_names=["t1"])
    with pytest.raises(DataError, match="has no column t2, which channel_names lists"):
        found_in(write(tmp_path, "t1\na\n"), channel_names=["t1", "t2"])


def test_volumes_of_a_subject_follow_the_split_that_one_row_gives(files):
    text = "image,subject,split\na.nii.gz,P1,val\nb.nii.gz,P1,\nt1.nii,P2,\n"
    assert [one.split for one in found_in(write(files, text)).sources] == ["val", "val", None]


def test_100_000_rows_ask_the_file_system_once_a_folder(tmp_path, monkeypatch):
    for number in range(10):
        (tmp_path / f"{number}").mkdir()
    rows = "".join(f"{number % 10}/{number}.nii.gz,s{number // 2},site{number % 7}\n" for number in range(100_000))
    path = write(tmp_path, "image,subject,site\n" + rows)
    with counted_calls(monkeypatch, os, "stat", "lstat", "scandir") as calls:
        found = found_in(path)
    assert len(found.sources) == 100_000
    assert found.sources[0].problem == ("missing_file", "no such file")
    assert calls["scandir"] == 10
    assert calls["stat"] + calls["lstat"] < 500
    assert Path(found.sources[0].channels[0][0]).parent.parent == tmp_path
