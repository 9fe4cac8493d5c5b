import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stream_stores import AIR, voxels_of, write_store

from mimscale.errors import ConfigError, DataError
from mimscale.store.manifest import Manifest
from mimscale.stream.batch import SampleReader
from mimscale.stream.config import StreamConfig
from mimscale.stream.loader import Batch, StreamLoader, fixed_batches
from mimscale.stream.plan import FixedPlan, SamplePlan
from mimscale.stream.slots import MappedSlots, Slots
from mimscale.world import World

SHAPES = [(48, 40, 44), (40, 48, 40), (44, 44, 44), (48, 48, 48), (20, 48, 40), (40, 40, 40)]
CROP = (32, 32, 32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "store"
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def manifest(store: Path) -> Manifest:
    from mimscale.store.manifest import load_manifest

    return load_manifest(store)


def a_plan(manifest: Manifest, global_batch: int = 4, **changes: Any) -> SamplePlan:
    config = StreamConfig(crops_per_volume=2, **changes)
    indices = np.arange(len(manifest))
    return SamplePlan.of(manifest, indices, seed=1, crop_voxels=CROP, config=config, global_batch=global_batch)


def a_loader(store: Path, manifest: Manifest, workers: int = 2, **changes: Any) -> StreamLoader:
    settings: dict[str, Any] = {"world": World(), "micro_batch": 2, "accumulation": 2, "overlay": "label"} | changes
    return StreamLoader(
        store=store,
        manifest=manifest,
        indices=np.arange(len(manifest)),
        plan=settings.pop("plan", a_plan(manifest)),
        config=settings.pop("config", StreamConfig(workers=workers, crops_per_volume=2)),
        **settings,
    )


def take(loader: StreamLoader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def assert_equal(first: Batch, second: Batch) -> None:
    for name in ("volume", "label", "sample_ids", "normalisation", "inside", "counted"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.seeds == second.seeds
    assert first.volume_ids == second.volume_ids
    assert first.batch_index == second.batch_index


def test_a_batch_holds_the_stored_voxels_of_its_plan(store: Path, manifest: Manifest) -> None:
    plan = a_plan(manifest)
    checked = 0
    for batch in take(a_loader(store, manifest), 8):
        samples = plan.samples(batch.sample_ids.numpy())
        assert batch.seeds == samples.seed.tolist()
        assert batch.volume.dtype == torch.int16
        assert batch.label is not None
        assert batch.label.dtype == torch.uint8
        for place, (number, origin) in enumerate(zip(samples.volume, samples.origin, strict=True)):
            assert batch.volume_ids[place] == f"vol_{number:03d}"
            start, stop = batch.inside[place].numpy().T
            in_crop = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            in_volume = tuple(slice(o + a, o + b) for o, a, b in zip(origin, start, stop, strict=True))
            expected = voxels_of(number, SHAPES[number])[0][in_volume]
            crop = batch.volume[place, 0].numpy().copy()
            assert np.array_equal(crop[in_crop], expected)
            assert np.array_equal(batch.label[place].numpy()[in_crop], expected % 3)
            crop[in_crop] = AIR
            assert (crop == AIR).all(), "what lies outside of the volume is its air"
            checked += 1
    assert checked == 16


def test_a_volume_smaller_than_the_crop_is_marked_by_inside_and_ignored_by_its_label(
    store: Path, manifest: Manifest
) -> None:
    batches = take(a_loader(store, manifest), 12)
    found = [(batch, place) for batch in batches for place, name in enumerate(batch.volume_ids) if name == "vol_004"]
    assert found
    for batch, place in found:
        assert batch.inside[place, 0].tolist() == [6, 26]
        assert batch.label is not None
        assert (batch.label[place, :6] == 255).all()
        assert (batch.label[place, 26:] == 255).all()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(store: Path, manifest: Manifest, workers: int) -> None:
    alone = take(a_loader(store, manifest, workers=0), 7)
    for first, second in zip(alone, take(a_loader(store, manifest, workers=workers), 7), strict=True):
        assert_equal(first, second)


def test_a_worker_decodes_straight_into_the_memory_that_the_trainer_maps(store: Path, manifest: Manifest) -> None:
    mapped = MappedSlots(get_context("fork"), workers=1)
    slots = Slots(mapped.loader, 0, mapped.taken)
    reader = SampleReader(store, manifest, np.arange(6), a_plan(manifest), "label", slots=slots)
    batch = reader.read(np.arange(4))
    assert batch.volume.is_shared(), "sending it would copy it"
    assert batch.label is not None
    assert batch.label.is_shared()
    mapped.close()
    assert_equal(batch, SampleReader(store, manifest, np.arange(6), a_plan(manifest), "label").read(np.arange(4)))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_memory_is_used_again_but_never_while_somebody_looks_at_it(
    store: Path, manifest: Manifest, start_method: str
) -> None:
    expected = take(a_loader(store, manifest, workers=0), 30)
    with a_loader(store, manifest, workers=1, start_method=start_method) as loader:
        kept = {0: next(loader).volume[1], 1: next(loader).volume[0, 0, 3:5]}  # views: their batches are gone
        for number in range(2, 30):
            assert_equal(next(loader), expected[number])
        slots = loader._batches._slots
        assert slots is not None
        assert sum(slots.taken) < 12
        assert len(slots._memory) < 12, "each batch takes one for its volumes and one for its labels"
    assert torch.equal(kept[0], expected[0].volume[1])
    assert torch.equal(kept[1], expected[1].volume[0, 0, 3:5])


def test_ranks_together_read_the_global_batches_of_one_rank(store: Path, manifest: Manifest) -> None:
    alone = take(a_loader(store, manifest, workers=0, micro_batch=4, accumulation=1), 5)
    ranks = [
        take(a_loader(store, manifest, workers=0, world=World(rank=rank, size=2), micro_batch=2, accumulation=1), 5)
        for rank in range(2)
    ]
    for step, batch in enumerate(alone):
        assert torch.equal(batch.volume, torch.cat([ranks[rank][step].volume for rank in range(2)]))
        assert torch.equal(batch.sample_ids, torch.cat([ranks[rank][step].sample_ids for rank in range(2)]))


def test_a_loader_started_in_the_middle_goes_on_in_order(store: Path, manifest: Manifest) -> None:
    straight = take(a_loader(store, manifest, workers=2), 16)  # eight global batches; an epoch has three
    resumed = take(a_loader(store, manifest, workers=3, start_batch=2), 4)
    resumed += take(a_loader(store, manifest, workers=0, start_batch=4), 8)
    for first, second in zip(straight[4:], resumed, strict=True):
        assert_equal(first, second)


def test_the_position_is_what_was_consumed_not_what_was_fetched_ahead(store: Path, manifest: Manifest) -> None:
    with a_loader(store, manifest) as loader:
        next(loader)
        assert loader.position(0).samples_done == 0
        assert loader.position(3).samples_done == 12
        assert loader.position(3).epoch == 1


def test_loading_leaves_the_global_random_state_alone(store: Path, manifest: Manifest) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(a_loader(store, manifest), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_volumes_of_different_dtypes_share_a_wider_batch(tmp_path: Path) -> None:
    manifest = write_store(tmp_path, [(32, 32, 32)] * 3, dtypes=["int16", "uint8", "uint16"])
    plan = a_plan(manifest, global_batch=3)
    loader = a_loader(tmp_path, manifest, workers=0, plan=plan, micro_batch=3, accumulation=1)
    batch = take(loader, 1)[0]
    assert batch.volume.dtype == torch.int32
    for place, name in enumerate(batch.volume_ids):
        number = int(name[-1])
        dtype = ["int16", "uint8", "uint16"][number]
        expected = voxels_of(number, (32, 32, 32), dtype).astype(np.int32)
        assert np.array_equal(batch.volume[place].numpy(), expected)


def test_channels_are_kept(tmp_path: Path) -> None:
    manifest = write_store(tmp_path, [(32, 32, 32)] * 2, channels=2)
    batch = take(a_loader(tmp_path, manifest, plan=a_plan(manifest, 2), micro_batch=1), 1)[0]
    assert batch.volume.shape == (1, 2, *CROP)
    assert batch.normalisation.shape == (1, 2, 4)


def test_a_volume_without_the_overlay_is_an_error_and_no_bad_sample(tmp_path: Path) -> None:
    manifest = write_store(tmp_path, [(32, 32, 32)] * 2, labels=False)
    plan = a_plan(manifest, 2)
    with pytest.raises(
        DataError, match=r"volume vol_00\d of .* has no overlay 'label' \(it has: none\); ingest it with"
    ):
        take(a_loader(tmp_path, manifest, plan=plan, micro_batch=1), 1)
    assert take(a_loader(tmp_path, manifest, plan=plan, micro_batch=1, overlay=None), 1)[0].label is None


def test_a_micro_batch_that_does_not_fit_the_global_batch_is_refused(store: Path, manifest: Manifest) -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch=4 is not 3 samples a micro-batch x 2 accumulation steps x 1 ra"
    ):
        a_loader(store, manifest, micro_batch=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_fixed_batches_are_the_same_for_any_number_of_ranks(store: Path, manifest: Manifest, workers: int) -> None:
    def crops(ranks: int, batch: int) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for rank in range(ranks):
            config = StreamConfig(workers=workers, crops_per_volume=2)
            plan = FixedPlan.of(manifest, np.arange(6), seed=5, crop_voxels=CROP, config=config)
            world = World(rank=rank, size=ranks)
            for item in fixed_batches(
                store=store, manifest=manifest, indices=np.arange(6), plan=plan, world=world, batch=batch, config=config
            ):
                for place in range(batch):
                    if item.counted[place]:
                        sample = int(item.sample_ids[place])
                        assert sample not in found
                        found[sample] = item.volume[place].numpy().tobytes() + bytes(str(item.seeds[place]), "ascii")
        return found

    alone = crops(1, 5)
    assert sorted(alone) == list(range(12))
    assert crops(3, 2) == alone


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_other_start_methods_read_the_same(store: Path, manifest: Manifest, start_method: str) -> None:
    alone = take(a_loader(store, manifest, workers=0), 2)
    config = StreamConfig(workers=1, crops_per_volume=2, start_method=start_method)  # type: ignore[arg-type]
    for first, second in zip(alone, take(a_loader(store, manifest, config=config), 2), strict=True):
        assert_equal(first, second)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def test_closing_leaves_no_process_and_no_shared_memory(store: Path, manifest: Manifest) -> None:
    shared, processes = set(os.listdir("/dev/shm")), set(children())
    loader = a_loader(store, manifest)
    next(loader)
    assert len(set(children()) - processes) == 2
    loader.close()
    loader.close()
    assert set(children()) <= processes
    assert {name for name in os.listdir("/dev/shm") if name.startswith("torch_")} <= shared
    with pytest.raises(StopIteration):
        next(loader)


def test_workers_ignore_the_schedulers_signals_and_obey_their_parent(store: Path, manifest: Manifest) -> None:
    remembered = signal.signal(signal.SIGTERM, lambda number, frame: None)  # as the trainer's, inherited by the fork
    try:
        with a_loader(store, manifest) as loader:
            before = set(children())
            next(loader)
            workers = set(children()) - before
            for worker in workers:
                for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):  # to the whole process group
                    os.kill(worker, number)
            for _ in range(6):
                next(loader)
            assert workers <= set(children())
        assert not workers & set(children())
    finally:
        signal.signal(signal.SIGTERM, remembered)
