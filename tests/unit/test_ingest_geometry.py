import dataclasses

import numpy as np
import pytest
from orientations import CODES, oblique_affine
from store_samples import make_store, rows_of

from mimscale.ingest import geometry


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    return rows_of(make_store(tmp_path_factory.mktemp("geometry"), count=1))[0]


def test_there_are_48_orientations():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_keeps_the_world_and_comes_back_exactly(codes, row):
    array, affine = np.arange(4 * 5 * 6).reshape(4, 5, 6), oblique_affine(codes)
    assert geometry.axis_codes(affine) == codes
    turned, turned_affine = geometry.to_store_grid(array, affine)
    assert geometry.axis_codes(turned_affine) == "RAS"
    for x, y, z in ((0, 0, 0), (3, 4, 5), (1, 2, 3), (3, 0, 2)):  # one voxel, one place in the world
        place = affine @ (x, y, z, 1)
        i, j, k = np.rint(np.linalg.solve(turned_affine, place)).astype(int)[:3]
        assert turned[k, j, i] == array[x, y, z]
        assert np.allclose(turned_affine @ (i, j, k, 1), place)
    source = dataclasses.replace(row, source_orientation=codes, source_shape=array.shape, shape=(1, *turned.shape))
    assert np.array_equal(geometry.to_source_grid(turned, source), array)


def test_an_array_on_another_grid_is_refused(row):
    with pytest.raises(ValueError, match=r"array of \(2, 2, 2\) voxels; the source of volume"):
        geometry.to_source_grid(np.zeros((2, 2, 2)), row)


def test_spacing_is_in_the_order_of_the_array():
    assert geometry.spacing_zyx_mm(np.diag([0.7, 1.1, 2.5, 1])) == (2.5, 1.1, 0.7)


@pytest.mark.parametrize(
    ("affine", "why"),
    [
        (np.full((4, 4), np.nan), "finite"),
        (np.diag([1.0, 0.0, 1.0, 1.0]), "voxel edge of 0"),
        (np.array([[1, 1, 0, 0], [0, 0.01, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "parallel"),
    ],
)
def test_a_matrix_that_maps_no_volume_is_named(affine, why):
    assert why in geometry.why_not_an_affine(affine)
    assert geometry.why_not_an_affine(np.diag([-1.0, 2.0, 3.0, 1.0])) is None


def test_the_distance_of_grids_is_that_of_their_worst_corner():
    affine, other = np.diag([2.0, 2.0, 2.0, 1.0]), np.diag([2.0, 2.0, 2.02, 1.0])
    assert geometry.grid_distance_voxels(affine, affine, (5, 5, 5)) == 0
    assert geometry.grid_distance_voxels(affine, other, (11, 11, 101)) == pytest.approx(1.0)
