"""DICOM as sources: folders, files, DICOMDIR, and folders that a table names."""

from pathlib import Path

import numpy as np
import pytest
from dicom_samples import save, slices
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from source_lists import found_in, touch

from mimscale.errors import DataError
from mimscale.ingest.formats import dicom_series

VOXELS = np.zeros((5, 4, 3), np.int16)


def described(found):
    return [(one.subject, one.modality, len(one.channels[0]), one.problem and one.problem[0]) for one in found.sources]


def test_a_folder_of_series_and_volumes_gives_both(tmp_path):
    save(slices(VOXELS, PatientID="P1"), tmp_path / "s1")
    save(slices(VOXELS, PatientID="P2", modality="MR"), tmp_path / "s2", [f"1.2.840.{n}" for n in range(5)])
    touch(tmp_path, "a.nii.gz", "s1/README", "s1/notes.pdf")
    assert described(found_in(tmp_path)) == [("a", None, 1, None), ("P1", "ct", 5, None), ("P2", "mr", 5, None)]


def test_series_in_one_folder_are_told_apart_and_one_over_two_folders_is_whole(tmp_path):
    first, second = slices(VOXELS, PatientID="P1"), slices(VOXELS, PatientID="P2")
    save(first[:3] + second, tmp_path / "x")
    save(first[3:], tmp_path / "y")
    assert described(found_in(tmp_path)) == [("P1", "ct", 5, None), ("P2", "ct", 5, None)]
    assert described(found_in(f"{tmp_path}/*/IM*")) == described(found_in(tmp_path))
    assert described(found_in(f"{tmp_path}/[xy]")) == described(found_in(tmp_path))


def test_what_is_dicom_and_no_volume_or_damaged_gets_an_answer(tmp_path):
    report = slices(VOXELS[:1], PatientID="P1", Modality="SR")
    save(report, tmp_path, ["report"])
    touch(tmp_path, "broken.dcm", "also.DCM")
    save(slices(VOXELS, PatientID="P1"), tmp_path)
    reasons = sorted(str(one[3]) for one in described(found_in(tmp_path)))
    assert reasons == ["None", "not_an_image", "not_dicom", "not_dicom"]


def test_a_dicomdir_stands_for_the_files_that_it_names(tmp_path):
    save(slices(VOXELS, PatientID="P1"), tmp_path / "DATA", [f"IM{n}" for n in range(5)])
    save(slices(VOXELS, PatientID="P2"), tmp_path / "NOT")
    write_dicomdir(tmp_path, [["DATA", f"IM{n}"] for n in range(5)])
    assert described(found_in(tmp_path / "DICOMDIR")) == [("P1", "ct", 5, None)]
    assert described(found_in(f"{tmp_path}/*")) == [("P1", "ct", 5, None)]
    assert len(found_in(tmp_path).sources) == 2


def test_a_dicomdir_cannot_name_files_outside_its_folder(tmp_path):
    save(slices(VOXELS, PatientID="P1"), tmp_path / "secret")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/LINK").symlink_to(tmp_path / "secret")
    write_dicomdir(tmp_path / "d", [["LINK", f"IM{n:04d}"] for n in range(5)])
    assert [one[3] for one in described(found_in(tmp_path / "d/DICOMDIR"))] == ["outside_source"]
    save(slices(VOXELS, PatientID="P2"), tmp_path / "d/own")
    assert described(found_in(tmp_path / "d")) == [("P2", "ct", 5, None)]
    write_dicomdir(tmp_path / "d", [["..", "secret", "IM0000"]])
    assert [one[3] for one in described(found_in(tmp_path / "d/DICOMDIR"))] == ["outside_source"]
    write_dicomdir(tmp_path / "d", [])
    with pytest.raises(DataError, match="names no DICOM file"):
        found_in(tmp_path / "d/DICOMDIR")


def write_dicomdir(folder, file_ids):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    records = []
    for file_id in file_ids:
        record = Dataset()
        with disable_value_validation():  # `..` is no name of the standard
            record.ReferencedFileID = file_id
        records.append(record)
    dataset.DirectoryRecordSequence = records
    with disable_value_validation():
        dataset.save_as(folder / "DICOMDIR", enforce_file_format=True)


def test_a_folder_that_a_table_or_a_pair_names_is_the_series_in_it(tmp_path):
    save(slices(VOXELS, PatientID="Rosa"), tmp_path / "ct")
    save(slices(VOXELS, PatientID="Bo") + slices(VOXELS, PatientID="Bo"), tmp_path / "two")
    touch(tmp_path, "label.nii", "none/x.txt")
    (tmp_path / "t.csv").write_text("image,label\nct,label.nii\ntwo,\nnone,\ngone,\n")
    found = found_in(tmp_path / "t.csv")
    assert sorted(described(found), key=str) == [
        ("Rosa", "ct", 5, None),
        ("gone", None, 1, "missing_file"),
        ("none", None, 1, "not_dicom"),
        ("two", None, 1, "several_series"),
    ]
    (pair,) = found_in([{"image": str(tmp_path / "ct"), "label": str(tmp_path / "label.nii")}]).sources
    assert (pair.subject, len(pair.channels[0]), len(pair.label)) == ("Rosa", 5, 1)
    (tmp_path / "t.csv").write_text("image,subject,modality\nct,P7,mr\n")
    assert described(found_in(tmp_path / "t.csv")) == [("P7", "mr", 5, None)]


def test_copies_of_a_series_in_two_folders_that_a_table_names_stay_two_rows(tmp_path):
    series = slices(VOXELS, PatientID="P1")
    save(series, tmp_path / "a")
    save(series, tmp_path / "b")
    (tmp_path / "t.csv").write_text("image\na\nb\n")
    assert described(found_in(tmp_path / "t.csv")) == [("P1", "ct", 5, None), ("P1", "ct", 5, None)]


def test_channels_of_a_table_may_be_series(tmp_path):
    for name in ("t1", "t2"):
        save(slices(VOXELS, PatientID="P1", modality="MR"), tmp_path / name)
    (tmp_path / "t.csv").write_text("image\nt1;t2\n")
    (volume,) = found_in(tmp_path / "t.csv").sources
    assert [len(files) for files in volume.channels] == [5, 5]
    assert {Path(files[0]).parent.name for files in volume.channels} == {"t1", "t2"}


def test_many_headers_are_read_by_several_processes_with_the_same_result(tmp_path, monkeypatch, capsys):
    for number in range(3):
        save(slices(VOXELS, PatientID=f"P{number}"), tmp_path / f"{number}")
    alone = found_in(tmp_path, workers=1)
    monkeypatch.setattr(dicom_series, "_MANY", 10)
    assert found_in(tmp_path, workers=2) == alone
    assert "read DICOM headers: 15/15" in capsys.readouterr().err


def test_links_in_a_folder_that_a_list_names_stay_inside(tmp_path):
    (link,) = save(slices(VOXELS[:1]), tmp_path / "secret")
    save(slices(VOXELS, PatientID="P1"), tmp_path / "d/ct")
    (tmp_path / "d/ct/IM0009").symlink_to(link)
    (tmp_path / "d/t.csv").write_text("image\nct\n")
    for wanted in (tmp_path / "d/t.csv", [{"image": str(tmp_path / "d/ct")}]):
        assert [one[3] for one in described(found_in(wanted))] == ["outside_source"]
