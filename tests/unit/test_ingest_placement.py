import dataclasses

import numpy as np
import pytest
from orientations import CODES, oblique_affine
from scipy import ndimage
from store_samples import config_of, make_store, rows_of

from mimscale.errors import ConfigError
from mimscale.ingest import geometry
from mimscale.ingest.convert import _volume_id
from mimscale.ingest.formats import QuarantineError
from mimscale.ingest.placement import Placement, place, with_margin
from mimscale.ingest.resample import positions

SHAPE = (30, 26, 34)  # of a source, in its own order


@pytest.fixture(scope="module")
def some_row(tmp_path_factory):
    return rows_of(make_store(tmp_path_factory.mktemp("placement"), count=1))[0]


def placed(codes, row, **how):
    """A source, its placement, and the row that a store would hold of it."""
    affine = oblique_affine(codes)
    turned_affine, source_zyx = geometry.store_grid(affine, SHAPE)
    spacing_mm = geometry.spacing_zyx_mm(turned_affine)
    placement = place(source_zyx, spacing_mm, voxel_bytes=2, max_bytes=2**20, **how)
    stored_affine = placement.affine(turned_affine)
    row = dataclasses.replace(
        row,
        shape=(1, *placement.shape_zyx),
        spacing_mm=geometry.spacing_zyx_mm(stored_affine),
        affine=tuple(stored_affine.reshape(-1)),
        source_affine=tuple(affine.reshape(-1)),
        source_orientation=codes,
        source_shape=SHAPE,
        crop_box=placement.crop_box,
        resampled=placement.resampled,
    )
    return affine, placement, row


def smooth_phantom(seed=0):
    """Whole numbers of a body with soft borders, and a label map of two nested regions, in the source's order."""
    axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in SHAPE), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    texture = ndimage.gaussian_filter(np.random.RandomState(seed).randn(*SHAPE), 3)
    image = 1000 / (1 + np.exp((radius - 0.7) * 10)) + 1000 * texture
    return image.astype(np.int16), (radius < 0.85).astype(np.uint8) + (radius < 0.5).astype(np.uint8)


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.parametrize("codes", CODES)
def test_a_cropped_volume_comes_back_exactly_inside_its_box_and_as_fill_outside(codes, some_row):
    image, labels = smooth_phantom()
    box = ((3, 20), (0, 22), (4, 25))
    affine, placement, row = placed(codes, some_row, box=box)
    assert Placement.of_row(row) == placement
    stored = placement.store_image(geometry.to_store_grid(image, affine)[0][None])
    assert stored.shape == row.shape
    back = geometry.to_source_grid(placement.image_to_source(stored, -7.0)[0], row)
    inside = np.zeros(row.source_zyx, dtype=bool)
    inside[tuple(slice(*edge) for edge in box)] = True
    inside = geometry.to_source_grid(inside, row)
    assert np.array_equal(back[inside], image[inside])
    assert (back[~inside] == -7).all()
    classes = placement.store_classes(geometry.to_store_grid(labels, affine)[0])
    on_source = geometry.to_source_grid(placement.classes_to_source(classes), row)
    assert np.array_equal(on_source, np.where(inside, labels, 0))


# Tolerance: voxels of 0.7, 1.1 and 2.5 mm become 1.2 mm, and finer structure than that is gone for ever. The phantom
# has soft borders and little else: measured are 0.9 % of its range on average and 6 % at the worst voxel.
@pytest.mark.parametrize("box", [None, ((1, 25), (2, 22), (1, 25))])
@pytest.mark.parametrize("codes", CODES)
def test_a_resampled_volume_comes_back_nearly(codes, box, some_row):
    image, labels = smooth_phantom()
    affine, placement, row = placed(codes, some_row, wanted_mm=(1.2, 1.2, 1.2), box=box)
    again = Placement.of_row(row)
    assert (again.box, again.shape_zyx, again.source_zyx) == (placement.box, placement.shape_zyx, placement.source_zyx)
    assert np.allclose(again.step_zyx, placement.step_zyx, rtol=1e-12)
    assert np.allclose(row.spacing_mm, 1.2)
    turned = geometry.to_store_grid(image, affine)[0][None]
    stored = placement.store_image(turned)
    assert stored.dtype == np.int16
    back = again.image_to_source(stored, 0)
    kept = (slice(None), *(slice(*edge) for edge in placement.box))
    error = np.abs(back[kept].astype(float) - turned[kept])
    assert error.mean() < np.ptp(image) / 80
    assert error.max() < np.ptp(image) / 8
    truth = geometry.to_store_grid(labels, affine)[0]
    classes = again.classes_to_source(placement.store_classes(truth))
    assert classes.shape == truth.shape
    for value in (1, 2):
        assert dice(classes[kept[1:]] == value, truth[kept[1:]] == value) > 0.93


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAL"])
@pytest.mark.parametrize("box", [None, ((3, 24), (2, 24), (1, 25))])
def test_every_voxel_centre_keeps_its_place_in_the_world(codes, box, some_row):
    # A linear ramp over the world: what a stored voxel holds is what its affine says of its place.
    slope = np.array([2.0, -1.5, 0.8])
    affine, placement, row = placed(codes, some_row, wanted_mm=(1.0, 1.3, 1.2), box=box)
    source = np.stack(np.meshgrid(*(np.arange(edge) for edge in SHAPE), indexing="ij"), axis=-1)
    world = source @ affine[:3, :3].T + affine[:3, 3]
    ramp = geometry.to_store_grid((world @ slope).astype(np.float32), affine)[0]
    stored = placement.store_image(ramp[None])[0]
    z, y, x = np.meshgrid(*(np.arange(edge) for edge in stored.shape), indexing="ij")
    stored_affine = np.reshape(row.affine, (4, 4))
    wanted = (np.stack([x, y, z], axis=-1) @ stored_affine[:3, :3].T + stored_affine[:3, 3]) @ slope
    inner = (slice(4, -4),) * 3  # no edge within reach of the Gaussian
    assert stored[inner].size > 500
    assert np.allclose(stored[inner], wanted[inner], rtol=0, atol=1e-3)


def test_logits_go_back_as_probabilities_so_that_borders_lie_between_voxels(some_row):
    image, _ = smooth_phantom()
    affine, placement, row = placed("LPI", some_row, wanted_mm=(2.0, 2.0, 2.0), box=((1, 33), (1, 25), (1, 29)))
    turned = geometry.to_store_grid(image, affine)[0].astype(np.float32)
    stored = placement.store_image(turned[None])[0]
    logits = np.stack([np.zeros_like(stored), (stored - 500) / 100])
    classes = placement.logits_to_source(logits)
    truth = turned > 500
    assert classes.shape == row.source_zyx
    assert not classes[0].any()
    assert not classes[:, :, -1].any()
    nearest = placement.classes_to_source(logits.argmax(axis=0).astype(np.uint8))
    assert dice(classes == 1, truth) > max(0.95, dice(nearest == 1, truth))


def test_a_volume_that_is_neither_cropped_nor_resampled_is_not_touched(some_row):
    affine, placement, row = placed("LPI", some_row, wanted_mm=(2.5, 1.1, 0.7), box=((0, 34), (0, 26), (0, 30)))
    volume = np.zeros((1, *row.source_zyx), dtype=np.int16)
    assert placement.as_scanned
    assert placement.store_image(volume) is volume
    assert placement.image_to_source(volume, 3) is volume
    assert placement.affine(affine) is affine
    assert (row.crop_box, row.resampled) == (None, False)


def test_an_axis_that_has_the_wanted_spacing_already_keeps_its_voxels(some_row):
    _, placement, row = placed("RAS", some_row, wanted_mm=(2.5009, 1.1, 1.4))
    assert placement.step_zyx[:2] == (1.0, 1.0)
    assert row.spacing_mm == pytest.approx((2.5, 1.1, 1.4))


def test_both_grids_share_their_centre(some_row):
    affine, placement, row = placed("RAS", some_row, wanted_mm=(1.9, 1.9, 1.9))
    centre = affine @ (*(np.asarray(SHAPE) - 1) / 2, 1)
    z, y, x = placement.shape_zyx
    assert np.allclose(np.reshape(row.affine, (4, 4)) @ ((x - 1) / 2, (y - 1) / 2, (z - 1) / 2, 1), centre)
    assert positions(34, z, placement.step_zyx[0]).mean() == pytest.approx(33 / 2)


@pytest.mark.parametrize(
    ("spacing_mm", "wanted_mm", "reason", "detail"),
    [
        ((1.0, 1.0, 1.0), (0.2, 0.2, 0.2), "too_large", "more than 32 times as many voxels"),
        ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), "too_large", "more than 1000000 bytes"),
        ((1e300, 1.0, 1.0), (1e-3, 1e-3, 1e-3), "too_large", "1e\\+300 x 1 x 1 mm at spacing_mm 0.001"),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 130.0), "too_coarse", "50 x 60 x 64 voxels of 1 x 1 x 1 mm"),
    ],
)
def test_a_spacing_that_makes_far_too_many_or_no_voxels_is_refused_before_any_is_made(
    spacing_mm, wanted_mm, reason, detail
):
    with pytest.raises(QuarantineError, match=detail) as error:
        place((50, 60, 64), spacing_mm, voxel_bytes=2, max_bytes=10**6, wanted_mm=wanted_mm)
    assert error.value.reason == reason


def test_a_margin_is_in_mm_and_ends_with_the_volume():
    box = ((10, 20), (1, 4), (5, 9))
    assert with_margin(box, 10, (2.0, 3.0, 5.0), (40, 40, 10)) == ((5, 25), (0, 8), (3, 10))
    assert with_margin(box, 10, (1.00000001, 1.0, 0.99999999), (99, 99, 99))[0] == (0, 30)
    assert with_margin(box, 0, (1.0, 1.0, 1.0), (40, 40, 10)) == box


def test_an_id_depends_on_what_decides_the_voxels_and_on_nothing_else(tmp_path):
    def id_of(modality="mr", **options):
        return _volume_id("00", config_of("x", tmp_path / "out", **options), modality)

    plain = id_of()
    assert plain == id_of(crop_margin_mm=3) == id_of("ct")  # no crop: neither decides anything
    assert id_of(spacing_mm=1) == id_of(spacing_mm=[1, 1, 1])
    cropped = id_of(crop="foreground")
    others = [id_of(spacing_mm=1), id_of(spacing_mm=[1, 1, 2]), cropped]
    others += [id_of(crop="foreground", crop_margin_mm=3), id_of("ct", crop="foreground")]
    assert len({plain, *others}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing_mm": 0}, "spacing_mm=0.0: a voxel edge must be above 0 mm"),
        ({"spacing_mm": [1, -2, 1]}, "spacing_mm="),
        ({"spacing_mm": [1, 2]}, r"spacing_mm=\[1.0, 2.0\]: give one number for all axes, or three"),
        ({"spacing_mm": float("nan")}, "spacing_mm=nan"),
        ({"crop": "body"}, "crop: Input should be 'none' or 'foreground'"),
        ({"crop_margin_mm": -1}, "crop_margin_mm=-1.0: must be at least 0"),
        ({"overlay": "label_source"}, "overlay=label_source: names that end with '_source'"),
    ],
)
def test_a_setting_that_means_nothing_is_named(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of("x", tmp_path / "out", **options)
