"""Crops of one volume from one region: decoded once, and yet the batches of crops read one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_samples import shard_index
from stream_stores import voxels_of, write_store

from mimscale.store import layout, shard
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.store.reader import ShardReader
from mimscale.stream.batch import Batch, MicroBatch, SampleReader
from mimscale.stream.config import StreamConfig
from mimscale.stream.loader import StreamLoader
from mimscale.stream.plan import SamplePlan
from mimscale.world import World

SHAPE = (80, 72, 96)
CHUNK = 16
CROP = (32, 32, 32)
REGION = (48, 48, 48)
CROPS = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regions") / "store"
    write_store(folder, [SHAPE] * 8, chunk_voxels=CHUNK)
    return folder


def a_config(**changes: Any) -> StreamConfig:
    tree: dict[str, Any] = {"crops_per_volume": CROPS, "region_voxels": REGION, "align_voxels": CHUNK, "workers": 0}
    return StreamConfig(**tree | {"max_bad_samples": 100} | changes)


def a_plan(manifest: Manifest, **changes: Any) -> SamplePlan:
    return SamplePlan.of(
        manifest,
        np.arange(len(manifest)),
        seed=1,
        crop_voxels=CROP,
        config=a_config(**changes),
        global_batch=4,
    )


def loaded(
    store: Path, count: int, world: World | None = None, accumulation: int = 1, start_batch: int = 0, **changes: Any
) -> list[Batch]:
    manifest, world = load_manifest(store), world or World()
    loader = StreamLoader(
        store=store,
        manifest=manifest,
        indices=np.arange(len(manifest)),
        plan=a_plan(manifest, **changes),
        world=world,
        micro_batch=4 // accumulation // world.size,
        accumulation=accumulation,
        config=a_config(**changes),
        overlay="label",
        start_batch=start_batch,
    )
    with loader:
        return [next(loader) for _ in range(count)]


def one_by_one(store: Path, count: int, **changes: Any) -> Iterator[Batch]:
    manifest = load_manifest(store)
    plan = a_plan(manifest, **changes)
    for batch_index in range(count):
        reader = SampleReader(store, manifest, np.arange(len(manifest)), plan, "label")
        yield reader.read(plan.rank_samples(batch_index, 0, 1)[0], batch_index=batch_index)


def assert_same(first: Batch, second: Batch) -> None:
    for name in ("volume", "label", "sample_ids", "inside", "normalisation"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (first.volume_ids, first.seeds, first.batch_index) == (second.volume_ids, second.seeds, second.batch_index)
    assert [bad.sample_id for bad in first.bad] == [bad.sample_id for bad in second.bad]


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 1), (0, 4), (3, 2)])
def test_batches_read_together_are_those_of_crops_read_one_by_one(store: Path, workers: int, accumulation: int) -> None:
    got = loaded(store, 10 * accumulation, workers=workers, accumulation=accumulation)
    for number, batch in enumerate(one_by_one(store, 10)):
        parts = got[number * accumulation : (number + 1) * accumulation]
        assert torch.equal(torch.cat([part.volume for part in parts]), batch.volume)
        assert torch.cat([part.sample_ids for part in parts]).tolist() == batch.sample_ids.tolist()
        assert {part.batch_index for part in parts} == {number}


@pytest.mark.parametrize("start_batch", [1, 2, 5, 8, 11])
def test_a_run_that_goes_on_inside_of_a_group_misses_and_repeats_nothing(store: Path, start_batch: int) -> None:
    straight = loaded(store, 16)
    for first, second in zip(
        straight[start_batch:], loaded(store, 16 - start_batch, start_batch=start_batch), strict=True
    ):
        assert_same(first, second)


def test_a_region_is_decoded_once_for_all_its_crops(store: Path) -> None:
    """The recommended mode, smaller: four crops of 32 from a region of 48 voxels that lies on the grid of chunks."""
    epoch = 8 * CROPS // 4
    together = sum(batch.voxels_decoded for batch in loaded(store, epoch))
    alone = sum(batch.voxels_decoded for batch in one_by_one(store, epoch))
    plan = a_plan(load_manifest(store))
    samples = plan.samples(np.arange(8 * CROPS))
    # Each chunk that any crop of a volume touches, counted here by a loop; twice, because the label is decoded too.
    touched = {
        (volume, *chunk)
        for volume, origin in zip(samples.volume.tolist(), samples.origin, strict=True)
        for chunk in np.ndindex(*(-(-edge // CHUNK) for edge in SHAPE))
        if all(o < (c + 1) * CHUNK and c * CHUNK < o + edge for o, c, edge in zip(origin, chunk, CROP, strict=True))
    }
    assert together == 2 * len(touched) * CHUNK**3
    assert together < alone / 2.5
    assert together / 2 / (8 * CROPS) < 32**3, "a crop costs more than its own voxels"


def test_workers_keep_the_saving(store: Path) -> None:
    epoch = 8 * CROPS // 4
    expected = sum(batch.voxels_decoded for batch in loaded(store, epoch))
    assert sum(batch.voxels_decoded for batch in loaded(store, epoch, workers=3)) == expected
    halves = [loaded(store, epoch, world=World(rank=rank, size=2)) for rank in range(2)]
    assert sum(batch.voxels_decoded for half in halves for batch in half) == expected


def test_without_regions_nothing_is_held_for_later(store: Path) -> None:
    plan = a_plan(load_manifest(store), region_voxels=None)
    assert [list(plan.group(number)) for number in range(3)] == [[0], [1], [2]]


def damage_one_chunk(store: Path, manifest: Manifest, index: int, number: int) -> None:
    row = manifest.row(index)
    path = layout.pack_path(store, row.part)
    offset = int(shard_index(path, row, CHUNK)[number, 0])
    data = bytearray(path.read_bytes())
    data[row.offset_bytes + offset + 20] ^= 1
    path.write_bytes(data)


def test_a_damaged_chunk_costs_the_same_crops_however_they_are_read(tmp_path: Path) -> None:
    store = tmp_path / "store"
    manifest = write_store(store, [SHAPE] * 8, chunk_voxels=CHUNK)
    grid = shard.chunk_grid((1, *SHAPE), CHUNK)[1:]
    chunks = [int(np.ravel_multi_index(place, grid)) for place in ((2, 2, 2), (1, 3, 3), (3, 1, 4))]
    for index in range(3):
        for number in chunks:
            damage_one_chunk(store, manifest, index, number)
    alone = list(one_by_one(store, 16))
    bad = [item.sample_id for batch in alone for item in batch.bad]
    plan = a_plan(manifest)
    planned = plan.samples(np.arange(64))
    of_damaged = np.flatnonzero(planned.volume < 3).tolist()
    assert bad
    assert not set(of_damaged) <= set(bad), "every crop of a damaged volume touches a damaged chunk: choose others"
    for changes in ({}, {"workers": 2}):
        for first, second in zip(alone, loaded(store, 16, **changes), strict=True):
            assert_same(first, second)
    halves = [loaded(store, 16, world=World(rank=rank, size=2)) for rank in range(2)]
    for first, *parts in zip(alone, *halves, strict=True):
        assert torch.equal(first.volume, torch.cat([part.volume for part in parts]))
        assert first.volume_ids == [name for part in parts for name in part.volume_ids]
    # A run that goes on between the crops of a region replaces the same ones.
    for first, second in zip(alone[2:], loaded(store, 14, start_batch=2), strict=True):
        assert_same(first, second)


def test_crops_of_volumes_of_several_dtypes_are_read_together(tmp_path: Path) -> None:
    manifest = write_store(tmp_path, [(40, 40, 40)] * 4, dtypes=["int16", "uint8", "uint16", "int16"], labels=False)
    plan = a_plan(manifest, region_voxels=(36, 36, 36))
    reader = SampleReader(tmp_path, manifest, np.arange(4), plan)
    batches = reader.read_together([MicroBatch(np.arange(4) + 4 * number, None, number) for number in range(4)])
    kinds = {"vol_000": "int16", "vol_001": "uint8", "vol_002": "uint16", "vol_003": "int16"}
    samples = plan.samples(np.arange(16))
    for number, batch in enumerate(batches):
        assert batch.volume.dtype == torch.int32
        for place, name in enumerate(batch.volume_ids):
            z, y, x = samples.origin[4 * number + place]
            expected = voxels_of(int(name[-1]), (40, 40, 40), kinds[name])[0, z : z + 32, y : y + 32, x : x + 32]
            assert np.array_equal(batch.volume[place, 0].numpy(), expected.astype(np.int32))


def test_a_region_that_holds_no_crop_is_refused(store: Path) -> None:
    from mimscale.errors import ConfigError

    with pytest.raises(ConfigError, match=r"stream\.region_voxels=\(48, 16, 48\): must hold a crop of crop_voxels="):
        a_plan(load_manifest(store), region_voxels=(48, 16, 48))


def test_the_reader_is_asked_once_for_each_volume_and_kind(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    read_crops = ShardReader.read_crops

    def counting(self: ShardReader, row: Any, starts: Any, *arguments: Any, **named: Any) -> Any:
        calls.append((row.id, len(starts)))
        return read_crops(self, row, starts, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read_crops", counting)
    loaded(store, CROPS)
    assert len(calls) == 2 * 4  # four volumes, each with its label
    assert {count for _, count in calls} == {CROPS}
