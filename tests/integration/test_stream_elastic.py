"""Any number of ranks and workers, stopped and continued anywhere: always the same samples in the same order."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_stores import write_store

from mimscale.errors import ConfigError
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.stream.batch import MicroBatch
from mimscale.stream.config import StreamConfig, WeightsConfig
from mimscale.stream.crops import Volumes
from mimscale.stream.loader import _training_part
from mimscale.stream.plan import Position, SamplePlan
from mimscale.world import World

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 64, 512)


def a_plan(volumes: int, global_batch: int, config: StreamConfig, seed: int = 1) -> SamplePlan:
    shapes = 40 + np.arange(volumes * 3).reshape(volumes, 3) % 23
    return SamplePlan(
        seed=seed,
        volumes=Volumes(
            shapes=shapes,
            foreground_boxes=np.stack([shapes * 0, shapes], axis=-1),
            kinds=np.array(["ct", "mr", "pt"])[np.arange(volumes) % 3] if config.weights else None,
        ),
        crop_voxels=(32, 32, 32),
        config=config,
        global_batch=global_batch,
    )


CONFIGS = {
    "crops": StreamConfig(crops_per_volume=3),
    "regions": StreamConfig(crops_per_volume=4, region_voxels=(40, 40, 40)),
    "weights": StreamConfig(
        crops_per_volume=2,
        region_voxels=(36, 36, 36),
        weights=WeightsConfig(by="modality", values={"ct": 0.3, "mr": 0.7, "pt": 1.0}),
    ),
}


def delivered(
    plan: SamplePlan, world: World, accumulation: int, workers: int, start_batch: int, num_batches: int
) -> list[MicroBatch]:
    """The micro-batches of one rank as the trainer gets them, by the loader's own rules but without its processes.

    Worker w deals the parts w, w + W ...; DataLoader takes one from each in turn; what a part holds for later batches
    is kept for its accumulation step.
    """
    part = partial(_training_part, plan, world, accumulation, start_batch)
    streams = [iter(range(worker, 10**6, max(workers, 1))) for worker in range(max(workers, 1))]
    held: list[list[MicroBatch]] = [[] for _ in range(accumulation)]
    got: list[MicroBatch] = []
    received = 0
    while len(got) < num_batches * accumulation:
        step = len(got) % accumulation
        if not held[step]:
            held[step] = part(next(streams[received % len(streams)]))
            received += 1
        got.append(held[step].pop(0))
    return got


@given(
    name=st.sampled_from(sorted(CONFIGS)),
    world_size=st.sampled_from(WORLD_SIZES),
    workers=st.integers(0, 8),
    accumulation=st.integers(1, 3),
    micro_batch=st.integers(1, 2),
    extra=st.integers(0, 700),
    start_batch=st.integers(0, 50),
)
@settings(max_examples=120, deadline=None)
def test_every_sample_is_read_once_in_the_order_of_the_plan_whatever_the_world_size_and_workers(
    name: str, world_size: int, workers: int, accumulation: int, micro_batch: int, extra: int, start_batch: int
) -> None:
    global_batch = world_size * accumulation * micro_batch
    plan = a_plan(2 * global_batch + 3 + extra, global_batch, CONFIGS[name])
    num_batches = 9 if world_size < 64 else 5
    # All ranks of a small world; of a large one some, for the others' stripes follow from theirs.
    ranks = range(world_size) if world_size <= 8 else (0, 1, world_size // 2, world_size - 1)
    for rank in ranks:
        world = World(rank=rank, size=world_size)
        got = delivered(plan, world, accumulation, workers, start_batch, num_batches)
        for number, what in enumerate(got):
            batch_index, step = start_batch + number // accumulation, number % accumulation
            assert what.batch_index == batch_index
            first = batch_index * global_batch + (step * world_size + rank) * micro_batch
            assert what.sample_ids.tolist() == list(range(first, first + micro_batch))


@given(
    name=st.sampled_from(sorted(CONFIGS)),
    stops=st.lists(
        st.tuples(st.sampled_from((1, 2, 3, 4, 6)), st.integers(0, 8), st.integers(0, 40)), min_size=1, max_size=6
    ),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=80, deadline=None)
def test_a_run_stopped_again_and_again_on_other_ranks_and_workers_goes_on_in_order(
    name: str, stops: list[tuple[int, int, int]], seed: int
) -> None:
    global_batch = 12
    plan = a_plan(31, global_batch, CONFIGS[name], seed)
    position = json.loads(json.dumps(plan.position(0).to_dict()))
    seen: list[int] = []
    for world_size, workers, num_batches in stops:
        at = plan.batches_done(Position.from_dict(position))
        ranks = [
            delivered(plan, World(rank=r, size=world_size), 1, workers, at, num_batches) for r in range(world_size)
        ]
        for batches in zip(*ranks, strict=True):
            seen += np.concatenate([what.sample_ids for what in batches]).tolist()
        position = json.loads(json.dumps(plan.position(at + num_batches).to_dict()))
    assert seen == list(range(len(seen))), "not the order of the plan"
    assert len(seen) == global_batch * sum(num_batches for _, _, num_batches in stops)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("before", [-1, 0, 1])
def test_after_a_stop_at_an_epochs_end_the_next_epoch_has_its_full_length(name: str, before: int) -> None:
    plan = a_plan(50, 12, CONFIGS[name])
    start = plan.batches_per_epoch + before
    got = delivered(plan, World(), 1, 3, start, 3 * plan.batches_per_epoch - start)
    ids = np.concatenate([what.sample_ids for what in got])
    assert ids[0] == start * 12
    second = ids[(ids >= plan.samples_per_epoch) & (ids < 2 * plan.samples_per_epoch)]
    if before <= 0:
        assert len(second) == plan.samples_per_epoch
    third = ids[ids >= 2 * plan.samples_per_epoch]
    assert len(third) == plan.samples_per_epoch
    counts = np.bincount(plan.samples(third).volume, minlength=50)
    assert counts.max() <= plan._config.crops_per_volume
    assert counts.sum() == plan.samples_per_epoch


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_groups_of_batches_tile_every_epoch(name: str) -> None:
    plan = a_plan(50, 12, CONFIGS[name])
    batches: list[int] = []
    number = 0
    while len(batches) < 3 * plan.batches_per_epoch:
        group = plan.group(number)
        assert all(plan.group_of(batch) == number for batch in group)
        assert len({batch // plan.batches_per_epoch for batch in group}) == 1
        batches += group
        number += 1
    assert batches == list(range(len(batches)))


def test_crops_of_one_region_lie_in_it_and_no_two_of_them_in_one_global_batch() -> None:
    plan = a_plan(60, 12, CONFIGS["regions"])
    samples = plan.samples(np.arange(plan.samples_per_epoch))
    batch = np.arange(plan.samples_per_epoch) // 12
    distinct = set()
    for volume in range(60):
        of_volume = samples.volume == volume
        origins = samples.origin[of_volume]
        assert len(origins) == 4
        assert (np.ptp(origins, axis=0) <= 40 - 32).all(), "the crops do not fit one region of 40 voxels"
        assert len(np.unique(batch[of_volume])) == 4
        distinct |= {tuple(origin) for origin in origins.tolist()}
    assert len(distinct) > 200, "the crops of a region are all the same"
    again = plan.samples(np.arange(plan.samples_per_epoch) + plan.samples_per_epoch)
    first = {v: samples.origin[samples.volume == v].tolist() for v in range(60)}
    assert any(again.origin[again.volume == v].tolist() != first[v] for v in range(60)), "no other region next time"


CHANGES: dict[str, dict[str, Any]] = {
    "seed: 1 -> 2": {"seed": 2},
    "global_batch: 4 -> 2": {"global_batch": 2},
    "crop_voxels: [16, 16, 16] -> [16, 16, 8]": {"crop_voxels": (16, 16, 8)},
    "stream.filter: None -> 'spacing_mm[0] < 2'": {"filter": "spacing_mm[0] < 2"},
    "stream.crops_per_volume: 2 -> 4": {"crops_per_volume": 4},
    "stream.region_voxels: None -> [24, 24, 24]": {"region_voxels": (24, 24, 24)},
    "stream.align_voxels: 1 -> 8": {"align_voxels": 8},
    "stream.origins: 'uniform' -> 'foreground'": {"origins": "foreground"},
    "stream.target_spacing_mm: None -> [1.0, 1.0, 1.0]": {"target_spacing_mm": (1.0, 1.0, 1.0)},
    "stream.weights: None -> {'by': 'id', 'values': {'vol_001': 0.5}}": {
        "weights": WeightsConfig(by="id", values={"vol_001": 0.5})
    },
}


def plan_of(manifest: Manifest, **changes: Any) -> SamplePlan:
    tree = {"seed": 1, "global_batch": 4, "crop_voxels": (16, 16, 16), "crops_per_volume": 2} | changes
    named = {name: tree.pop(name) for name in ("seed", "global_batch", "crop_voxels")}
    return SamplePlan.of(manifest, np.arange(len(manifest)), config=StreamConfig(**tree), **named)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic") / "store"
    write_store(folder, [(32, 32, 32)] * 6, labels=False)
    return folder


@pytest.mark.parametrize("line", sorted(CHANGES))
def test_another_order_is_refused_with_both_hashes_and_what_differs(store: Path, line: str) -> None:
    manifest = load_manifest(store)
    saved, now = plan_of(manifest), plan_of(manifest, **CHANGES[line])
    position = Position.from_dict(json.loads(json.dumps(saved.position(3).to_dict())))
    with pytest.raises(ConfigError) as caught:
        now.batches_done(position)
    text = str(caught.value)
    assert f"plan_hash: {saved.plan_hash} -> {now.plan_hash}" in text
    assert f"  {line}\n" in text
    assert "--fresh-data" in text
    assert saved.batches_done(position) == 3


def test_a_store_that_grew_is_refused_with_the_number_of_volumes(store: Path, tmp_path: Path) -> None:
    smaller = load_manifest(store).take(np.arange(5))
    with pytest.raises(ConfigError) as caught:
        plan_of(load_manifest(store)).batches_done(plan_of(smaller).position(1))
    assert "number of volumes: 5 -> 6" in str(caught.value)
    assert "ids, shapes and foreground boxes of the volumes: " in str(caught.value)


SCRIPT = """
    import sys, json
    from pathlib import Path
    import numpy as np
    from mimscale import durable
    from mimscale.store.manifest import load_manifest
    from mimscale.stream.config import StreamConfig
    from mimscale.stream.loader import StreamLoader
    from mimscale.stream.plan import Position, SamplePlan
    from mimscale.world import World

    store, place, workers, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    manifest = load_manifest(store)
    indices = np.arange(len(manifest))
    config = StreamConfig(workers=workers, crops_per_volume=3, region_voxels=(24, 24, 24))
    plan = SamplePlan.of(manifest, indices, seed=1, crop_voxels=(16, 16, 16), config=config, global_batch=4)
    at = plan.batches_done(Position.from_dict(json.loads(place.read_text()))) if place.exists() else 0
    loader = StreamLoader(store=store, manifest=manifest, indices=indices, plan=plan, world=World(), micro_batch=2,
                          accumulation=2, config=config, start_batch=at)
    for number in range(at, at + steps):
        batches = [next(loader), next(loader)]
        sums = [int(batch.volume.long().sum()) for batch in batches]
        print(json.dumps([number, [batch.sample_ids.tolist() for batch in batches], sums]), flush=True)
        durable.write_json(place, plan.position(number + 1).to_dict())
    loader.close()
"""


def lines_of(store: Path, place: Path, workers: int, steps: int, kill_after: int | None = None) -> list[Any]:
    """What a trainer of its own printed; killed after that many lines."""
    words = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(store), str(place), str(workers), str(steps)]
    trainer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    lines = []
    for line in trainer.stdout:
        lines.append(json.loads(line))
        if len(lines) == kill_after:
            os.kill(trainer.pid, signal.SIGKILL)
            break
    lines += [json.loads(line) for line in trainer.stdout if line.endswith("]\n")]  # printed before it died
    trainer.stdout.close()
    assert trainer.wait(timeout=60) == (0 if kill_after is None else -signal.SIGKILL)
    return lines


def test_a_trainer_killed_by_sigkill_again_and_again_goes_on_where_it_was(store: Path, tmp_path: Path) -> None:
    straight = lines_of(store, tmp_path / "straight.json", 0, 22)
    place = tmp_path / "killed.json"
    seen: dict[int, Any] = {}
    for workers, kill_after in ((2, 4), (1, 3), (3, 5)):  # an epoch has four batches
        for line in lines_of(store, place, workers, 20, kill_after):
            # A step whose position was not saved yet is done again: the same samples, the same voxels.
            assert seen.setdefault(line[0], line) == line
    for line in lines_of(store, place, 0, 8):
        assert seen.setdefault(line[0], line) == line
    in_order = [seen[number] for number in sorted(seen)]
    assert in_order == straight[: len(in_order)]
    assert len(in_order) >= 4 + 3 + 5 + 8 - 3
