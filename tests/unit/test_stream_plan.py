import json
import sys
import time
import tracemalloc
from subprocess import check_output
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.config import build_config
from mimscale.errors import ConfigError, DataError
from mimscale.stream.config import StreamConfig, WeightsConfig
from mimscale.stream.crops import CropSpace, Volumes, read_volumes
from mimscale.stream.plan import FixedPlan, Position, SamplePlan

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 64, 512)


def a_plan(volumes: int = 100, seed: int = 1, global_batch: int = 8, **changes: Any) -> SamplePlan:
    crop_voxels = changes.pop("crop_voxels", (32, 32, 32))
    fingerprint = changes.pop("fingerprint", "ids")
    shapes = 40 + np.arange(volumes * 3).reshape(volumes, 3) % 23
    boxes = np.stack([shapes // 4, shapes * 3 // 4], axis=-1)
    return SamplePlan(
        seed=seed,
        volumes=Volumes(shapes=shapes, foreground_boxes=boxes),
        crop_voxels=crop_voxels,
        config=StreamConfig(**changes),
        global_batch=global_batch,
        fingerprint=fingerprint,
    )


def batch_of_all_ranks(plan: SamplePlan, batch_index: int, world_size: int, accumulation: int) -> np.ndarray:
    """Global indices of a batch in the order of (accumulation step, rank)."""
    parts = [plan.rank_samples(batch_index, rank, world_size, accumulation) for rank in range(world_size)]
    return np.concatenate([parts[rank][step] for step in range(accumulation) for rank in range(world_size)])


@given(
    volumes=st.integers(1, 200),
    crops=st.integers(1, 5),
    global_batch=st.integers(1, 24),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_takes_every_volume_equally_often_but_for_the_dropped_tail(
    volumes: int, crops: int, global_batch: int, seed: int, epoch: int
) -> None:
    if volumes * crops < global_batch:
        return
    plan = a_plan(volumes, seed, global_batch, crops_per_volume=crops)
    index = epoch * plan.samples_per_epoch + np.arange(plan.samples_per_epoch)
    counts = np.bincount(plan.samples(index).volume, minlength=volumes)
    assert plan.dropped_per_epoch < global_batch
    assert counts.max() <= crops
    assert (crops - counts).sum() == plan.dropped_per_epoch
    if volumes >= global_batch:
        for batch in plan.samples(index).volume.reshape(-1, global_batch):
            assert len(np.unique(batch)) == global_batch, "a volume twice in one global batch"


@given(
    world_size=st.sampled_from(WORLD_SIZES),
    accumulation=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    batch_index=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_the_union_over_ranks_is_the_global_batch_in_order(
    world_size: int, accumulation: int, micro_batch: int, batch_index: int
) -> None:
    global_batch = world_size * accumulation * micro_batch
    plan = a_plan(global_batch + 3, global_batch=global_batch)
    union = batch_of_all_ranks(plan, batch_index, world_size, accumulation)
    assert np.array_equal(union, batch_index * global_batch + np.arange(global_batch))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_world_size_trains_on_the_same_global_batches(world_size: int) -> None:
    global_batch = 1536  # divides by every size of the list
    plan = a_plan(2000, global_batch=global_batch)
    for batch_index in (0, 7):
        union = batch_of_all_ranks(plan, batch_index, world_size, accumulation=2 if world_size in (1, 64) else 1)
        alone = plan.rank_samples(batch_index, 0, 1)[0]
        assert np.array_equal(plan.samples(union).volume, plan.samples(alone).volume)
        assert np.array_equal(plan.samples(union).seed, plan.samples(alone).seed)


def test_a_resumed_run_on_other_ranks_goes_on_in_order() -> None:
    plan = a_plan(30, global_batch=12, crops_per_volume=2)
    straight = plan.samples(np.arange(20 * 12))
    at = 0
    seen = []
    for world_size, batches in ((1, 3), (2, 4), (3, 6), (4, 7)):  # crosses three ends of an epoch
        at = plan.batches_done(Position.from_dict(json.loads(json.dumps(plan.position(at).to_dict()))))
        for batch_index in range(at, at + batches):
            seen.append(batch_of_all_ranks(plan, batch_index, world_size, accumulation=1))
        at += batches
    got = plan.samples(np.concatenate(seen))
    assert np.array_equal(got.volume, straight.volume)
    assert np.array_equal(got.origin, straight.origin)
    assert np.array_equal(got.seed, straight.seed)


def test_samples_asked_for_one_by_one_are_those_of_the_whole_epoch() -> None:
    plan = a_plan(20, global_batch=6, crops_per_volume=3)
    together = plan.samples(np.arange(3 * plan.samples_per_epoch))
    for index in (0, 5, 59, 60, 130):
        alone = plan.samples(np.array([index]))
        assert alone.volume[0] == together.volume[index]
        assert alone.origin[0].tolist() == together.origin[index].tolist()
        assert alone.seed[0] == together.seed[index]


def test_crops_of_a_volume_stand_in_the_same_place_of_successive_batches() -> None:
    plan = a_plan(24, global_batch=8, crops_per_volume=3)
    volumes = plan.samples(np.arange(plan.samples_per_epoch)).volume.reshape(-1, 8)
    for block in range(0, len(volumes), 3):
        assert np.array_equal(volumes[block], volumes[block + 1])
        assert np.array_equal(volumes[block], volumes[block + 2])


def test_epochs_differ_in_order_and_in_what_is_dropped() -> None:
    plan = a_plan(21, global_batch=8)
    epochs = plan.samples(np.arange(6 * plan.samples_per_epoch)).volume.reshape(6, -1)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({frozenset(epoch) for epoch in epochs}) > 1


def test_the_order_of_a_seed_never_changes() -> None:
    # Golden: raise plan.ORDER_VERSION when one of these changes, for a saved position means other samples then.
    plan = a_plan(10, seed=3, global_batch=4, crops_per_volume=2, align_voxels=4)
    samples = plan.samples(np.array([0, 1, 2, 3, 4, 21, 1000]))
    assert samples.volume.tolist() == [5, 2, 7, 0, 5, 7, 4]
    assert samples.origin.tolist() == [
        [0, 12, 12],
        [12, 12, 4],
        [12, 8, 4],
        [0, 4, 0],
        [16, 12, 8],
        [16, 30, 8],
        [16, 20, 22],
    ]
    assert samples.seed.tolist() == [
        7178421844588924579,
        1747155725322950500,
        3152498632038677152,
        17340610916261317384,
        11094234608123530748,
        11309710186825276491,
        2782675678210555317,
    ]
    assert plan.batch_seed(5) == 13685421910822957639
    assert plan.substitutes(np.array([0, 1000]), 1).volume.tolist() == [3, 7]
    assert plan.plan_hash == "a09914567438dc29"


def test_the_order_of_a_seed_with_weights_and_regions_never_changes() -> None:
    shapes = 40 + np.arange(30).reshape(10, 3) % 23
    plan = SamplePlan(
        seed=3,
        volumes=Volumes(
            shapes=shapes,
            foreground_boxes=np.stack([shapes * 0, shapes], axis=-1),
            kinds=np.array(list("aabbbccccc")),
        ),
        crop_voxels=(32, 32, 32),
        config=StreamConfig(
            crops_per_volume=2,
            region_voxels=(36, 40, 34),
            align_voxels=4,
            weights=WeightsConfig(by="modality", values={"a": 1.0, "b": 0.5, "c": 0.4}),
        ),
        global_batch=4,
    )
    samples = plan.samples(np.array([0, 1, 4, 5, 13, 1000]))
    assert plan.batches_per_epoch == 3  # 2 + 2 + 2 volumes of the three kinds, two crops each
    assert samples.volume.tolist() == [8, 3, 2, 0, 6, 4]
    assert samples.origin.tolist() == [[4, 4, 5], [15, 6, 9], [13, 8, 4], [4, 9, 1], [15, 9, 18], [19, 20, 2]]
    assert plan.plan_hash == "24084c803b991e0b"


def test_origins_lie_in_the_volume_on_the_grid_and_reach_both_borders() -> None:
    config = StreamConfig(align_voxels=16)
    space = CropSpace(
        Volumes(shapes=np.array([[101, 64, 32]]), foreground_boxes=np.zeros((1, 3, 2))), (32, 32, 32), config
    )
    index = np.arange(500)
    origins = space.origins(1, index, np.zeros(500, dtype=np.int64))
    assert sorted(set(origins[:, 0])) == [
        0,
        16,
        32,
        48,
        64,
        69,
    ]  # 69 = 101 - 32: off the grid, or the border is never seen
    assert sorted(set(origins[:, 1])) == [0, 16, 32]
    assert sorted(set(origins[:, 2])) == [0]


def test_unaligned_origins_are_uniform() -> None:
    space = CropSpace(
        Volumes(shapes=np.array([[41, 64, 32]]), foreground_boxes=np.zeros((1, 3, 2))), (32, 32, 32), StreamConfig()
    )
    origins = space.origins(1, np.arange(10_000), np.zeros(10_000, dtype=np.int64))
    counts = np.bincount(origins[:, 0], minlength=10)
    assert len(counts) == 10
    assert ((counts - 1000) ** 2 / 1000).sum() < 9 + 5 * np.sqrt(18)


def test_a_volume_smaller_than_the_crop_lies_in_its_middle() -> None:
    space = CropSpace(
        Volumes(shapes=np.array([[21, 32, 100]]), foreground_boxes=np.zeros((1, 3, 2))), (32, 32, 32), StreamConfig()
    )
    origins = space.origins(1, np.arange(50), np.zeros(50, dtype=np.int64))
    assert set(origins[:, 0]) == {-5}
    assert set(origins[:, 1]) == {0}
    assert origins[:, 2].min() >= 0


def test_foreground_origins_have_their_middle_in_the_foreground_box() -> None:
    shapes = np.array([[100, 100, 100], [100, 100, 100]])
    boxes = np.array([[[60, 70], [0, 5], [99, 100]], [[10, 10], [0, 0], [0, 0]]])  # the second one is empty
    space = CropSpace(Volumes(shapes=shapes, foreground_boxes=boxes), (32, 32, 32), StreamConfig(origins="foreground"))
    middles = space.origins(1, np.arange(400), np.zeros(400, dtype=np.int64)) + 16
    assert sorted(set(middles[:, 0])) == list(range(60, 70))
    assert set(middles[:, 1]) == {16}  # as near as a crop inside of the volume comes
    assert set(middles[:, 2]) == {84}
    anywhere = space.origins(1, np.arange(400), np.ones(400, dtype=np.int64))
    assert len(set(anywhere[:, 0])) > 50


def test_a_substitute_is_another_volume_and_differs_between_attempts() -> None:
    plan = a_plan(10, global_batch=2)
    index = np.arange(200)
    planned = plan.samples(index)
    first, second = plan.substitutes(index, 1), plan.substitutes(index, 2)
    assert not np.any(first.volume == planned.volume)
    assert np.any(first.volume != second.volume)
    assert len(set(first.volume)) == 10
    assert np.array_equal(first.seed, planned.seed)
    last_legal = plan.crops.shapes[first.volume] - plan.crops.crop_voxels
    assert np.all(first.origin <= last_legal)


def test_every_other_volume_is_tried_before_one_is_tried_again() -> None:
    plan = a_plan(10, global_batch=2)
    index = np.arange(5)
    tried = np.stack([plan.substitutes(index, attempt).volume for attempt in range(1, 10)])
    for place, unreadable in enumerate(plan.samples(index).volume):
        assert sorted([*tried[:, place], unreadable]) == list(range(10))


def test_the_only_volume_is_its_own_substitute() -> None:
    plan = a_plan(1, global_batch=2, crops_per_volume=2)
    assert plan.substitutes(np.arange(3), 1).volume.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"volumes": 101},
        {"global_batch": 4},
        {"crops_per_volume": 2},
        {"align_voxels": 16},
        {"origins": "foreground"},
        {"crop_voxels": (32, 32, 16)},
        {"fingerprint": "other ids"},
    ],
)
def test_whatever_the_order_depends_on_changes_the_hash(change: dict[str, Any]) -> None:
    assert a_plan(**change).plan_hash != a_plan().plan_hash


def test_what_the_order_does_not_depend_on_leaves_the_hash() -> None:
    assert a_plan(workers=7, prefetch_batches=9, timeout_s=5, max_bad_samples=0).plan_hash == a_plan().plan_hash


def test_a_position_of_another_order_is_refused_with_both_values() -> None:
    saved, plan = a_plan(seed=1, global_batch=8), a_plan(seed=2, global_batch=4)
    with pytest.raises(ConfigError) as caught:
        plan.batches_done(saved.position(5))
    text = str(caught.value)
    assert "seed: 1 -> 2" in text
    assert "global_batch: 8 -> 4" in text
    assert f"plan_hash: {saved.plan_hash} -> {plan.plan_hash}" in text
    assert "Put back what changed" in text


def test_a_position_counts_samples_and_epochs() -> None:
    plan = a_plan(20, global_batch=6)  # three batches an epoch
    position = plan.position(7)
    assert (position.epoch, position.samples_done, position.global_batch, position.seed) == (2, 42, 6, 1)
    assert plan.batches_done(position) == 7


def test_a_position_with_unknown_fields_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"position of the data order: .*'shard'.*another version"):
        Position.from_dict({**a_plan().position(0).to_dict(), "shard": 3})


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="global_batch=8 does not divide by 3 ranks x 2 accumulation steps; use a mult"
    ):
        a_plan(global_batch=8).rank_samples(0, 0, 3, 2)


def test_a_global_batch_larger_than_an_epoch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch=8 is larger than an epoch: 3 volumes x .*=2 = 6 samples; lower"
    ):
        a_plan(3, global_batch=8, crops_per_volume=2)


def test_a_global_batch_or_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch=0: must be at least 1"):
        a_plan(global_batch=0)
    with pytest.raises(ConfigError, match="seed=-1: must be at least 0"):
        a_plan(seed=-1)


def test_an_empty_selection_is_refused() -> None:
    with pytest.raises(DataError, match="no volume to draw samples from"):
        a_plan(0)


def test_a_crop_without_extent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"crop_voxels=\[32, 0, 32\]"):
        a_plan(crop_voxels=(32, 0, 32))


def test_wrong_config_values_are_named_with_their_keys() -> None:
    with pytest.raises(ConfigError, match=r"stream\.workers=-1: must not be negative"):
        build_config(StreamConfig, {"workers": -1}, "recipe")
    with pytest.raises(ConfigError, match=r"stream\.timeout_s=0(\.0)?: must be above 0"):
        build_config(StreamConfig, {"timeout_s": 0}, "recipe")


@given(
    world_size=st.sampled_from(WORLD_SIZES),
    batch=st.integers(1, 5),
    volumes=st.integers(1, 40),
    crops=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_fixed_crops_are_each_counted_once_on_any_number_of_ranks(
    world_size: int, batch: int, volumes: int, crops: int
) -> None:
    config = StreamConfig(crops_per_volume=crops)
    space = CropSpace(
        Volumes(shapes=np.full((volumes, 3), 50), foreground_boxes=np.zeros((volumes, 3, 2))), (32, 32, 32), config
    )
    plan = FixedPlan(space, config, seed=1)
    parts = [plan.rank_samples(rank, world_size, batch) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(ids) == batch for part in parts for ids, _ in part)
    counted = np.concatenate([ids[counts] for part in parts for ids, counts in part])
    assert np.array_equal(np.sort(counted), np.arange(volumes * crops))


def test_fixed_crops_come_from_every_volume_in_turn() -> None:
    config = StreamConfig(crops_per_volume=2)
    plan = FixedPlan(
        CropSpace(Volumes(shapes=np.full((3, 3), 90), foreground_boxes=np.zeros((3, 3, 2))), (32, 32, 32), config),
        config,
        seed=1,
    )
    samples = plan.samples(np.arange(6))
    assert samples.volume.tolist() == [0, 0, 1, 1, 2, 2]
    assert len({tuple(origin) for origin in samples.origin.tolist()}) == 6
    assert not np.any(plan.substitutes(np.arange(6), 1).volume == samples.volume)


def test_a_plan_of_400_000_volumes_is_quick_and_small() -> None:
    volumes, ranks = 400_000, 4096
    shapes = 100 + np.arange(volumes * 3).reshape(volumes, 3) % 400
    boxes = np.zeros((volumes, 3, 2), dtype=np.int64)
    tracemalloc.start()
    start = time.perf_counter()
    plan = SamplePlan(
        seed=1,
        volumes=Volumes(shapes=shapes, foreground_boxes=boxes),
        crop_voxels=(96, 96, 96),
        config=StreamConfig(crops_per_volume=8),
        global_batch=ranks * 8,
    )
    for batch_index in range(8):
        plan.samples(plan.rank_samples(batch_index, 4000, ranks)[0])
    took_s = time.perf_counter() - start
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took_s < 0.5
    assert peak_bytes < 10e6, "the plan holds something that grows with the volumes"


def test_plan_order_and_config_import_no_torch() -> None:
    code = (
        "import sys, mimscale.stream.plan, mimscale.stream.order, mimscale.stream.config; print('torch' in sys.modules)"
    )
    assert check_output([sys.executable, "-c", code], text=True).strip() == "False"


class TwoKindsOfVolumes:
    """The part of a manifest that the geometry is taken from."""

    def column(self, name: str) -> np.ndarray:
        columns = {"shape": [[1, 40, 40, 40], [2, 40, 40, 40]], "foreground_box": [[[0, 40]] * 3] * 2}
        return np.array(columns[name])


def test_volumes_of_different_channels_are_refused() -> None:
    manifest: Any = TwoKindsOfVolumes()
    volumes = read_volumes(manifest, np.array([1]), StreamConfig())
    assert (volumes.shapes.tolist(), volumes.foreground_boxes.shape) == ([[40, 40, 40]], (1, 3, 2))
    with pytest.raises(
        DataError, match="the selected volumes have 1, 2 channels, and a run takes one number of channels"
    ):
        read_volumes(manifest, np.array([0, 1]), StreamConfig())
