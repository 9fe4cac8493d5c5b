import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import is_alive, kill_all
from stream_stores import damage, voxels_of, write_store

from mimscale.errors import DataError, LostRankError
from mimscale.store import layout
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.store.reader import ShardReader
from mimscale.stream.config import StreamConfig
from mimscale.stream.loader import Batch, StreamLoader
from mimscale.stream.plan import SamplePlan
from mimscale.world import World

SHAPE = (32, 32, 32)
CROP = (16, 16, 16)
VOLUMES = 8


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", [SHAPE] * VOLUMES)
    return tmp_path / "store"


def a_plan(manifest: Manifest, global_batch: int = 4) -> SamplePlan:
    return SamplePlan.of(
        manifest,
        np.arange(len(manifest)),
        seed=1,
        crop_voxels=CROP,
        config=StreamConfig(crops_per_volume=2),
        global_batch=global_batch,
    )


def a_loader(store: Path, *, world: World | None = None, micro_batch: int = 2, **config: Any) -> StreamLoader:
    manifest = load_manifest(store)
    world = world or World()
    return StreamLoader(
        store=store,
        manifest=manifest,
        indices=np.arange(len(manifest)),
        plan=a_plan(manifest),
        world=world,
        micro_batch=micro_batch,
        accumulation=4 // micro_batch // world.size,
        config=StreamConfig(**({"workers": 2, "crops_per_volume": 2, "max_bad_samples": 100} | config)),
        overlay="label",
    )


def take(loader: StreamLoader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def children() -> set[int]:
    """Processes that this one forked; not a fork server, which another test may have left running on purpose."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    own = Path("/proc/self/cmdline").read_bytes()
    return {int(pid) for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes() == own}


def shared_memory() -> set[str]:
    """What stands in /dev/shm, but for what another living program, of another test run, uses at this moment."""
    names = [name for name in os.listdir("/dev/shm") if name.startswith("torch_")]
    makers = {name: int(name.split("_")[1]) for name in names}  # torch_<pid>_...
    return {name for name, pid in makers.items() if pid == os.getpid() or not Path(f"/proc/{pid}").exists()}


def flip_a_bit(store: Path, manifest: Manifest, index: int) -> None:
    damage(store, manifest, index)


def truncate(store: Path, manifest: Manifest, index: int) -> None:
    path = layout.pack_path(store, manifest.row(index).part)
    os.truncate(path, manifest.row(index).offset_bytes + 10)


def remove(store: Path, manifest: Manifest, index: int) -> None:
    layout.pack_path(store, manifest.row(index).part).unlink()


def remove_label(store: Path, manifest: Manifest, index: int) -> None:
    layout.overlay_path(store, "label", manifest.row(index).part).unlink()


@pytest.mark.parametrize("break_it", [flip_a_bit, truncate, remove, remove_label])
@pytest.mark.parametrize(("workers", "read"), [(0, "map"), (2, "map"), (0, "pread"), (2, "pread")])
def test_an_unreadable_sample_is_replaced_named_and_counted(
    store: Path, break_it: Any, workers: int, read: str
) -> None:
    manifest = load_manifest(store)
    break_it(store, manifest, 3)
    plan = a_plan(manifest)
    batches = take(loader := a_loader(store, workers=workers, read=read), 16)  # two epochs: four times in the plan
    replaced = 0
    for batch in batches:
        planned = plan.samples(batch.sample_ids.numpy())
        bad_ids = {bad.sample_id for bad in batch.bad}
        assert bad_ids == set(batch.sample_ids.numpy()[planned.volume == 3].tolist())
        assert batch.substituted == len(bad_ids)
        replaced += batch.substituted
        for bad in batch.bad:
            assert bad.volume_id == "vol_003"
            assert "vol_003" in bad.reason
        for place, sample_id in enumerate(batch.sample_ids.tolist()):
            number, origin = int(planned.volume[place]), planned.origin[place]
            if sample_id in bad_ids:
                substitute = plan.substitutes(np.array([sample_id]), 1)
                number, origin = int(substitute.volume[0]), substitute.origin[0]
            assert batch.volume_ids[place] == f"vol_{number:03d}"
            box = tuple(slice(start, start + 16) for start in origin)
            expected = voxels_of(number, SHAPE)[0][box]
            assert np.array_equal(batch.volume[place, 0].numpy(), expected)
            assert batch.label is not None
            assert np.array_equal(batch.label[place].numpy(), expected % 3)
            # The normalisation goes with the voxels that were read, the seed with the sample.
            assert batch.normalisation[place, 0, 0] == number * 100
            assert batch.seeds[place] == planned.seed[place]
    assert replaced == 4
    assert [bad.volume_id for bad in loader.bad_samples] == ["vol_003"] * 4


def test_substitutes_are_the_same_on_any_number_of_ranks_however_they_read(store: Path) -> None:
    damage(store, load_manifest(store), 2)
    alone = take(a_loader(store, workers=0, micro_batch=4, read="pread"), 8)
    ranks = [
        take(a_loader(store, world=World(rank=rank, size=2), micro_batch=2, read=read), 8)
        for rank, read in enumerate(("map", "auto"))
    ]
    assert sum(batch.substituted for batch in alone) > 0
    for step, batch in enumerate(alone):
        assert batch.volume_ids == ranks[0][step].volume_ids + ranks[1][step].volume_ids
        assert torch.equal(batch.volume, torch.cat([ranks[0][step].volume, ranks[1][step].volume]))
        assert batch.bad == ranks[0][step].bad + ranks[1][step].bad


def test_a_substitute_that_is_unreadable_too_is_replaced_again(store: Path) -> None:
    manifest = load_manifest(store)
    for index in range(VOLUMES - 3):
        damage(store, manifest, index)
    batches = take(a_loader(store, workers=0), 8)
    assert {name for batch in batches for name in batch.volume_ids} == {"vol_005", "vol_006", "vol_007"}
    assert sum(len(batch.bad) for batch in batches) > sum(batch.substituted for batch in batches) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_with_nothing_readable_is_an_error(store: Path, workers: int) -> None:
    manifest = load_manifest(store)
    for index in range(VOLUMES):
        damage(store, manifest, index)
    with pytest.raises(DataError, match=r"sample \d+ and its 8 substitutes cannot be read; the last reason: .*vol_00"):
        take(a_loader(store, workers=workers), 1)


def test_too_many_bad_samples_stop_the_run_and_name_the_volumes(store: Path) -> None:
    manifest = load_manifest(store)
    for index in (1, 5):
        damage(store, manifest, index)
    with pytest.raises(DataError) as caught:
        take(a_loader(store, max_bad_samples=2), 100)
    text = str(caught.value)
    assert re.match(r"[34] samples could not be read, more than stream\.max_bad_samples=2; repair the store \(", text)
    assert "vol_001 (sample " in text
    assert "vol_005 (sample " in text
    assert caught.value.exit_code == 3
    assert children() == set()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_that_is_truncated_under_a_running_loader_costs_samples_and_no_worker(store: Path, workers: int) -> None:
    manifest = load_manifest(store)
    with a_loader(store, workers=workers, read="map") as loader:
        before = [next(loader) for _ in range(8)]  # an epoch: every pack is mapped
        alive = children()
        truncate(store, manifest, 3)
        after = [next(loader) for _ in range(24)]
        assert children() == alive
    assert not any(batch.bad for batch in before)
    bad = [bad for batch in after for bad in batch.bad]
    assert 4 <= len(bad) <= 6, "twice an epoch, but for what was read ahead"
    assert {item.volume_id for item in bad} == {"vol_003"}
    assert all("vol_003: " in item.reason and "truncated: ends at byte" in item.reason for item in bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_error_of_the_kernel_names_the_volume_and_costs_one_sample(
    store: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    manifest = load_manifest(store)
    bad_pack = layout.pack_path(store, manifest.row(3).part).stat().st_ino
    preadv, calls = os.preadv, []

    def failing(file: int, buffers: Any, offset: int) -> int:
        if os.fstat(file).st_ino == bad_pack:
            calls.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    bad = [bad for batch in take(a_loader(store, workers=workers), 8) for bad in batch.bad]
    assert [item.volume_id for item in bad] == ["vol_003"] * 2
    assert all("Input/output error; volume vol_003 lies in it; restore the pack" in item.reason for item in bad)
    if workers == 0:
        assert len(calls) == 4, "each of two crops is tried twice"


def test_a_read_that_fails_once_is_tried_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(a_loader(store, workers=0), 4)
    read_crops, calls = ShardReader.read_crops, iter(range(10**6))

    def flaky(self: ShardReader, *arguments: Any, **named: Any) -> Any:
        if next(calls) % 3 == 0:
            raise OSError(5, "Input/output error")
        return read_crops(self, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read_crops", flaky)
    for first, second in zip(expected, take(a_loader(store, workers=0), 4), strict=True):
        assert second.substituted == 0
        assert torch.equal(first.volume, second.volume)


def test_a_worker_that_is_killed_once_costs_nothing_but_time(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = shared_memory()
    expected = take(a_loader(store, workers=0), 12)
    with a_loader(store) as loader:
        got = [next(loader)]
        victim = max(children())
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.3)  # a handler that raises would do it here, between two lines of the trainer
        got += [next(loader) for _ in range(11)]
    for first, second in zip(expected, got, strict=True):
        assert torch.equal(first.volume, second.volume)
        assert first.sample_ids.tolist() == second.sample_ids.tolist()
        assert second.substituted == 0
    said = capfd.readouterr().err.replace("\n", " ")
    assert re.search(rf"loader worker \d \(pid {victim}\) was killed by SIGKILL; when the machine ran out of mem", said)
    assert "the workers start again" in said
    assert children() == set()
    assert shared_memory() <= before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no folder here")
@pytest.mark.parametrize("is_killed_before", [True, False])
def test_a_worker_killed_while_it_names_shared_memory_leaves_no_name(store: Path, is_killed_before: bool) -> None:
    with a_loader(store) as loader:
        next(loader)
        victim = max(children())
        left = Path(f"/dev/shm/torch_{victim}_123_4")  # as torch has it between shm_open and shm_unlink
        left.touch()
        if is_killed_before:
            os.kill(victim, signal.SIGKILL)
            for _ in range(11):
                next(loader)
            assert not left.exists()
    assert not left.exists()


def kill_the_reader_of(monkeypatch: pytest.MonkeyPatch, *volume_ids: str) -> None:
    read_crops = ShardReader.read_crops

    def deadly(self: ShardReader, row: Any, *arguments: Any, **named: Any) -> Any:
        if row.id in volume_ids and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_crops(self, row, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read_crops", deadly)


def test_a_volume_that_kills_two_workers_is_replaced_named_and_counted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(load_manifest(store))
    kill_the_reader_of(monkeypatch, "vol_003")
    with a_loader(store) as loader:
        batches = [next(loader) for _ in range(16)]
    replaced = [bad for batch in batches for bad in batch.bad]
    assert [bad.volume_id for bad in replaced] == ["vol_003"] * 4
    assert all(
        "vol_003: two loader workers were killed while they read it (loader worker" in b.reason for b in replaced
    )
    for batch in batches:
        for place, sample_id in enumerate(batch.sample_ids.tolist()):
            samples = plan.samples(np.array([sample_id]))
            if samples.volume[0] == 3:
                samples = plan.substitutes(np.array([sample_id]), 1)
            assert batch.volume_ids[place] == f"vol_{samples.volume[0]:03d}"
    assert children() == set()


def test_workers_that_are_killed_again_and_again_stop_the_run_with_exit_code_3(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_the_reader_of(monkeypatch, *(f"vol_{number:03d}" for number in range(VOLUMES)))
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        take(a_loader(store, max_bad_samples=3), 1)
    assert caught.value.exit_code == 3
    lines = str(caught.value).splitlines()
    assert len(lines) >= 4
    assert all(
        re.match(r"loader worker \d \(pid \d+\) was killed by SIGKILL; .*; it read volume vol_00\d", x) for x in lines
    )
    assert time.monotonic() - start < 60
    assert children() == set()


def test_a_hung_worker_is_named_after_the_timeout(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_crops = ShardReader.read_crops

    def slow(self: ShardReader, row: Any, *arguments: Any, **named: Any) -> Any:
        if torch.utils.data.get_worker_info().id == 1:
            time.sleep(1000)
        return read_crops(self, row, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read_crops", slow)
    loader = a_loader(store, timeout_s=1.5)
    next(loader)
    start = time.monotonic()
    with pytest.raises(
        LostRankError,
        match=r"loader worker 1 \(pid \d+\) has delivered nothing for stream.timeout_s=1.5 s; it reads volume vol_00",
    ):
        next(loader)
    assert 1 < time.monotonic() - start < 10
    assert children() == set()


def test_a_slow_read_within_the_timeout_is_only_slow(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimscale.stream.workers.LOOK_EVERY_S", 0.1)
    read_crops = ShardReader.read_crops

    def slow(self: ShardReader, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.15)
        return read_crops(self, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read_crops", slow)
    assert len(take(a_loader(store, workers=1, timeout_s=30), 2)) == 2


def test_a_stopped_worker_does_not_outlive_close(store: Path) -> None:
    loader = a_loader(store, workers=1)
    next(loader)
    os.kill(max(children()), signal.SIGSTOP)  # it cannot obey SIGTERM
    loader.close()
    assert children() == set()


SCRIPT = """
    import signal
    import sys
    from pathlib import Path
    import numpy as np
    from mimscale.store.manifest import load_manifest
    from mimscale.stream.config import StreamConfig
    from mimscale.stream.loader import StreamLoader
    from mimscale.stream.plan import SamplePlan
    from mimscale.world import World

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    store = Path(sys.argv[1])
    manifest = load_manifest(store)
    indices = np.arange(len(manifest))
    config = StreamConfig(workers=2)
    plan = SamplePlan.of(manifest, indices, seed=1, crop_voxels=(16, 16, 16), config=config, global_batch=4)
    loader = StreamLoader(store=store, manifest=manifest, indices=indices, plan=plan, world=World(), micro_batch=4,
                          accumulation=1, config=config)
    for number, batch in enumerate(loader):
        if number == 3:
            children = Path("/proc/self/task").joinpath(str(__import__("os").getpid()), "children").read_text()
            print(children, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_trainer_that_is_stopped_without_closing(store: Path, number: signal.Signals) -> None:
    before = shared_memory()
    trainer = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(SCRIPT), str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    if number == signal.SIGINT:
        os.killpg(trainer.pid, number)  # Ctrl-C on a terminal reaches the whole group
    else:
        trainer.send_signal(number)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            trainer.wait(timeout=60)
        if trainer.poll() is None:
            trainer.send_signal(signal.SIGABRT)  # faulthandler prints where it hangs
            pytest.fail(f"hangs after {number.name}: {trainer.communicate(timeout=20)[1]}")
        deadline = time.monotonic() + 15
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [worker for worker in workers if is_alive(worker)]
        assert shared_memory() <= before
    finally:
        kill_all(filter(is_alive, workers))
        _, text = trainer.communicate(timeout=20)
    assert "_worker_loop" not in text, "a worker printed a traceback of its own"
    began = time.monotonic()
    assert len(take(a_loader(store), 2)) == 2, "the next run cannot start"
    assert time.monotonic() - began < 20


def test_a_loader_may_be_used_outside_of_the_main_thread(store: Path) -> None:
    got: list[Batch] = []
    thread = threading.Thread(target=lambda: got.extend(take(a_loader(store), 2)))
    thread.start()
    thread.join(timeout=60)
    assert len(got) == 2


def test_a_trainer_that_ends_without_closing_its_loader_does_not_wait_for_workers_that_ignore_term(store: Path) -> None:
    script = textwrap.dedent(SCRIPT).replace("print(children, flush=True)", "sys.exit(7)")
    ended = subprocess.run(
        [sys.executable, "-c", script, str(store)], timeout=60, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 7, ended.stderr
