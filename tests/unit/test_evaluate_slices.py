import numpy as np
import pytest

from mimscale.evaluate.slices import centre_of, cut_planes, grey_levels, load_planes, save_planes


def marked_volume():
    """[Z, Y, X] with one voxel each at the top, the front and the right side of the middle."""
    volume = np.zeros((5, 7, 9), np.uint8)
    volume[4, 3, 4] = 1  # superior
    volume[2, 6, 4] = 2  # anterior
    volume[2, 3, 8] = 3  # right
    return volume


def test_pictures_show_head_up_front_up_and_the_patients_right_on_the_left():
    planes = cut_planes({"image": marked_volume()}, (2, 3, 4), (3.0, 2.0, 1.0))
    axial, coronal, sagittal = (planes[name].layers["image"] for name in ("axial", "coronal", "sagittal"))
    assert axial.shape == (7, 9)
    assert axial[0, 4] == 2  # front up
    assert axial[3, 0] == 3  # right on the left
    assert coronal.shape == (5, 9)
    assert coronal[0, 4] == 1  # head up
    assert coronal[2, 0] == 3
    assert sagittal.shape == (5, 7)
    assert sagittal[0, 3] == 1
    assert sagittal[2, 0] == 2  # front to the left


def test_a_pixel_keeps_the_size_of_its_voxel_in_mm():
    planes = cut_planes({"image": marked_volume()}, (2, 3, 4), (3.0, 2.0, 1.0))
    assert {name: plane.pixel_mm for name, plane in planes.items()} == {
        "axial": (2.0, 1.0),
        "coronal": (3.0, 1.0),
        "sagittal": (3.0, 2.0),
    }


def test_slices_written_and_read_are_the_same(tmp_path):
    planes = cut_planes({"image": marked_volume(), "truth": marked_volume() + 1}, (2, 3, 4), (3.0, 2.0, 1.0))
    save_planes(tmp_path / "a.npz", planes)
    again = load_planes(tmp_path / "a.npz")
    for name, plane in planes.items():
        assert again[name].pixel_mm == plane.pixel_mm
        assert again[name].layers.keys() == plane.layers.keys()
        assert all(np.array_equal(again[name].layers[key], layer) for key, layer in plane.layers.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_the_centre_is_the_middle_of_what_is_marked():
    mask = np.zeros((10, 10, 10), bool)
    mask[2:5, 6:7, 1:9] = True
    assert centre_of(mask) == (3, 6, 4)


def test_without_marked_voxels_the_centre_is_the_middle_of_the_grid():
    assert centre_of(np.zeros((10, 12, 14), bool)) == (5, 6, 7)


@pytest.mark.parametrize(("value", "level"), [(-1.0, 0), (0.0, 0), (0.5, 127), (1.0, 255), (7.0, 255)])
def test_grey_levels_cover_the_window_and_clip_outside(value, level):
    assert grey_levels(np.array([value]), 0.0, 1.0)[0] == level
