import gzip
import io
import json

import nibabel
import numpy as np
import pytest
from store_samples import phantom, write_nifti

from mimscale.ingest.formats import REASONS, QuarantineError, ReadOptions, SourceFile, companions, read_scan


def scan(path, **options):
    return read_scan([SourceFile(one, one.read_bytes()) for one in (path, *companions(path))], ReadOptions(**options))


def reason_of(path, **options):
    with pytest.raises(QuarantineError) as caught:
        scan(path, **options)
    assert caught.value.reason in REASONS
    assert path.name not in caught.value.detail  # a file name may name a patient, and the detail is kept in the store
    return caught.value.reason


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_nifti_keeps_its_voxels_and_affine(tmp_path, name, kind):
    voxels, affine = phantom(0), np.diag([1.0, 2.0, 3.0, 1.0])
    nibabel.save(kind(voxels, affine), tmp_path / "b.nii")
    data = (tmp_path / "b.nii").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    found = scan(tmp_path / name)
    assert np.array_equal(found.voxels, voxels[None])
    assert np.array_equal(found.affine, affine)
    assert found.voxels.dtype == np.int16


@pytest.mark.parametrize(
    ("voxels", "stored"),
    [
        (np.array([0, 200], np.uint8), "uint8"),
        (np.array([-100, 100], np.int8), "int16"),
        (np.array([0, 60000], np.uint16), "uint16"),
        (np.array([0, 5], np.uint16), "uint16"),
        (np.array([-3000, 3000], np.int32), "int16"),
        (np.array([0, 60000], np.int32), "uint16"),
        (np.array([-5, 100000], np.int32), "float32"),
        (np.array([-1024.0, 3000.0], np.float64), "int16"),
        (np.array([0.0, 60000.0], np.float32), "uint16"),
        (np.array([0.25, 1.5], np.float64), "float32"),
        (np.array([-1, 100], ">i2"), "int16"),
    ],
)
def test_voxels_take_the_smallest_dtype_that_loses_nothing(tmp_path, voxels, stored):
    array = np.resize(voxels, (2, 3, 4))
    image = nibabel.Nifti1Image(array, np.eye(4))
    if voxels.dtype.byteorder == ">":
        image = nibabel.Nifti1Image(array, np.eye(4), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(image, tmp_path / "a.nii")
    found = scan(tmp_path / "a.nii").voxels
    assert found.dtype.name == stored
    assert np.array_equal(found[0], array)


@pytest.mark.parametrize(
    ("slope", "intercept", "stored"), [(1, -1024, "int16"), (2, 0, "int16"), (0.5, 0.1, "float32")]
)
def test_slope_and_intercept_are_applied_once(tmp_path, slope, intercept, stored):
    raw = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(raw, np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    data = bytearray(image.to_bytes())
    offset = int(image.header["vox_offset"]) or 352
    data[112:120] = np.array([slope, intercept], "<f4").tobytes()  # nibabel would rescale on saving
    data[offset : offset + raw.nbytes] = raw.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(data)
    found = scan(tmp_path / "a.nii").voxels
    assert found.dtype.name == stored
    assert np.allclose(found[0], raw * slope + intercept)


def test_an_empty_file_is_empty(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    assert reason_of(tmp_path / "a.nii.gz") == "empty_file"


@pytest.mark.parametrize("cut", [20, 400, -9, -1])
def test_a_truncated_gzip_is_truncated_wherever_it_was_cut(tmp_path, cut):
    path = write_nifti(tmp_path / "a.nii.gz", phantom(0))
    path.write_bytes(path.read_bytes()[:cut])
    assert reason_of(path) == "truncated"


@pytest.mark.parametrize("cut", [100, 1000])
def test_a_truncated_plain_nifti_is_truncated(tmp_path, cut):
    path = write_nifti(tmp_path / "a.nii", phantom(0))
    path.write_bytes(path.read_bytes()[:cut])
    assert reason_of(path) == "truncated"


def test_a_flipped_bit_in_a_gzip_is_found(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", phantom(0))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the checksum that only a reader of the whole file sees
    path.write_bytes(data)
    assert reason_of(path) == "unreadable"


@pytest.mark.parametrize(("name", "data"), [("a.nii", b"x" * 1000), ("a.nii.gz", b"no gzip"), ("a.mha", b"MHA")])
def test_other_bytes_are_unreadable(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert reason_of(tmp_path / name) == "unreadable"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_voxels_that_are_no_numbers_are_named(tmp_path, bad):
    voxels = np.zeros((4, 4, 4), np.float64)
    voxels[1, 2, 3] = bad
    assert reason_of(write_nifti(tmp_path / "a.nii", voxels)) == "not_finite"


def test_colours_are_no_intensities(tmp_path):
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert reason_of(write_nifti(tmp_path / "a.nii", colours)) == "colour"


def test_the_number_of_axes_must_be_what_was_asked_for(tmp_path):
    four = write_nifti(tmp_path / "four.nii", np.zeros((4, 5, 6, 2), np.int16))
    flat = write_nifti(tmp_path / "flat.nii", np.zeros((4, 5), np.int16))
    single = write_nifti(tmp_path / "single.nii", np.zeros((4, 5, 6, 1), np.int16))
    assert reason_of(four) == reason_of(flat) == "not_3d"
    assert reason_of(single, channels=2) == "not_3d"
    assert scan(single).voxels.shape == (1, 4, 5, 6)
    assert scan(four, channels=2).voxels.shape == (2, 4, 5, 6)


def test_an_affine_that_maps_no_volume_is_named(tmp_path):
    image = nibabel.Nifti1Image(phantom(0), np.eye(4))
    image.header["srow_x"] = 0
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[280:296] = bytes(16)  # srow_x
    (tmp_path / "a.nii").write_bytes(data)
    assert reason_of(tmp_path / "a.nii") == "bad_affine"


def test_a_file_that_does_not_say_where_its_axes_point_needs_a_word(tmp_path):
    image = nibabel.Nifti1Image(phantom(0), None)
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    assert reason_of(tmp_path / "a.nii") == "no_orientation"
    assert scan(tmp_path / "a.nii", assume_orientation=True).voxels.shape == (1, 40, 37, 21)


def test_an_npy_is_already_in_the_order_of_a_store(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", array)
    assert reason_of(tmp_path / "a.npy") == "no_spacing"
    (tmp_path / "a.json").write_text(json.dumps({"spacing_mm": [3, 2, 1]}))
    found = scan(tmp_path / "a.npy")
    assert np.array_equal(found.voxels[0].transpose(2, 1, 0), array)
    assert np.diag(found.affine).tolist() == [1, 2, 3, 1]
    np.save(tmp_path / "a.npy", np.stack([array, array + 1]))
    assert reason_of(tmp_path / "a.npy") == "not_3d"
    assert scan(tmp_path / "a.npy", channels=2).voxels.shape == (2, 4, 3, 2)


def test_an_npy_that_is_cut_or_pickled_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"spacing_mm": [3, 2, 1]}))
    np.save(tmp_path / "a.npy", np.zeros((20, 30, 40)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:5000])
    assert reason_of(tmp_path / "a.npy") == "truncated"
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert reason_of(tmp_path / "a.npy") == "unsupported_dtype"
    archive = io.BytesIO()
    np.savez(archive, x=np.zeros(3))
    (tmp_path / "a.npy").write_bytes(archive.getvalue())
    assert reason_of(tmp_path / "a.npy") == "unreadable"


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_a_header_and_its_image_are_one_volume(tmp_path, kind, endianness):
    header = kind.header_class(endianness=endianness)
    nibabel.save(kind(phantom(0), np.diag([1.0, 2.0, 3.0, 1.0]), header), tmp_path / "a.img")
    found = scan(tmp_path / "a.hdr")
    assert np.array_equal(found.voxels[0], phantom(0))
    assert np.diag(found.affine).tolist() == [1, 2, 3, 1]
    (tmp_path / "a.img").write_bytes((tmp_path / "a.img").read_bytes()[:-1])
    assert reason_of(tmp_path / "a.hdr") == "truncated"
    with pytest.raises(QuarantineError, match="missing_file"):
        read_scan([SourceFile(tmp_path / "a.hdr", (tmp_path / "a.hdr").read_bytes())], ReadOptions())


def with_field(path, **fields):
    """A NIfTI file with raw header fields that nibabel would not write."""
    image = nibabel.Nifti1Image(phantom(0), np.diag([1.0, 2.0, 3.0, 1.0]))
    data = bytearray(image.to_bytes())
    header = np.frombuffer(data, nibabel.Nifti1Header.template_dtype, 1)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_a_slope_that_is_no_number_means_none(tmp_path, slope):
    path = with_field(tmp_path / "a.nii", scl_slope=slope, scl_inter=7)
    assert np.array_equal(scan(path).voxels[0], phantom(0))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"scl_slope": 1, "scl_inter": np.nan}, "bad_rescale"),
        ({"dim": [3, 10_000, 10_000, 10_000, 1, 1, 1, 1]}, "too_large"),
        ({"dim": [3, 40, 37, 22, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [3, 40, 37, -1, 1, 1, 1, 1]}, "not_3d"),
        ({"dim": [9, 40, 37, 21, 1, 1, 1, 1]}, "unreadable"),
        ({"vox_offset": 100}, "unreadable"),
        ({"vox_offset": np.nan}, "unreadable"),
        ({"magic": b"xyz"}, "unreadable"),
        ({"magic": b"ni1"}, "unreadable"),
        ({"datatype": 32}, "unsupported_dtype"),
        ({"datatype": 1536}, "unsupported_dtype"),
        ({"datatype": 9999}, "unsupported_dtype"),
        ({"datatype": 128}, "colour"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 1, 0, 1, 0, 0, 0, 0]}, "bad_affine"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 2.0}, "bad_affine"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "bad_affine"),
        ({"srow_x": [1e9, 0, 0, 0]}, "bad_affine"),
    ],
)
def test_what_is_wrong_with_a_nifti_header_is_named(tmp_path, fields, reason):
    assert reason_of(with_field(tmp_path / "a.nii", **fields)) == reason


def test_metres_and_micrometres_become_millimetres(tmp_path):
    assert np.diag(scan(with_field(tmp_path / "a.nii", xyzt_units=1)).affine)[:3].tolist() == [1000, 2000, 3000]
    assert np.diag(scan(with_field(tmp_path / "a.nii", xyzt_units=3)).affine)[:3] == pytest.approx([1e-3, 2e-3, 3e-3])


def test_axes_of_one_voxel_after_the_third_say_nothing(tmp_path):
    voxels = np.arange(48, dtype=np.int16).reshape(2, 3, 4, 1, 2)  # as ITK writes vectors
    found = scan(write_nifti(tmp_path / "a.nii", voxels), channels=2)
    assert np.array_equal(found.voxels, voxels[:, :, :, 0].transpose(3, 0, 1, 2))


def test_plain_voxels_are_not_copied(tmp_path):
    path = write_nifti(tmp_path / "a.nii", phantom(0))
    data = path.read_bytes()
    voxels = read_scan([SourceFile(path, data)], ReadOptions()).voxels
    assert np.shares_memory(voxels, np.frombuffer(data, np.uint8))


def test_gzip_of_several_members_and_padding_is_read(tmp_path):
    data = write_nifti(tmp_path / "b.nii", phantom(0)).read_bytes()
    whole = gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + bytes(512)
    (tmp_path / "a.nii.gz").write_bytes(whole)
    assert np.array_equal(scan(tmp_path / "a.nii.gz").voxels[0], phantom(0))
    (tmp_path / "a.nii.gz").write_bytes(whole + b"x")
    assert reason_of(tmp_path / "a.nii.gz") == "unreadable"


def test_a_gzip_bomb_is_refused(tmp_path):
    data = write_nifti(tmp_path / "b.nii", phantom(0)).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(data + bytes(2**22)))
    assert reason_of(tmp_path / "a.nii.gz") == "unreadable"
    header = with_field(tmp_path / "b.nii", dim=[3, 1500, 1500, 1500, 1, 1, 1, 1]).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header))
    assert reason_of(tmp_path / "a.nii.gz") == "truncated"  # 6.75 GB do not fit into so few bytes


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_freesurfer_files_keep_their_voxels_and_affine(tmp_path, name, dtype):
    affine = np.array([[-1.0, 0, 0, 90], [0, 0, 1.5, -120], [0, -2, 0, 70], [0, 0, 0, 1]])
    voxels = phantom(0).clip(0, 200).astype(dtype)
    nibabel.save(nibabel.MGHImage(voxels, affine), tmp_path / name)
    found = scan(tmp_path / name)
    assert np.array_equal(found.voxels[0], voxels)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)  # stored in float32


def test_what_is_wrong_with_a_freesurfer_file_is_named(tmp_path):
    path = tmp_path / "a.mgh"
    nibabel.save(nibabel.MGHImage(phantom(0), np.eye(4)), path)
    data = path.read_bytes()

    def reason(at, value):
        path.write_bytes(data[:at] + value + data[at + len(value) :])
        return reason_of(path)

    assert reason(0, b"\0\0\0\2") == "unreadable"
    assert reason(4, b"\x7f\xff\xff\xff") == "too_large"
    assert reason(12, b"\0\0\1\0") == "truncated"
    assert reason(16, b"\0\0\0\0") == "not_3d"
    assert reason(20, b"\0\0\0\2") == "unsupported_dtype"
    assert reason(28, b"\0\0") == "no_orientation"
    path.write_bytes(data[:100])
    assert reason_of(path) == "truncated"


def test_an_npz_of_one_array_is_read(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    (tmp_path / "a.json").write_text(json.dumps({"spacing_mm": [3, 2, 1]}))
    np.savez_compressed(tmp_path / "a.npz", array)
    assert np.array_equal(scan(tmp_path / "a.npz").voxels[0].T, array)
    np.savez(tmp_path / "a.npz", array, array)
    assert reason_of(tmp_path / "a.npz") == "not_3d"
    data = bytearray((tmp_path / "a.npz").read_bytes())
    np.savez(tmp_path / "a.npz", array)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(array.tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    assert reason_of(tmp_path / "a.npz") == "unreadable"  # the checksum says so


@pytest.mark.parametrize("spacing_mm", [[1, 2], [1, 2, 0], [1, 2, "x"], None, [1, 2, 1e999]])
def test_a_sidecar_without_a_spacing_is_named(tmp_path, spacing_mm):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4)))
    (tmp_path / "a.json").write_text(json.dumps({"spacing_mm": spacing_mm}))
    assert reason_of(tmp_path / "a.npy") == "no_spacing"


def test_an_npy_that_claims_more_than_it_has_is_refused_before_memory(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"spacing_mm": [3, 2, 1]}))
    for shape, reason in (((10_000,) * 3, "too_large"), ((1000,) * 3, "truncated"), ((0, 3, 4), "not_3d")):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": "<i2"})
        (tmp_path / "a.npy").write_bytes(stream.getvalue() + bytes(100))
        assert reason_of(tmp_path / "a.npy") == reason
