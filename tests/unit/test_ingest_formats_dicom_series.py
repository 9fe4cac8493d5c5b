import shutil
from collections import Counter
from pathlib import Path

import dicom_samples
import numpy as np
import pydicom.config
import pydicom.data
import pydicom.uid as uid

from mimscale.ingest.formats import ReadOptions, SourceFile, read_scan
from mimscale.ingest.formats.dicom_series import find_series

RAW = np.random.default_rng(0).integers(0, 900, (5, 6, 7)).astype(np.int16)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def found_in(folder):
    return find_series(path for path in folder.rglob("*") if path.is_file())


def scan(series):
    return read_scan([SourceFile(path, path.read_bytes()) for path in series.files], ReadOptions())


def same_series(*groups):
    """Give all data sets the identity of the first."""
    first = groups[0][0]
    for dataset in (dataset for group in groups for dataset in group):
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = first.SeriesInstanceUID, first.StudyInstanceUID
    return [dataset for group in groups for dataset in group]


def test_series_of_one_folder_are_told_apart_and_ordered_by_position(tmp_path):
    first, second = dicom_samples.slices(RAW), dicom_samples.slices(RAW + 1, modality="MR", PatientID="P2")
    mixed = [dataset for pair in zip(first[::-1], second, strict=True) for dataset in pair]
    dicom_samples.save(mixed, tmp_path)
    ct, mr = sorted(found_in(tmp_path), key=lambda series: series.subject)
    assert (ct.subject, ct.modality, ct.problem) == ("P1", "CT", None)
    assert (mr.subject, mr.modality, mr.problem) == ("P2", "MR", None)
    depths = [float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in ct.files]
    assert depths == sorted(depths)
    assert np.array_equal(scan(ct).voxels[0].T, RAW)
    assert np.array_equal(scan(mr).voxels[0].T, RAW + 1)


def test_orientations_and_sizes_part_a_series(tmp_path):
    groups = same_series(
        dicom_samples.slices(RAW),
        dicom_samples.slices(RAW, directions=SAGITTAL),
        dicom_samples.slices(RAW[:, :5], step_mm=3.0),
    )
    dicom_samples.save(groups, tmp_path)
    series = found_in(tmp_path)
    assert [len(one.files) for one in series] == [5, 5, 5]
    assert all(scan(one).voxels.size for one in series)


def test_echoes_at_the_same_positions_are_volumes_of_their_own(tmp_path):
    echoes = same_series(
        dicom_samples.slices(RAW, modality="MR", EchoTime=4.6),
        dicom_samples.slices(RAW + 1, modality="MR", EchoTime=9.2),
    )
    dicom_samples.save(echoes, tmp_path)
    series = found_in(tmp_path)
    assert [len(one.files) for one in series] == [5, 5]
    assert sorted(int(scan(one).voxels.sum()) for one in series) == [RAW.sum(), RAW.sum() + RAW.size]


def test_an_echo_time_that_differs_from_slice_to_slice_parts_nothing(tmp_path):
    datasets = dicom_samples.slices(RAW, modality="MR")
    for number, dataset in enumerate(datasets):
        dataset.EchoTime = 4.6 + number
    dicom_samples.save(datasets, tmp_path)
    (series,) = found_in(tmp_path)
    assert len(series.files) == 5


def test_slices_that_nothing_parts_stay_together_and_are_refused_as_a_series_in_time(tmp_path):
    dicom_samples.save(same_series(dicom_samples.slices(RAW), dicom_samples.slices(RAW)), tmp_path)
    (series,) = found_in(tmp_path)
    assert len(series.files) == 10


def test_every_multi_frame_file_is_a_volume(tmp_path):
    datasets = same_series([dicom_samples.multi_frame(RAW)], [dicom_samples.multi_frame(RAW)])
    dicom_samples.save(datasets, tmp_path)
    assert [len(one.files) for one in found_in(tmp_path)] == [1, 1]


def test_what_is_no_volume_is_listed_with_its_reason(tmp_path):
    dicom_samples.save(dicom_samples.slices(RAW), tmp_path / "ct")
    localizer = dicom_samples.slices(RAW[:2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom_samples.save(localizer, tmp_path / "localizer")
    dicom_samples.save(dicom_samples.slices(RAW[:1], SOPClassUID=uid.SecondaryCaptureImageStorage), tmp_path / "sc")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "empty").write_bytes(b"")
    series = found_in(tmp_path)
    problems = {one.problem[0]: len(one.files) for one in series if one.problem}
    assert problems == {"localizer": 2, "not_an_image": 1, "not_dicom": 2}
    assert sum(len(one.files) for one in series) == 10  # every file is somewhere


def test_copies_of_files_do_not_spoil_a_series(tmp_path):
    paths = dicom_samples.save(dicom_samples.slices(RAW), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "backup")
    volume, copies = found_in(tmp_path)
    assert (volume.files, volume.problem) == (tuple(paths), None)
    assert np.array_equal(scan(volume).voxels[0].T, RAW)
    assert len(copies.files) == 5
    assert copies.problem is not None
    assert copies.problem[0] == "copied_files"


def test_a_dicomdir_stands_for_the_files_that_it_names(tmp_path):
    samples = Path(str(pydicom.data.get_testdata_file("MR_small.dcm", download=False))).parent / "dicomdirtests"
    shutil.copytree(samples, tmp_path / "disc")
    by_name = find_series([tmp_path / "disc" / "DICOMDIR"])
    assert Counter(one.problem[0] if one.problem else "image" for one in by_name)["image"] > 0
    assert all(path.is_relative_to(tmp_path / "disc") for one in by_name for path in one.files)
    ct = next(one for one in by_name if len(one.files) == 5 and one.problem is None)
    victim = ct.files[0]
    victim.unlink()
    missing = [one for one in find_series([tmp_path / "disc" / "DICOMDIR"]) if one.problem]
    assert [one.files for one in missing if one.problem[0] == "missing_file"] == [(victim,)]


def test_a_dicomdir_cannot_lead_out_of_its_folder(tmp_path):
    record = pydicom.Dataset()
    with pydicom.config.disable_value_validation():
        record.ReferencedFileID = ["..", "SECRET"]
    directory = pydicom.Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    directory.DirectoryRecordSequence = [record]
    directory.preamble = bytes(128)
    with pydicom.config.disable_value_validation():
        pydicom.dcmwrite(tmp_path / "DICOMDIR", directory)
    (found,) = find_series([tmp_path / "DICOMDIR"])
    assert found.problem is not None
    assert found.problem[0] == "outside_source"


def test_slices_without_a_position_are_kept_together_for_their_reason(tmp_path):
    datasets = dicom_samples.slices(RAW)
    for dataset in datasets:
        del dataset.ImagePositionPatient
    dicom_samples.save(datasets, tmp_path)
    (series,) = found_in(tmp_path)
    assert len(series.files) == 5
