"""DICOM in, DICOM-SEG out: opened again by highdicom and by pydicom, and compared with source and NIfTI."""

import builtins
import logging
import subprocess
import sys

import dicom_samples
import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from predict_samples import OBLIQUE, REGIONS, ZSCORE, Threshold, ingested, run_on, write_series
from small_segmentation import make_finetune_run, make_store, source_arrays

from mimscale.cli import main
from mimscale.evaluate import weights
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.ingest.formats import ReadOptions, SourceFile, read_scan
from mimscale.predict import dicom_seg
from mimscale.store.manifest import load_manifest

WORDS = ["threads=1", "batch=4"]
FRAME_OF_REFERENCE = "1.2.826.0.1.3680043.9.7433.77"


def predict(*words):
    return main(["predict", *map(str, words), *WORDS])


@pytest.fixture
def knowing(monkeypatch):
    """Networks that tell the classes of `source_arrays` by their intensity, so that masks are no noise."""

    def use(middles):
        real = weights.load_model
        monkeypatch.setattr(weights, "load_model", lambda *words: (Threshold(middles), real(*words)[1]))

    return use


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


def in_slice_order(files):
    sources = [pydicom.dcmread(path) for path in files]
    normal = np.cross(OBLIQUE[:3], OBLIQUE[3:])
    return sorted(sources, key=lambda one: float(np.dot(one.ImagePositionPatient, normal)))


def frames_of(segmentation):
    """(segment number, frame's functional groups) of each frame, as pydicom reads them."""
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        named = groups if "SegmentIdentificationSequence" in groups else shared
        yield int(named.SegmentIdentificationSequence[0].ReferencedSegmentNumber), groups


def assert_same_geometry(segmentation, sources, step_mm=2.5):
    """Orientation, position, spacing, frame of reference and references of each frame are the source's."""
    by_uid = {one.SOPInstanceUID: one for one in sources}
    assert segmentation.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert segmentation.StudyInstanceUID == sources[0].StudyInstanceUID
    assert segmentation.SeriesInstanceUID != sources[0].SeriesInstanceUID
    assert segmentation.PatientID == sources[0].PatientID
    assert (segmentation.Rows, segmentation.Columns) == (sources[0].Rows, sources[0].Columns)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == sources[0].ImageOrientationPatient
    measures = shared.PixelMeasuresSequence[0]
    assert measures.PixelSpacing == sources[0].PixelSpacing
    assert float(measures.SpacingBetweenSlices) == pytest.approx(step_mm)  # and not the 9.9 of the source's header
    for _, groups in frames_of(segmentation):
        (derived,) = groups.DerivationImageSequence
        (reference,) = derived.SourceImageSequence
        source = by_uid[reference.ReferencedSOPInstanceUID]
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
        assert groups.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    (series,) = segmentation.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == sources[0].SeriesInstanceUID
    assert {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence} == by_uid.keys()


def test_a_segmentation_and_a_nifti_of_one_series_are_equal_voxel_for_voxel(store, tmp_path, knowing):
    knowing((0.02, 0.32, 0.62))
    files, _ = write_series(tmp_path / "series", FrameOfReferenceUID=FRAME_OF_REFERENCE)
    run = make_finetune_run(tmp_path / "run", store)
    out = tmp_path / "out"
    assert predict(run, tmp_path / "series", f"out={out}", "format=both") == 0
    assert sorted(path.name for path in out.iterdir()) == ["series.dcm", "series.nii.gz"]
    nifti = nibabel.load(out / "series.nii.gz")
    classes = np.asarray(nifti.dataobj)  # [X, Y, Z]
    assert set(np.unique(classes)) == {0, 1, 2}
    sources = in_slice_order(files)
    scan = read_scan([SourceFile(path, path.read_bytes()) for path in files], ReadOptions())
    assert np.allclose(nifti.affine, scan.affine, atol=1e-5)  # NIfTI holds float32

    opened = highdicom.seg.segread(out / "series.dcm")
    assert opened.segmentation_type == highdicom.seg.SegmentationTypeValues.BINARY
    assert [opened.get_segment_description(number).segment_label for number in (1, 2)] == ["grey", "white"]
    uids = [one.SOPInstanceUID for one in sources]
    pixels = opened.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels.transpose(2, 1, 0), classes)
    volume = opened.get_volume(combine_segments=True, allow_missing_positions=True)
    # highdicom's slices run the other way: what counts is what lies at each place of the patient.
    at = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    patient = at @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    ras = patient * (-1, -1, 1)
    ours = (ras - nifti.affine[:3, 3]) @ np.linalg.inv(nifti.affine[:3, :3]).T
    assert np.abs(ours - np.rint(ours)).max() < 1e-3  # voxels
    x, y, z = np.rint(ours).astype(int).T
    assert np.array_equal(volume.array.reshape(-1), classes[x, y, z])
    assert np.count_nonzero(volume.array) == np.count_nonzero(classes)

    segmentation = pydicom.dcmread(out / "series.dcm")
    assert segmentation.Modality == "SEG"
    assert segmentation.SegmentsOverlap == "NO"
    assert_same_geometry(segmentation, sources)
    by_hand = np.zeros_like(classes)
    places = {one.SOPInstanceUID: number for number, one in enumerate(sources)}
    for (number, groups), frame in zip(frames_of(segmentation), segmentation.pixel_array, strict=True):
        uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        by_hand[:, :, places[uid]][frame.T > 0] = number
    assert np.array_equal(by_hand, classes)


def test_a_series_gets_what_evaluation_gives_it_from_a_store(tmp_path):
    files, _ = write_series(tmp_path / "series", FrameOfReferenceUID=FRAME_OF_REFERENCE)
    scan = read_scan([SourceFile(path, path.read_bytes()) for path in files], ReadOptions())
    label = (scan.voxels[0] > 200).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(label, scan.affine), tmp_path / "label.nii.gz")
    store = ingested(tmp_path / "store", [(tmp_path / "series", tmp_path / "label.nii.gz")], ZSCORE, spacing_mm=1.5)
    run = run_on(tmp_path / "run", store)
    evaluate(EvaluateConfig(run_dir=run, split="train", threads=1, batch=4, pictures=0, store_grid=False))
    row = load_manifest(store).row(0)
    assert predict(run, tmp_path / "series", f"out={tmp_path / 'out'}", "format=both") == 0
    wanted = run / "evaluate" / "predictions" / f"{row.id}.nii.gz"
    assert (tmp_path / "out" / "series.nii.gz").read_bytes() == wanted.read_bytes()
    opened = highdicom.seg.segread(tmp_path / "out" / "series.dcm")
    uids = [one.SOPInstanceUID for one in in_slice_order(files)]
    pixels = opened.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels.transpose(2, 1, 0), np.asarray(nibabel.load(wanted).dataobj))


def test_regions_that_overlap_are_segments_that_overlap(store, tmp_path, monkeypatch):
    files, _ = write_series(tmp_path / "series", FrameOfReferenceUID=FRAME_OF_REFERENCE)
    run = make_finetune_run(tmp_path / "run", store, outputs=2, fields={"regions": REGIONS})
    real = weights.load_model

    class Regions(Threshold):
        def forward(self, windows):
            return 10 * (windows[:, :1] - self.middles)

    monkeypatch.setattr(weights, "load_model", lambda *words: (Regions((0.17, 0.47)), real(*words)[1]))
    codes = 'codes={core: [SCT, "108369006", Neoplasm]}'
    assert predict(run, tmp_path / "series", f"out={tmp_path / 'out'}", "format=both", codes) == 0
    opened = highdicom.seg.segread(tmp_path / "out" / "series.dcm")
    assert opened.SegmentsOverlap == "YES"
    uids = [one.SOPInstanceUID for one in in_slice_order(files)]
    pixels = opened.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)  # [Z, Y, X, K]
    for number, region in enumerate(REGIONS):
        mask = np.asarray(nibabel.load(tmp_path / "out" / "series" / f"{region}.nii.gz").dataobj)
        assert mask.any()
        assert np.array_equal(pixels[..., number].transpose(2, 1, 0), mask)
    assert (pixels.sum(axis=-1) == 2).any()
    core = opened.get_segment_description(2)
    assert core.segmented_property_type.value == "108369006"
    assert core.segmented_property_type.scheme_designator == "SCT"
    assert opened.get_segment_description(1).segmented_property_type.scheme_designator == "99MIMSCALE"
    assert_same_geometry(pydicom.dcmread(tmp_path / "out" / "series.dcm"), in_slice_order(files))


@pytest.mark.parametrize("downwards", [False, True])
def test_frames_of_one_file_are_referred_to_by_their_numbers(downwards, store, tmp_path, knowing):
    knowing((0.02, 0.32, 0.62))
    voxels = source_arrays((14, 22, 18), seed=0)[0]
    step_mm = -2.5 if downwards else 2.5
    dataset = dicom_samples.multi_frame(voxels, modality="MR", directions=OBLIQUE, step_mm=step_mm)
    dataset.FrameOfReferenceUID = FRAME_OF_REFERENCE
    (path,) = dicom_samples.save([dataset], tmp_path / "scans", ["enhanced.dcm"])
    run = make_finetune_run(tmp_path / "run", store)
    assert predict(run, path, f"out={tmp_path / 'out'}", "format=both") == 0
    classes = np.asarray(nibabel.load(tmp_path / "out" / "enhanced.nii.gz").dataobj)
    in_file = classes[:, :, ::-1] if downwards else classes
    segmentation = pydicom.dcmread(tmp_path / "out" / "enhanced.dcm")
    by_hand = np.zeros_like(classes)
    for (number, groups), frame in zip(frames_of(segmentation), segmentation.pixel_array, strict=True):
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == dataset.SOPInstanceUID
        place = int(reference.ReferencedFrameNumber) - 1
        source = dataset.PerFrameFunctionalGroupsSequence[place]
        assert groups.PlanePositionSequence[0].ImagePositionPatient == (
            source.PlanePositionSequence[0].ImagePositionPatient
        )
        by_hand[:, :, place][frame.T > 0] = number
    assert np.array_equal(by_hand, in_file)
    assert set(np.unique(by_hand)) == {0, 1, 2}


def test_nothing_found_is_a_segmentation_too(store, tmp_path, knowing):
    knowing((0.02, 99.0, 99.0))
    files, _ = write_series(tmp_path / "series", FrameOfReferenceUID=FRAME_OF_REFERENCE)
    run = make_finetune_run(tmp_path / "run", store)
    assert predict(run, tmp_path / "series", f"out={tmp_path / 'out'}") == 0
    opened = highdicom.seg.segread(tmp_path / "out" / "series.dcm")
    uids = [one.SOPInstanceUID for one in in_slice_order(files)]
    assert not opened.get_pixels_by_source_instance(uids).any()


def test_headers_that_anonymisers_leave_are_enough_and_odd_values_stay_out(store, tmp_path, capsys, caplog):
    fields = {"PatientSex": "U", "PatientBirthDate": "unknown", "PatientName": "Doe^Jane^^^^^", "SeriesNumber": 4}
    with pydicom.config.disable_value_validation():
        files, _ = write_series(tmp_path / "series", FrameOfReferenceUID=FRAME_OF_REFERENCE, **fields)
        for path in files:
            dataset = pydicom.dcmread(path)
            del dataset.SliceThickness
            pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    run = make_finetune_run(tmp_path / "run", store)
    with caplog.at_level(logging.DEBUG):
        assert predict(run, tmp_path / "series", f"out={tmp_path / 'out'}") == 0
    err = capsys.readouterr().err
    assert "PatientSex of the source is no value that DICOM knows" in err
    assert "Jane" not in err
    segmentation = pydicom.dcmread(tmp_path / "out" / "series.dcm")
    assert (segmentation.PatientSex, segmentation.PatientBirthDate) == ("", "")
    assert str(segmentation.PatientName).startswith("Doe^Jane")
    assert segmentation.SeriesNumber == 1004


def test_a_series_without_a_frame_of_reference_is_told_to_write_nifti_and_does_so(store, tmp_path, capsys):
    files, _ = write_series(tmp_path / "series")
    for path in files:
        dataset = pydicom.dcmread(path)
        del dataset.FrameOfReferenceUID
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    run = make_finetune_run(tmp_path / "run", store)
    out = tmp_path / "out"
    assert predict(run, tmp_path / "series", f"out={out}") == 3
    err = capsys.readouterr().err
    assert f"{tmp_path / 'series'}: a DICOM header without FrameOfReferenceUID" in err
    assert "format=nifti" in err
    assert not out.exists() or not list(out.iterdir())
    assert predict(run, tmp_path / "series", f"out={out}", "format=nifti") == 0
    assert [path.name for path in out.iterdir()] == ["series.nii.gz"]


def test_a_writer_that_is_killed_leaves_no_file_under_its_name(tmp_path):
    files, voxels = write_series(tmp_path / "series", FrameOfReferenceUID=FRAME_OF_REFERENCE)
    np.save(tmp_path / "masks.npy", (voxels > 200).T.astype(np.uint8))
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import numpy, pydicom\n"
        "from mimscale.predict.dicom_seg import Segment, write_dicom_seg\n"
        "def killed(file, *words, **more):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
        "if sys.argv[1] == 'killed':\n"
        "    pydicom.dcmwrite = killed\n"
        "masks, out, *files = sys.argv[2:]\n"
        "write_dicom_seg(Path(out), numpy.load(masks), files, [Segment(name='bright', code=None)], 'test')\n"
    )
    out = tmp_path / "out" / "series.dcm"
    words = [str(tmp_path / "masks.npy"), str(out), *map(str, files)]
    ended = subprocess.run(
        [sys.executable, "-c", program, "killed", *words], capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == -9, ended.stderr
    assert [path.name.startswith(".tmp-series.dcm") for path in out.parent.iterdir()] == [True]
    subprocess.run([sys.executable, "-c", program, "whole", *words], timeout=60, check=True)
    assert pydicom.dcmread(out).Modality == "SEG"


def test_without_highdicom_the_way_to_install_it_is_named_before_anything_is_computed(
    store, tmp_path, capsys, monkeypatch
):
    write_series(tmp_path / "series")
    run = make_finetune_run(tmp_path / "run", store)
    real = builtins.__import__

    def without(name, *words, **more):
        if name == "highdicom":
            raise ImportError(name)
        return real(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert predict(run, tmp_path / "series", f"out={tmp_path / 'out'}") == 2
    assert "pip install 'mimscale[dicom-seg]'" in capsys.readouterr().err
    assert predict(run, tmp_path / "series", f"out={tmp_path / 'out'}", "format=nifti") == 0


def test_overlaps_of_segments_are_counted_in_the_bytes_of_the_masks():
    masks = np.ones((3, 2, 2, 255), np.uint8).view(dicom_seg._Masks)
    summed = masks.sum(axis=-1)
    assert summed.dtype == np.uint8  # numpy's own sum of them has 8 bytes a voxel
    assert (summed == 255).all()
