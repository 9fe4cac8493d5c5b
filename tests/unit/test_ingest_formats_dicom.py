import warnings
from pathlib import Path

import dicom_samples
import numpy as np
import pydicom
import pydicom.data
import pydicom.uid as uid
import pytest
import SimpleITK as sitk

from mimscale.ingest.formats import REASONS, QuarantineError, ReadOptions, SourceFile, read_scan

RANDOM = np.random.default_rng(0)
RAW = RANDOM.integers(-500, 1500, (6, 9, 11)).astype(np.int16)  # [Z, Y, X]
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)


def read(datasets, folder, options=None, **writing):
    paths = dicom_samples.save(datasets, folder / "dicom", **writing)
    files = [SourceFile(path, path.read_bytes()) for path in paths]
    return read_scan(files[::-1], options or ReadOptions())  # in no particular order


def reason_of(datasets, folder, **options):
    with pytest.raises(QuarantineError) as caught:
        read(datasets, folder, ReadOptions(**options))
    assert caught.value.reason in REASONS
    return caught.value.reason


def itk(folder):
    """Voxels [X, Y, Z] and the affine to RAS+ as SimpleITK reads a series."""
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder / "dicom"))
    image = sitk.ReadImage(names if len(names) > 1 else names[0])
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("directions", [dicom_samples.AXIAL, (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), OBLIQUE])
def test_a_series_lies_where_simpleitk_has_it(tmp_path, directions):
    datasets = dicom_samples.slices(RAW, directions=directions, RescaleSlope=2, RescaleIntercept=-1024)
    scan = read(datasets, tmp_path)
    voxels, affine = itk(tmp_path)
    assert np.array_equal(scan.voxels[0], voxels)
    assert scan.voxels.dtype == np.int16
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)  # positions are written with six decimals
    assert scan.modality == "ct"


def test_slices_are_ordered_by_position_and_not_by_number_or_name(tmp_path):
    datasets = dicom_samples.slices(RAW)
    for number, dataset in zip((3, 1, 6, 2, 5, 4), datasets, strict=True):
        dataset.InstanceNumber = number
    shuffled = [datasets[index] for index in (4, 0, 5, 2, 1, 3)]
    assert np.array_equal(read(shuffled, tmp_path).voxels[0].T, RAW)


def test_slice_distance_comes_from_positions(tmp_path):
    scan = read(dicom_samples.slices(RAW, step_mm=1.25), tmp_path)  # SliceThickness 3.3, SpacingBetweenSlices 9.9
    assert np.linalg.norm(scan.affine[:3, :3], axis=0).tolist() == pytest.approx([0.7, 0.8, 1.25])


def test_every_slice_has_its_own_rescale(tmp_path):
    datasets = dicom_samples.slices(RAW)
    slopes = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    for dataset, slope in zip(datasets, slopes, strict=True):
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -10
    scan = read(datasets, tmp_path)
    assert scan.voxels.dtype == np.float32
    np.testing.assert_allclose(scan.voxels[0].T, RAW * np.array(slopes)[:, None, None] - 10)


def test_whole_rescale_of_unsigned_pixels_gives_hounsfield_units_in_int16(tmp_path):
    raw = (RAW + 1000).astype(np.uint16)
    scan = read(dicom_samples.slices(raw, RescaleSlope=1, RescaleIntercept=-1024), tmp_path)
    assert scan.voxels.dtype == np.int16
    assert np.array_equal(scan.voxels[0].T, raw.astype(int) - 1024)


def test_bits_above_those_stored_are_no_intensity(tmp_path):
    raw = RANDOM.integers(0, 4096, (5, 4, 4)).astype(np.uint16)
    dirty = raw | (RANDOM.integers(0, 16, raw.shape).astype(np.uint16) << 12)  # old files keep overlays there
    datasets = dicom_samples.slices(dirty, BitsStored=12, HighBit=11)
    assert np.array_equal(read(datasets, tmp_path).voxels[0].T, raw)


def test_signed_pixels_of_twelve_bits_keep_their_sign(tmp_path):
    raw = RANDOM.integers(-2048, 2048, (5, 4, 4)).astype(np.int16)
    datasets = dicom_samples.slices(raw & 0x0FFF, BitsStored=12, HighBit=11)
    assert np.array_equal(read(datasets, tmp_path).voxels[0].T, raw)


@pytest.mark.parametrize("slopes", [None, [1, 2, 3, 4, 5, 6]])
def test_an_enhanced_file_is_a_volume(tmp_path, slopes):
    scan = read([dicom_samples.multi_frame(RAW, slopes=slopes, directions=OBLIQUE)], tmp_path)
    expected = RAW if slopes is None else RAW.astype(int) * np.array(slopes)[:, None, None] - 1024
    assert np.array_equal(scan.voxels[0].T, expected)
    np.testing.assert_allclose(scan.affine, itk(tmp_path)[1], atol=1e-9)


def test_implicit_and_big_endian_files_hold_the_same(tmp_path):
    plain = read(dicom_samples.slices(RAW), tmp_path / "plain").voxels
    implicit, big = dicom_samples.slices(RAW), dicom_samples.slices(RAW)
    for dataset in implicit:
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    for dataset in big:
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
    assert np.array_equal(read(implicit, tmp_path / "implicit").voxels, plain)
    assert np.array_equal(read(big, tmp_path / "big").voxels, plain)


LOSSLESS = [uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless]


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_lossless_compression_loses_nothing(tmp_path, syntax, dtype):
    raw = RANDOM.integers(0, 200, (5, 40, 33)).astype(dtype)
    raw = raw - dtype(100) if dtype is np.int16 else raw
    scan = read(dicom_samples.compress(dicom_samples.slices(raw), syntax), tmp_path)
    assert np.array_equal(scan.voxels[0].T, raw)
    assert scan.warnings == ()
    assert np.array_equal(itk(tmp_path)[0].T, raw)  # GDCM inside SimpleITK agrees that this is such a file


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_jpeg_ls_lossless", "MR_small_jp2klossless"])
def test_files_that_others_compressed_hold_what_the_plain_file_holds(tmp_path, name):
    def frames(name):
        datasets = []
        for number in range(4):
            dataset = pydicom.dcmread(str(pydicom.data.get_testdata_file(f"{name}.dcm", download=False)))
            dataset.ImagePositionPatient = [0, 0, number]
            dataset.ImageOrientationPatient = list(dicom_samples.AXIAL)
            datasets.append(dataset)
        return read(datasets, tmp_path / name).voxels

    assert np.array_equal(frames(name), frames("MR_small"))


@pytest.mark.parametrize(("syntax", "bits"), [(uid.JPEGBaseline8Bit, 8), (uid.JPEGExtended12Bit, 12)])
def test_lossy_jpeg_is_read_with_a_warning(tmp_path, syntax, bits):
    ramp = np.tile(np.arange(0, 2**bits, 2**bits // 16), (5, 16, 1)).astype(np.uint8 if bits == 8 else np.uint16)
    datasets = dicom_samples.slices(ramp, BitsStored=bits, HighBit=bits - 1)
    options = {} if bits == 8 else {"bitspersample": 12}
    scan = read(dicom_samples.compress(datasets, syntax, level=100, **options), tmp_path)
    assert np.abs(scan.voxels[0].T.astype(int) - ramp).max() <= 2 ** (bits - 6)  # what quality 100 may lose
    assert scan.warnings == ("lossy_compression",)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_compressed_frames_of_one_file_are_all_read(tmp_path, syntax):
    raw = np.tile(RAW, (1, 4, 4))
    dataset = dicom_samples.compress([dicom_samples.multi_frame(raw)], syntax)
    assert np.array_equal(read(dataset, tmp_path).voxels[0].T, raw)


def test_padding_is_handed_on_in_the_units_of_the_voxels(tmp_path):
    raw = (RAW + 1000).astype(np.uint16)
    datasets = dicom_samples.slices(raw, RescaleSlope=2, RescaleIntercept=-1024, PixelPaddingValue=7)
    assert read(datasets, tmp_path / "unsigned").padding_value == -1010
    signed = dicom_samples.slices(RAW)
    for dataset in signed:
        dataset.add_new("PixelPaddingValue", "US", 63536)  # a signed value in an unsigned field
    assert read(signed, tmp_path / "signed").padding_value == -2000
    assert read(dicom_samples.slices(RAW), tmp_path / "none").padding_value is None


def test_burned_in_annotation_is_warned_about(tmp_path):
    scan = read(dicom_samples.slices(RAW, BurnedInAnnotation="YES"), tmp_path)
    assert scan.warnings == ("burned_in_annotation",)


def test_only_how_it_was_acquired_is_kept_of_a_header(tmp_path):
    fields = {"KVP": 120, "Manufacturer": "ACME", "ConvolutionKernel": "B30f", "BodyPartExamined": "CHEST"}
    datasets = dicom_samples.slices(RAW, ProtocolName="Mr Doe", SeriesDescription="Doe", **fields)
    header = read(datasets, tmp_path).header
    kept = {"kvp": "120", "manufacturer": "ACME", "kernel": "B30f", "body_part": "CHEST", "slice_thickness_mm": "3.3"}
    assert dict(header) == kept


@pytest.mark.parametrize("text", ["DOE-7", "Doe John", "20260131", "1.2.840.10008", "x;y", "Müller"])
def test_names_and_numbers_of_people_are_kept_out_of_the_words_too(tmp_path, text):
    datasets = dicom_samples.slices(RAW, PatientName="DOE^JOHN", ManufacturerModelName=text)
    assert "model" not in read(datasets, tmp_path).header


def moved(index, by):
    positions = np.array([[-50.0, -60.0, 70.0 + 2.5 * z] for z in range(6)])
    positions[index] += by
    return positions


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        (moved(3, [0, 0, -2.5]), "duplicate_positions"),
        (moved(slice(3, None), [0, 0, 2.5]), "missing_slices"),
        (moved(slice(3, None), [0, 0, 1.0]), "uneven_slices"),
        (moved(3, [4, 0, 0]), "shifted_slices"),
        ([[-50, -60 - z * np.tan(np.radians(14)) * 2.5, 70 + 2.5 * z] for z in range(6)], "gantry_tilt"),
        ([[-50, -60, 70 + 2.5 * (z // 3)] for z in range(6)], "too_few_slices"),
    ],
)
def test_a_stack_that_is_no_even_grid_is_refused(tmp_path, positions, reason):
    assert reason_of(dicom_samples.slices(RAW, positions=positions), tmp_path) == reason


def test_jitter_of_real_scanners_is_no_reason_to_refuse(tmp_path):
    jitter = 7.0 * np.arange(6) + [0, 0.035, -0.035, 0.03, -0.03, 0]
    assert read(dicom_samples.slices(RAW, positions=[[0, 0, z] for z in jitter]), tmp_path / "a").affine[2, 2] == 7
    rounded = np.round(0.625 * np.arange(6), 1)  # 0, 0.6, 1.2, 1.9 ...
    scan = read(dicom_samples.slices(RAW, positions=[[0, 0, z] for z in rounded]), tmp_path / "b")
    assert scan.affine[2, 2] == pytest.approx(0.625, abs=0.02)


def test_several_slices_at_every_position_are_a_series_in_time(tmp_path):
    positions = [[0, 0, 2.0 * (z % 4)] for z in range(8)]
    assert reason_of(dicom_samples.slices(np.concatenate([RAW, RAW])[:8], positions=positions), tmp_path) == (
        "time_series"
    )


def damaged(index=2, **fields):
    datasets = dicom_samples.slices(RAW)
    for name, value in fields.items():
        if value is None:
            delattr(datasets[index], name)
        else:
            setattr(datasets[index], name, value)
    return datasets


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "mixed_orientations"),
        ({"PixelSpacing": [0.8, 0.9]}, "mixed_grids"),
        ({"Rows": 8, "Columns": 11}, "mixed_grids"),
        ({"PixelSpacing": None}, "no_spacing"),
        ({"PixelSpacing": [0.8, -0.7]}, "no_spacing"),
        ({"ImagePositionPatient": None}, "no_orientation"),
        ({"ImageOrientationPatient": None}, "no_orientation"),
        ({"PixelData": None}, "missing_pixels"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"Modality": "SEG"}, "not_an_image"),
        ({"SOPClassUID": uid.SecondaryCaptureImageStorage}, "not_an_image"),
        ({"RescaleSlope": 0}, "bad_rescale"),
        ({"BitsAllocated": 12}, "unsupported_dtype"),
        ({"HighBit": 13, "BitsStored": 12}, "unsupported_encoding"),
        ({"Rows": 65535, "Columns": 65535}, "too_large"),
        ({"NumberOfFrames": 2_000_000_000}, "too_large"),
        ({"NumberOfFrames": 2}, "no_orientation"),
        ({"PixelData": b"\0" * 100}, "truncated"),
        ({"Rows": 8000, "Columns": 8000}, "truncated"),
        ({"Rows": 0}, "unreadable"),
    ],
)
def test_one_bad_slice_is_named(tmp_path, fields, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom says that these are odd
        assert reason_of(damaged(**fields), tmp_path) == reason


def test_a_lookup_table_is_no_rescale(tmp_path):
    datasets = dicom_samples.slices(RAW, ModalityLUTSequence=[pydicom.Dataset()])
    assert reason_of(datasets, tmp_path) == "bad_rescale"


def test_three_slices_are_no_volume_and_a_series_has_one_channel(tmp_path):
    assert reason_of(dicom_samples.slices(RAW[:3]), tmp_path / "a") == "too_few_slices"
    assert reason_of(dicom_samples.slices(RAW), tmp_path / "b", channels=2) == "not_3d"


def test_voxels_beyond_the_bound_are_refused(tmp_path):
    assert reason_of(dicom_samples.slices(RAW), tmp_path, max_volume_bytes=RAW.nbytes - 1) == "too_large"
    assert read(dicom_samples.slices(RAW), tmp_path, ReadOptions(max_volume_bytes=RAW.nbytes)).voxels.size == RAW.size


def test_what_is_no_dicom_or_deflated_is_named(tmp_path):
    def reason(data):
        with pytest.raises(QuarantineError) as caught:
            read_scan([SourceFile(tmp_path / "IM1", data)], ReadOptions())
        return caught.value.reason

    assert reason(b"hello") == "not_dicom"
    assert reason(bytes(128) + b"DICM") == "not_an_image"
    deflated = Path(str(pydicom.data.get_testdata_file("image_dfl.dcm", download=False)))
    assert reason(deflated.read_bytes()) == "unsupported_encoding"


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_a_codestream_of_another_size_than_its_header_says_is_refused(tmp_path, syntax):
    datasets = dicom_samples.slices(RANDOM.integers(0, 99, (5, 64, 64)).astype(np.uint16))
    for dataset in dicom_samples.compress(datasets, syntax):
        dataset.Rows = dataset.Columns = 32
    assert reason_of(datasets, tmp_path) in ("unreadable", "truncated")
