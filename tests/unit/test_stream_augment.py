"""Augmentation belongs to the sample: its seed decides, whatever else is in the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mimscale.config import build_config
from mimscale.errors import ConfigError
from mimscale.stream.augment import augment, draw
from mimscale.stream.config import AugmentConfig

EVERYTHING = AugmentConfig(
    flip_prob=(0.5, 0.5, 0.5),
    rot90_prob=0.7,
    affine_prob=0.8,
    rotate_deg=(20, 15, 10),
    zoom=(0.8, 1.25),
    translate_voxels=(2, 2, 2),
    scale_prob=0.7,
    shift_prob=0.7,
    gamma_prob=0.7,
    noise_prob=0.7,
)
SEEDS = [3, 2**63 + 11, 2**64 - 1, 77, 12345678901234567890, 0]


def a_batch(count: int = len(SEEDS), size: tuple[int, int, int] = (7, 10, 10), dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((count, 2, *size), generator=generator, dtype=dtype)
    label = torch.randint(0, 14, (count, *size), generator=generator, dtype=torch.uint8)
    valid = torch.rand((count, 1, *size), generator=generator) > 0.1
    return image, label, valid


def test_nothing_changes_by_default():
    image, label, valid = a_batch()
    changed = augment(image, label, valid, draw(SEEDS, AugmentConfig()))
    assert all(after is before for after, before in zip(changed, (image, label, valid), strict=True))


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[5, 0, 3], [1, 4, 2]]])
def test_a_sample_changes_in_the_same_way_in_every_batch(parts):
    whole = a_batch()
    expected = augment(*whole, draw(SEEDS, EVERYTHING))
    assert not torch.equal(expected[0], whole[0])
    for part in parts:
        ours = augment(*(array[part] for array in whole), draw([SEEDS[i] for i in part], EVERYTHING))
        assert all(torch.equal(a, b[part]) for a, b in zip(ours, expected, strict=True))


def test_no_global_generator_has_a_part_in_it():
    states = torch.get_rng_state(), np.random.get_state()[1]
    first = augment(*a_batch(), draw(SEEDS, EVERYTHING))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(99)
    np.random.seed(99)
    again = augment(*a_batch(), draw(SEEDS, EVERYTHING))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_batch_itself_stays_as_it_is():
    batch = a_batch()
    augment(*batch, draw(SEEDS, EVERYTHING))
    assert all(torch.equal(a, b) for a, b in zip(batch, a_batch(), strict=True))


def test_two_views_of_a_sample_are_independent_draws():
    seeds = list(range(4000))
    one, two = (draw(seeds, EVERYTHING, view) for view in (0, 1))
    for name in ("scale", "shift", "gamma", "noise_std"):
        assert abs(np.corrcoef(getattr(one, name), getattr(two, name))[0, 1]) < 0.06  # 4 standard errors


def test_draws_are_what_they_always_were():
    draws = draw([1, 2**64 - 1], EVERYTHING)
    assert draws.flip.tolist() == GOLDEN["flip"]
    assert draws.quarter_turns.tolist() == GOLDEN["quarter_turns"]
    assert draws.affine.tolist() == GOLDEN["affine"]
    assert draws.noise_seed.tolist() == GOLDEN["noise_seed"]
    for name in ("offset", "scale", "shift", "gamma", "noise_std"):
        np.testing.assert_allclose(getattr(draws, name), GOLDEN[name], rtol=1e-14)


def test_every_change_is_as_frequent_and_as_large_as_configured():
    draws = draw(list(range(20000)), EVERYTHING)
    shares = {
        "flip": (draws.flip.mean(), 0.5),
        "rot90": ((draws.quarter_turns > 0).mean(), 0.7),
        "affine": (draws.affine.mean(), 0.8),
        "scale": ((draws.scale != 1).mean(), 0.7),
        "shift": ((draws.shift != 0).mean(), 0.7),
        "gamma": ((draws.gamma != 1).mean(), 0.7),
        "noise": ((draws.noise_std > 0).mean(), 0.7),
    }
    for found, wanted in shares.values():
        assert abs(found - wanted) < 0.015, shares  # 4 standard errors of a share of 20 000
    assert set(np.unique(draws.quarter_turns)) == {0, 1, 2, 3}
    assert 0.9 <= draws.scale.min() < 0.901
    assert 1.099 < draws.scale.max() <= 1.1
    assert -0.1 <= draws.shift.min() < -0.099
    assert 0.7 <= draws.gamma.min() < 0.705
    assert 1.49 < draws.gamma.max() <= 1.5
    zooms = np.linalg.det(draws.matrix) ** (-1 / 3)
    assert 0.8 <= zooms.min() < 0.803
    assert 1.245 < zooms.max() <= 1.25 + 1e-12
    assert abs(np.log(zooms).mean()) < 0.004  # as often larger as smaller
    assert np.abs(draws.offset).max() <= 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_is_exact_and_its_own_inverse(axis):
    batch = a_batch()
    probability = [0.0, 0.0, 0.0]
    probability[axis] = 1.0
    draws = draw(SEEDS, AugmentConfig(flip_prob=tuple(probability)))
    once = augment(*batch, draws)
    assert torch.equal(once[0], batch[0].flip(axis + 2))
    assert torch.equal(once[1], batch[1].flip(axis + 1))
    assert torch.equal(once[2], batch[2].flip(axis + 2))
    twice = augment(*once, draws)
    assert all(torch.equal(a, b) for a, b in zip(twice, batch, strict=True))


def test_quarter_turns_are_exact_and_four_of_them_change_nothing():
    batch = a_batch()
    draws = draw(SEEDS, AugmentConfig(rot90_prob=1.0))
    assert set(draws.quarter_turns) <= {1, 2, 3}
    for index, turns in enumerate(draws.quarter_turns.tolist()):
        image, label, valid = augment(*batch, draws)
        assert torch.equal(image[index], batch[0][index].rot90(turns, (2, 3)))
        assert torch.equal(label[index], batch[1][index].rot90(turns, (1, 2)))
        assert torch.equal(valid[index], batch[2][index].rot90(turns, (2, 3)))
    turned = batch
    for _ in range(4):
        turned = augment(*turned, draws)
    assert all(torch.equal(a, b) for a, b in zip(turned, batch, strict=True))


def test_a_quarter_turn_of_a_crop_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"\(7, 8, 10\) voxels: its edges along Y and X differ"):
        augment(*a_batch(size=(7, 8, 10)), draw(SEEDS, AugmentConfig(rot90_prob=1.0)))


def test_labels_keep_to_their_values_and_intensities_leave_them_alone():
    image, label, valid = a_batch()
    intensities = replace(EVERYTHING, flip_prob=(0, 0, 0), rot90_prob=0, affine_prob=0)
    changed = augment(image, label, valid, draw(SEEDS, intensities))
    assert torch.equal(changed[1], label)
    assert torch.equal(changed[2], valid)
    assert not torch.equal(changed[0], image)
    for seed in range(20):
        _, moved, _ = augment(image, label, valid, draw([seed + i for i in range(len(SEEDS))], EVERYTHING))
        assert moved.dtype == torch.uint8
        for before, after in zip(label, moved, strict=True):
            assert set(after.unique().tolist()) <= {*before.unique().tolist(), 255}


def test_what_comes_in_from_outside_of_the_crop_is_ignored_and_not_valid():
    image, label, valid = a_batch()
    config = AugmentConfig(affine_prob=1.0, translate_voxels=(3, 0, 0))
    draws = draw(SEEDS, config)
    draws = replace(draws, offset=np.tile([2.0, 0, 0], (len(SEEDS), 1)))  # new voxel z is old voxel z + 2
    moved, labels, kept = augment(image, label, torch.ones_like(valid), draws)
    assert torch.equal(labels[:, :-2], label[:, 2:])
    assert (labels[:, -2:] == 255).all()
    assert kept[:, :, :-2].all()
    assert not kept[:, :, -2:].any()
    torch.testing.assert_close(moved[:, :, :-2], image[:, :, 2:], rtol=0, atol=2e-6)
    torch.testing.assert_close(moved[:, :, -2:], image[:, :, -1:].expand_as(moved[:, :, -2:]), rtol=0, atol=2e-6)


def test_a_turn_about_an_axis_of_long_voxels_turns_the_anatomy_and_does_not_shear_it():
    # Voxels of 2 x 1 x 1 mm: a ball of 10 mm stays a ball when it turns about Y.
    spacing = np.array([[2.0, 1.0, 1.0]])
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (24, 40, 40)), indexing="ij")
    ball = torch.from_numpy((np.sqrt((2 * z) ** 2 + y**2 + x**2) < 10).astype(np.float64))[None, None]
    draws = draw([5], AugmentConfig(affine_prob=1.0, rotate_deg=(0, 45, 0)))
    assert abs(draws.matrix[0, 0, 2]) > 0.2, "this seed hardly turns"
    valid = torch.ones(1, 1, 24, 40, 40, dtype=torch.bool)
    turned, _, _ = augment(ball, None, valid, draws, spacing)
    sheared, _, _ = augment(ball, None, valid, draws)
    assert (turned - ball).abs().mean() < 0.02
    assert (sheared - ball).abs().mean() > 2 * (turned - ball).abs().mean()


def test_noise_has_the_mean_and_the_spread_that_were_drawn():
    image = torch.zeros(4, 1, 32, 32, 32)
    valid = torch.ones(4, 1, 32, 32, 32, dtype=torch.bool)
    draws = draw([1, 2, 3, 4], AugmentConfig(noise_prob=1.0, noise_std=0.5))
    noise = augment(image, None, valid, draws)[0]
    for sample, std in zip(noise, draws.noise_std, strict=True):
        number = sample.numel()
        assert abs(float(sample.mean())) < 4 * std / number**0.5
        assert abs(float(sample.std()) / std - 1) < 4 / (2 * number) ** 0.5
        kurtosis = float((sample / sample.std()).pow(4).mean())
        assert abs(kurtosis - 3) < 4 * (24 / number) ** 0.5, "not Gaussian"
    for i in range(4):
        for j in range(i):
            assert abs(np.corrcoef(noise[i].ravel(), noise[j].ravel())[0, 1]) < 4 / number**0.5


def test_gamma_keeps_the_darkest_and_the_brightest_voxel_and_the_order_of_all():
    image, _, valid = a_batch(dtype=torch.float64)
    image = image * 5 - 3
    draws = draw(SEEDS, AugmentConfig(gamma_prob=1.0))
    changed = augment(image, None, valid, draws)[0]
    for index, gamma in enumerate(draws.gamma):
        for before, after in zip(image[index], changed[index], strict=True):
            low, high = before.min(), before.max()
            expected = ((before - low) / (high - low)) ** float(gamma) * (high - low) + low
            torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)


def test_gamma_leaves_a_crop_of_nothing_but_air_as_it_is():
    air = torch.full((6, 1, 4, 4, 4), -1.5)
    changed = augment(air, None, torch.ones_like(air, dtype=torch.bool), draw(SEEDS, AugmentConfig(gamma_prob=1.0)))[0]
    assert torch.equal(changed, air)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"noise_prob": 1.5}, "augment.noise_prob=1.5: must be between 0 and 1"),
        ({"flip_prob": [0, 0, -1]}, "augment.flip_prob=(0.0, 0.0, -1.0): must be three numbers between 0 and 1"),
        ({"zoom": [1.2, 0.8]}, "augment.zoom=(1.2, 0.8): must be two numbers above 0, the smaller first"),
        ({"gamma": [0, 1]}, "augment.gamma=(0.0, 1.0): must be two numbers above 0"),
        ({"rotate_deg": [-5, 0, 0]}, "augment.rotate_deg=(-5.0, 0.0, 0.0): must be three finite numbers"),
        ({"noise_std": float("inf")}, "augment.noise_std=inf: must be finite and not below 0"),
        ({"flips": 1}, "flips: no such key"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(tree, text):
    with pytest.raises(ConfigError) as error:
        build_config(AugmentConfig, tree, "recipe")
    assert text in str(error.value)


GOLDEN = {
    "flip": [[False, False, False], [True, False, False]],
    "quarter_turns": [0, 0],
    "affine": [False, True],
    "offset": [
        [-1.689920099452138, 1.643835162743926, 1.3290798598900437],
        [-1.7351768463850021, -0.08122062962502241, -1.7121178274974227],
    ],
    "scale": [1.068612529616803, 0.9039985645562411],
    "shift": [-0.009348693629726767, -0.04110245583578945],
    "gamma": [1.0166476759119167, 0.8165454017947823],
    "noise_std": [0.061056006653234365, 0.000682269036769867],
    "noise_seed": [1242254347254156232, 8620240413782696009],
}
