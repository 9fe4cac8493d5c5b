from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from small_segmentation import InMemory

from mimscale.evaluate import resampling
from mimscale.evaluate.resampling import AtSpacing, at_spacing, stored_voxels, target_voxels

SPACING_MM, TARGET_MM = (3.0, 0.7, 0.8), (1.5, 1.0, 0.8)


def chunks(whole: torch.Tensor, planes: int) -> Iterator[torch.Tensor]:
    return iter(torch.split(whole, planes, dim=1))


@pytest.mark.parametrize("planes", [1, 5, 24])
def test_the_network_sees_the_target_spacing_and_its_answer_lies_on_the_grid_of_the_store(
    planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(12, 40, 30)), (1.5, 4, 4)).astype(np.float32)
    size = target_voxels(image.shape, SPACING_MM, TARGET_MM)
    assert size == (24, 28, 30)
    there = AtSpacing(InMemory(torch.from_numpy(image)[None]), SPACING_MM, TARGET_MM, size)
    assert there.shape == (1, 24, 28, 30)
    seen = torch.cat([there.planes(at, min(at + planes, 24)) for at in range(0, 24, planes)], dim=1)
    # The middles of the network's voxels, in voxels of the store.
    axes = [
        (np.arange(edge) + 0.5) * target / spacing - 0.5
        for edge, target, spacing in zip(size, TARGET_MM, SPACING_MM, strict=True)
    ]
    at = np.stack(np.meshgrid(*axes, indexing="ij"))
    expected = ndimage.map_coordinates(image.astype(np.float64), at, order=1, mode="nearest")
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=0, atol=1e-6)  # float32, numbers below 1
    monkeypatch.setattr(resampling, "STRIPE_BYTES", 4 * 2 * 40 * 30 * 5)
    answer = torch.stack([seen[0], -2 * seen[0]])
    stripes = list(at_spacing(chunks(answer, planes), answer.shape, TARGET_MM, SPACING_MM, (12, 40, 30)))
    assert [stripe.shape[1] for stripe in stripes] == [5, 5, 2]
    logits = torch.cat(stripes, dim=1)
    axes = [
        (np.arange(edge) + 0.5) * spacing / target - 0.5
        for edge, target, spacing in zip(image.shape, TARGET_MM, SPACING_MM, strict=True)
    ]
    at = np.stack(np.meshgrid(*axes, indexing="ij"))
    back = ndimage.map_coordinates(seen[0].numpy().astype(np.float64), at, order=1, mode="nearest")
    np.testing.assert_allclose(logits[0].numpy(), back, rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits[1].numpy(), -2 * back, rtol=0, atol=2e-6)


@pytest.mark.parametrize("target_mm", [None, TARGET_MM])
def test_a_crop_at_the_target_spacing_fits_what_is_read_for_it(target_mm: tuple[float, float, float] | None) -> None:
    stored = stored_voxels((16, 12, 20), SPACING_MM, target_mm)
    assert stored == ((16, 12, 20) if target_mm is None else (8, 18, 20))
    assert target_voxels(stored, SPACING_MM, target_mm) >= (16, 12, 20)


@given(
    crop=st.integers(1, 300),
    spacing=st.floats(0.2, 10).map(lambda value: round(value, 4)),
    target=st.floats(0.2, 10).map(lambda value: round(value, 4)),
)
def test_what_is_read_for_a_crop_is_never_too_small(crop: int, spacing: float, target: float) -> None:
    spacings, targets = (spacing,) * 3, (target,) * 3
    stored = stored_voxels((crop,) * 3, spacings, targets)
    assert target_voxels(stored, spacings, targets)[0] >= crop
