import bz2
import gzip

import numpy as np
import pytest
import SimpleITK as sitk

from mimscale.ingest.formats import REASONS, QuarantineError, ReadOptions, SourceFile, companions, read_scan

VOXELS = np.random.default_rng(0).integers(-50, 200, (4, 5, 6)).astype(np.int16)  # [Z, Y, X]
TURNED = (0.0, -0.6, 0.8, 1.0, 0.0, 0.0, 0.0, 0.8, 0.6)  # directions of the axes are its columns
DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
SUFFIXES = ["nrrd", "nhdr", "mha", "mhd"]


def scan(path, **options):
    files = [SourceFile(one, one.read_bytes()) for one in (path, *companions(path))]
    return read_scan(files, ReadOptions(**options))


def reason_of(path, **options):
    with pytest.raises(QuarantineError) as caught:
        scan(path, **options)
    assert caught.value.reason in REASONS
    assert path.name not in caught.value.detail
    return caught.value.reason


def image(voxels=VOXELS, vector=False):
    made = sitk.GetImageFromArray(voxels, isVector=vector)
    made.SetSpacing((0.7, 0.8, 2.5))
    made.SetOrigin((-10.0, 20.5, -300.0))
    made.SetDirection(TURNED)
    return made


def expected_affine(made):
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(made.GetDirection(), (3, 3)) * made.GetSpacing()
    affine[:3, 3] = made.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


def edited(path, *replacements):
    """Replace bytes of the header of a file."""
    data = path.read_bytes()
    for old, new in replacements:
        assert old in data, old
        data = data.replace(old, new, 1)
    path.write_bytes(data)
    return path


def written(folder, suffix, made=None, compressed=False):
    path = folder / f"a.{suffix}"
    sitk.WriteImage(image() if made is None else made, str(path), useCompression=compressed)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    # ITK calls 64 bits MET_LONG in MetaImage, whose width depends on the platform: it is not read.
    [(suffix, dtype) for suffix in SUFFIXES for dtype in DTYPES if suffix[0] == "n" or not dtype.endswith("64")]
    + [("mha", "float64"), ("mhd", "float64")],
)
def test_what_simpleitk_writes_is_read_with_its_voxels_and_grid(tmp_path, suffix, dtype, compressed):
    made = image(np.abs(VOXELS).astype(dtype) if dtype.startswith("u") else VOXELS.clip(-100, 100).astype(dtype))
    found = scan(written(tmp_path, suffix, made, compressed))
    assert np.array_equal(found.voxels[0].T, sitk.GetArrayFromImage(made))
    np.testing.assert_allclose(found.affine, expected_affine(made), atol=1e-12)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_channels_may_lie_side_by_side(tmp_path, suffix):
    made = image(np.stack([VOXELS, VOXELS + 1], axis=-1), vector=True)
    path = written(tmp_path, suffix, made)
    found = scan(path, channels=2)
    assert np.array_equal(found.voxels.transpose(0, 3, 2, 1), np.stack([VOXELS, VOXELS + 1]))
    np.testing.assert_allclose(found.affine, expected_affine(made), atol=1e-12)
    assert reason_of(path) == "not_3d"


def test_big_endian_files_hold_the_same(tmp_path):
    nrrd, mha = written(tmp_path, "nrrd"), written(tmp_path, "mha")
    for path, little, big in (
        (nrrd, b"endian: little", b"endian: big"),
        (mha, b"BinaryDataByteOrderMSB = False", b"BinaryDataByteOrderMSB = True"),
    ):
        header = path.read_bytes()[: -VOXELS.nbytes].replace(little, big)
        path.write_bytes(header + VOXELS.astype(">i2").tobytes())
        assert np.array_equal(scan(path).voxels[0].T, VOXELS)


NRRD = b"""NRRD0004
# a comment
type: short
dimension: 3
space: left-posterior-superior
sizes: 6 5 4
space directions: (1,0,0) (0,2,0) (0,0,3)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (10,20,30)
patient name:=Doe

"""


BODY = VOXELS.tobytes()


def nrrd(folder, *replacements, body=BODY):
    (folder / "b.nrrd").write_bytes(NRRD + body)
    return edited(folder / "b.nrrd", *replacements)


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", (-1, -1, 1)), ("LPS", (-1, -1, 1)), ("RAS", (1, 1, 1)), ("LAS", (-1, 1, 1))],
)
def test_the_space_of_an_nrrd_decides_where_it_lies(tmp_path, space, signs):
    found = scan(nrrd(tmp_path, (b"left-posterior-superior", space.encode())))
    assert np.array_equal(
        found.affine, np.diag([*signs, 1]) @ [[1, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0] * 3 + [1]]
    )


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_compressed_nrrd_is_read_and_cut_ones_are_truncated(tmp_path, pack):
    word = b"encoding: gzip" if pack is gzip.compress else b"encoding: bzip2"
    packed = pack(VOXELS.tobytes())
    assert np.array_equal(scan(nrrd(tmp_path, (b"encoding: raw", word), body=packed)).voxels[0].T, VOXELS)
    assert reason_of(nrrd(tmp_path, (b"encoding: raw", word), body=packed[:-9])) == "truncated"
    assert reason_of(nrrd(tmp_path, (b"encoding: raw", word), body=b"BZx" + packed)) == "unreadable"


def test_lines_and_bytes_before_the_voxels_are_skipped(tmp_path):
    body = b"one\ntwo\nxyz" + VOXELS.tobytes()
    skip = (b"encoding: raw", b"encoding: raw\nline skip: 2\nbyte skip: 3")
    assert np.array_equal(scan(nrrd(tmp_path, skip, body=body)).voxels[0].T, VOXELS)
    from_the_end = (b"encoding: raw", b"encoding: raw\nbyte skip: -1")
    assert np.array_equal(scan(nrrd(tmp_path, from_the_end, body=body)).voxels[0].T, VOXELS)


def test_space_units_are_turned_into_millimetres(tmp_path):
    units = (b"endian", b'space units: "cm" "cm" "cm"\nendian')
    assert np.linalg.norm(scan(nrrd(tmp_path, units)).affine[:3, :3], axis=0).tolist() == [10, 20, 30]
    assert reason_of(nrrd(tmp_path, (b"endian", b'space units: "s" "s" "s"\nendian'))) == "no_spacing"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"space: left-posterior-superior\n", b"", "no_orientation"),
        (b"left-posterior-superior", b"scanner-xyz", "no_orientation"),
        (b"space origin: (10,20,30)\n", b"", "no_orientation"),
        (b"(0,0,3)", b"(0,0,0)", "bad_affine"),
        (b"(0,0,3)", b"none", "not_3d"),
        (b"(0,0,3)", b"(0,3)", "bad_affine"),
        (b"type: short", b"type: block", "unsupported_dtype"),
        (b"kinds: domain domain domain", b"kinds: RGB-color domain domain", "colour"),
        (b"kinds: domain domain domain", b"kinds: complex domain domain", "unsupported_dtype"),
        (b"encoding: raw", b"encoding: hex", "unsupported_encoding"),
        (b"endian: little\n", b"", "unreadable"),
        (b"sizes: 6 5 4", b"sizes: 6 5 five", "unreadable"),
        (b"sizes: 6 5 4", b"sizes: 10000 10000 10000", "too_large"),
        (b"sizes: 6 5 4", b"sizes: 6 5 400", "truncated"),
        (b"sizes: 6 5 4", b"sizes: 6 5 -4", "not_3d"),
        (b"encoding: raw", b"encoding: raw\ndata file: LIST", "unsupported_encoding"),
        (b"encoding: raw", b"encoding: raw\ndata file: ../secret.raw", "outside_source"),
        (b"NRRD0004", b"NRRX0004", "unreadable"),
    ],
)
def test_what_is_wrong_with_an_nrrd_is_named(tmp_path, old, new, reason):
    assert reason_of(nrrd(tmp_path, (old, new))) == reason


def test_an_nrrd_of_no_known_space_is_read_when_its_user_says_so(tmp_path):
    found = scan(nrrd(tmp_path, (b"left-posterior-superior", b"scanner-xyz")), assume_orientation=True)
    assert np.array_equal(found.affine, np.diag([-1, -2, 3, 1]))
    path = nrrd(
        tmp_path,
        (b"space: left-posterior-superior\n", b""),
        (b"space directions: (1,0,0) (0,2,0) (0,0,3)", b"spacings: 1 2 3"),
    )
    assert np.array_equal(scan(path, assume_orientation=True).affine, np.diag([-1, -2, 3, 1]))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b"", "no_orientation"),
        (b"Offset = 0 0 0\n", b"", "no_orientation"),
        (b"ElementSpacing = 1 1 1\n", b"", "no_spacing"),
        (b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 1 0", "no_spacing"),
        (b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 1", "bad_affine"),
        (b"MET_SHORT", b"MET_LONG", "unsupported_dtype"),
        (b"BinaryData = True", b"BinaryData = False", "unsupported_encoding"),
        (b"DimSize = 6 5 4", b"DimSize = 10000 10000 10000", "too_large"),
        (b"DimSize = 6 5 4", b"DimSize = 6 5 40", "truncated"),
        (b"DimSize = 6 5 4", b"DimSize = 6 5 0", "not_3d"),
        (b"DimSize = 6 5 4", b"DimSize = 6 5 x", "unreadable"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = LIST", "unsupported_encoding"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = a%03d.raw", "unsupported_encoding"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = /etc/passwd", "outside_source"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = C:\\secret", "outside_source"),
        (b"ElementDataFile = LOCAL", b"Nothing = LOCAL", "unreadable"),
    ],
)
def test_what_is_wrong_with_a_metaimage_is_named(tmp_path, old, new, reason):
    path = written(tmp_path, "mha", sitk.GetImageFromArray(VOXELS))
    assert reason_of(edited(path, (old, new))) == reason


@pytest.mark.parametrize("suffix", ["nhdr", "mhd"])
def test_a_missing_or_short_data_file_is_named(tmp_path, suffix):
    path = written(tmp_path, suffix)
    (data,) = companions(path)
    data.write_bytes(data.read_bytes()[:-1])
    assert reason_of(path) == "truncated"
    with pytest.raises(QuarantineError, match="missing_file"):
        read_scan([SourceFile(path, path.read_bytes())], ReadOptions())


def test_voxels_at_the_end_of_a_data_file_are_found(tmp_path):
    path = written(tmp_path, "mhd")
    (data,) = companions(path)
    data.write_bytes(b"some other header" + data.read_bytes())
    edited(path, (b"ElementDataFile", b"HeaderSize = -1\nElementDataFile"))
    assert np.array_equal(scan(path).voxels[0].T, VOXELS)
