"""The affine map against scipy's, in float64, where both differ by rounding alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from mimscale.stream.augment import Draws, augment, draw
from mimscale.stream.config import AugmentConfig

SIZE = (13, 18, 16)
SPACING_MM = np.array([[3.0, 0.8, 0.9], [1.0, 1.0, 1.0], [1.5, 2.0, 0.7]])
CONFIG = AugmentConfig(affine_prob=1.0, rotate_deg=(40, 30, 25), zoom=(0.7, 1.4), translate_voxels=(2.3, 3.1, 1.7))


def the_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Draws]:
    generator = torch.Generator().manual_seed(4)
    image = torch.randn((3, 2, *SIZE), generator=generator, dtype=torch.float64)
    label = torch.randint(0, 5, (3, *SIZE), generator=generator, dtype=torch.uint8)
    return image, label, torch.ones((3, 1, *SIZE), dtype=torch.bool), draw([8, 9, 10], CONFIG)


def plain_map(draws: Draws, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset that `affine_transform` takes: old = matrix @ new + offset, in voxels from the corner."""
    spacing = SPACING_MM[sample]
    matrix = np.diag(1 / spacing) @ draws.matrix[sample] @ np.diag(spacing)
    middle = (np.array(SIZE) - 1) / 2
    return matrix, middle + draws.offset[sample] - matrix @ middle


def test_the_image_is_that_of_linear_interpolation():
    image, label, valid, draws = the_batch()
    ours = augment(image, label, valid, draws, SPACING_MM)[0]
    for sample in range(3):
        matrix, offset = plain_map(draws, sample)
        for channel in range(2):
            theirs = affine_transform(image[sample, channel].numpy(), matrix, offset, order=1, mode="nearest")
            # Places count from the middle of the crop here, from its corner there: rounding of 1e-15 x 18 voxels.
            np.testing.assert_allclose(ours[sample, channel].numpy(), theirs, rtol=0, atol=1e-12)


def test_labels_are_those_of_the_nearest_voxel_and_ignored_outside():
    image, label, valid, draws = the_batch()
    _, ours, kept = augment(image, label, valid, draws, SPACING_MM)
    for sample in range(3):
        matrix, offset = plain_map(draws, sample)
        place = np.indices(SIZE).reshape(3, -1)
        old = (matrix @ place + offset[:, None]).reshape(3, *SIZE)
        nearest = np.rint(old).astype(int)
        outside = ((nearest < 0) | (nearest >= np.array(SIZE)[:, None, None, None])).any(axis=0)
        assert 0.05 < outside.mean() < 0.95
        theirs = label[sample].numpy()[tuple(np.clip(nearest, 0, np.array(SIZE)[:, None, None, None] - 1))]
        np.testing.assert_array_equal(ours[sample].numpy(), np.where(outside, 255, theirs))
        np.testing.assert_array_equal(kept[sample, 0].numpy(), ~outside)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_by_the_affine_map_is_one_by_moving_voxels(axis):
    image = torch.rand((1, 1, 12, 12, 12), dtype=torch.float64)
    draws = draw([1], replace(CONFIG, translate_voxels=(0, 0, 0)))
    first, second = (other for other in range(3) if other != axis)
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = 0
    matrix[first, second], matrix[second, first] = 1, -1
    turned = augment(image, None, torch.ones_like(image, dtype=torch.bool), replace(draws, matrix=matrix[None]))[0]
    exact = image.rot90(1, (2 + first, 2 + second))
    torch.testing.assert_close(turned, exact, rtol=0, atol=1e-12)


def test_float32_stays_within_a_ten_thousandth_of_float64():
    image, _, valid, draws = the_batch()
    single = augment(image.float(), None, valid, draws, SPACING_MM)[0]
    double = augment(image, None, valid, draws, SPACING_MM)[0]
    # Places are rounded to 2^-24 of half a crop, times a slope of up to 8 standard deviations a voxel.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)
