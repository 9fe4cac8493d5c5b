"""Crops at a target spacing, against scipy and grid_sample in double precision."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from stream_stores import AIR, voxels_of, write_store

from mimscale.errors import ConfigError
from mimscale.store.manifest import Manifest, load_manifest, write_manifest
from mimscale.stream.batch import Batch, SampleReader
from mimscale.stream.config import StreamConfig
from mimscale.stream.device import labels, normalise, resample_linear, resample_nearest
from mimscale.stream.plan import SamplePlan
from mimscale.stream.select import refuse_mixed_spacings

CROP = (16, 12, 20)
TARGET_MM = (1.5, 1.0, 0.8)
SPACINGS_MM = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.8), (1.5, 1.0, 0.8), (0.75, 2.0, 0.41), (5.0, 5.0, 5.0)]
SHAPES = [(40, 37, 45), (20, 50, 44), (30, 30, 30), (60, 25, 90), (4, 4, 5)]  # the last: smaller than the field of view


def a_grid(rng: np.random.Generator, samples: int) -> torch.Tensor:
    first, step = rng.uniform(0, 1, (samples, 3)), rng.uniform(0.3, 1.4, (samples, 3))
    return torch.from_numpy(np.stack([first, step], axis=-1))


def coordinates(grid: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Where each voxel of a crop lies: [3, *size], one axis after the other."""
    axes = [grid[axis, 0] + np.arange(edge) * grid[axis, 1] for axis, edge in enumerate(size)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def test_interpolation_is_that_of_scipy_in_double_precision() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 2, 26, 22, 32)).astype(np.float32)
    grid = a_grid(rng, 3)
    got = resample_linear(torch.from_numpy(image), grid, CROP).numpy()
    for sample in range(3):
        at = coordinates(grid[sample].numpy(), CROP)
        for channel in range(2):
            expected = ndimage.map_coordinates(image[sample, channel].astype(np.float64), at, order=1, mode="nearest")
            # Three interpolations of numbers around 1 in float32.
            np.testing.assert_allclose(got[sample, channel], expected, rtol=0, atol=2e-6)


def test_interpolation_is_that_of_grid_sample_in_double_precision() -> None:
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.normal(size=(2, 1, 26, 22, 32)))
    grid = a_grid(rng, 2)
    got = resample_linear(image, grid, CROP)
    for sample in range(2):
        at = torch.from_numpy(coordinates(grid[sample].numpy(), CROP)).movedim(0, -1)  # Z Y X
        last = torch.tensor(image.shape[2:]) - 1
        scaled = (2 * at / last - 1).flip(-1)[None]  # X Y Z in -1 ... 1
        expected = torch.nn.functional.grid_sample(
            image[sample : sample + 1], scaled, mode="bilinear", padding_mode="border", align_corners=True
        )
        torch.testing.assert_close(got[sample : sample + 1], expected, rtol=0, atol=1e-12)


def test_labels_take_the_voxel_in_which_the_centre_lies() -> None:
    rng = np.random.default_rng(2)
    label = rng.integers(0, 5, (2, 1, 26, 22, 32)).astype(np.uint8)
    grid = a_grid(rng, 2)
    got = resample_nearest(torch.from_numpy(label), grid, CROP).numpy()
    for sample in range(2):
        at = np.floor(coordinates(grid[sample].numpy(), CROP) + 0.5).astype(int)
        assert np.array_equal(got[sample, 0], label[sample, 0][tuple(at)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spacings") / "store"
    bare = write_store(folder, SHAPES)
    rows = [dataclasses.replace(bare.row(number), spacing_mm=SPACINGS_MM[number]) for number in range(len(SHAPES))]
    write_manifest(folder, rows)
    return folder


def a_plan(manifest: Manifest, **changes: Any) -> SamplePlan:
    config = StreamConfig(**{"target_spacing_mm": TARGET_MM, "crops_per_volume": 4} | changes)
    return SamplePlan.of(manifest, np.arange(len(manifest)), seed=1, crop_voxels=CROP, config=config, global_batch=5)


def read(store: Path, plan: SamplePlan, sample_ids: np.ndarray) -> Batch:
    manifest = load_manifest(store)
    return SampleReader(store, manifest, np.arange(len(manifest)), plan, "label").read(sample_ids)


def extended(number: int, at: np.ndarray, order: int) -> np.ndarray:
    """Volume `number`, with air around it, at positions [3, ...] in its voxels."""
    if order == 0:
        at = np.floor(at + 0.5)
    voxels = voxels_of(number, SHAPES[number])[0].astype(np.float64)
    if order == 0:
        return ndimage.map_coordinates(voxels, at, order=0, mode="grid-constant", cval=AIR)
    return ndimage.map_coordinates(voxels, at, order=1, mode="grid-constant", cval=AIR)


def test_one_store_serves_volumes_of_all_spacings_in_one_batch(store: Path) -> None:
    plan = a_plan(load_manifest(store))
    ids = np.arange(20)
    batch = read(store, plan, ids)
    samples = plan.samples(ids)
    assert set(samples.volume.tolist()) == set(range(5))
    image, valid = normalise(batch)
    label = labels(batch)
    assert image.shape == (20, 1, *CROP)
    assert valid.shape == (20, 1, *CROP)
    assert label.shape == (20, *CROP)
    for place, (number, origin) in enumerate(zip(samples.volume.tolist(), samples.origin, strict=True)):
        step = np.array(TARGET_MM) / np.array(SPACINGS_MM[number])
        # The crop begins where the voxel at its origin begins: half a voxel of its own before its first centre.
        axes = [origin[axis] - 0.5 + (np.arange(edge) + 0.5) * step[axis] for axis, edge in enumerate(CROP)]
        at = np.stack(np.meshgrid(*axes, indexing="ij"))
        low, high, shift, scale = batch.normalisation[place, 0].tolist()

        def contract(values: np.ndarray, low: float = low, high: float = high, number: int = number) -> np.ndarray:
            raw = voxels_of(number, SHAPES[number])[0].astype(np.float64)
            return ndimage.map_coordinates(
                np.clip(raw, low, high), values, order=1, mode="grid-constant", cval=float(np.clip(AIR, low, high))
            )

        expected = (contract(at) - shift) * scale
        np.testing.assert_allclose(image[place, 0].numpy(), expected, rtol=0, atol=2e-5)
        nearest = np.floor(at + 0.5)
        inside = ((nearest >= 0) & (nearest < np.array(SHAPES[number])[:, None, None, None])).all(axis=0)
        assert np.array_equal(valid[place, 0].numpy(), inside)
        classes = np.where(inside, extended(number, at, order=0) % 3, 255)
        assert np.array_equal(label[place].numpy(), classes.astype(np.uint8))
    assert valid.any(dim=(1, 2, 3, 4)).all()
    assert not valid.all()  # the smallest volume does not fill its crop


def test_the_field_of_view_is_the_same_in_millimetres_and_lies_in_the_volume_where_that_is_large_enough(
    store: Path,
) -> None:
    plan = a_plan(load_manifest(store))
    samples = plan.samples(np.arange(200))
    for number, origin in zip(samples.volume.tolist(), samples.origin, strict=True):
        view_voxels = np.array(CROP) * TARGET_MM / np.array(SPACINGS_MM[number])
        fits = view_voxels <= np.array(SHAPES[number])
        assert (origin[fits] >= 0).all()
        assert (origin + view_voxels <= np.array(SHAPES[number]) + 1e-3)[fits].all()
    # Both borders are reached.
    of_first = samples.origin[samples.volume == 0]
    assert of_first[:, 0].min() == 0
    assert of_first[:, 0].max() == 40 - 24


def test_the_target_spacing_of_the_store_itself_changes_no_voxel(store: Path) -> None:
    plan = a_plan(load_manifest(store), crops_per_volume=8)
    ids = np.flatnonzero(plan.samples(np.arange(40)).volume == 2)[:1]
    assert ids.size
    batch = read(store, plan, ids)
    origin = plan.samples(ids).origin[0]
    box = tuple(slice(o, o + edge) for o, edge in zip(origin, CROP, strict=True))
    assert np.array_equal(batch.volume[0, 0].numpy(), voxels_of(2, SHAPES[2])[0][box])
    image, valid = normalise(batch)
    plain, _ = normalise(dataclasses.replace(batch, grid=None))
    assert torch.equal(image, plain)
    assert valid.all()


def test_crops_at_a_target_spacing_can_come_from_one_region(store: Path) -> None:
    plan = a_plan(load_manifest(store), region_voxels=(20, 16, 24))
    samples = plan.samples(np.arange(20))
    for number in range(4):
        origins = samples.origin[samples.volume == number]
        step = np.array(TARGET_MM) / np.array(SPACINGS_MM[number])
        assert (np.ptp(origins, axis=0) <= np.ceil(np.array([4, 4, 4]) * step) + 1).all()


def test_mixed_spacings_are_refused_unless_something_is_said_about_them(store: Path) -> None:
    manifest = load_manifest(store)
    everything = np.arange(len(manifest))
    with pytest.raises(ConfigError) as caught:
        refuse_mixed_spacings(manifest, everything, StreamConfig())
    text = str(caught.value)
    assert "spacings of Z 0.75 to 5, Y 0.7 to 5, X 0.41 to 5 mm, more than stream.max_spacing_ratio=2 apart" in text
    assert "stream.target_spacing_mm=[1.5, 1, 0.8]" in text
    refuse_mixed_spacings(manifest, everything, StreamConfig(max_spacing_ratio=20))
    refuse_mixed_spacings(manifest, everything, StreamConfig(target_spacing_mm=TARGET_MM))
    refuse_mixed_spacings(manifest, np.array([0, 2]), StreamConfig())
