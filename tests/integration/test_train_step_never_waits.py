"""A run gives its device work and does not wait for it. Watched on a CPU, where the operations are the same."""

import json
import os
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import torch
from rank_pool import run_ranks
from stream_stores import write_store
from syncs import SyncWatch, waiting_events
from tiny_networks import NETWORKS, without_numbers
from tiny_runs import SHAPES, pretrain_words

from mimscale.bench.synthetic import synthetic_batch
from mimscale.bench.training import Bench
from mimscale.bench.verbs import bench_config
from mimscale.stream.device import to_device
from mimscale.train.config import HealthConfig, accumulation
from mimscale.train.health import Health
from mimscale.train.meter import Meter
from mimscale.train.pretrain import MaskedReconstruction
from mimscale.train.run_dir import RunDir
from mimscale.world import World

# ZeRO-3 compares the order of its parameters between the ranks in the first two steps.
PROFILED, WATCHED, STEPS = 3, (4, 6), 7  # what is seen begins in the middle of one step and ends in that of another
# The only read of a step: sums of the step before, which have come to page-locked memory by themselves.
LATE_READ = ("tolist", "ranks.py:wait")
# Masks are drawn on the host. On a device without numbers, below, a read of anything else there would raise.
OF_MASKS = {("tolist", "mae.py:visible_indices"), ("tolist", "patches.py:chosen_indices")}
CASES = [(0, "fp32"), *((stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]


def config_of(*words):
    small = [
        "crop_voxels=[16,16,16]",
        "global_batch=4",
        "micro_batch=2",
        "model={dim: 48, depth: 2, heads: 4, drop_path: 0.1}",
    ]
    decoder = "mae={decoder_dim: 48, decoder_depth: 1, decoder_heads: 4}"
    return bench_config(["demo/pretrain", *small, decoder, *words], needs_store=False)


class Curious(Health):
    """Looks at a loss in every step, as a line that is put into the loop would."""

    def keep(self, step, losses, micro_batches):
        losses[0].item()
        losses[0].numpy()
        super().keep(step, losses, micro_batches)


def train_watched(config, ranks, folder, judge):
    """Places that wait in two steps of the loop that trains, what torch's profiler saw in another, and logged lines."""
    from mimscale.train.engine import Engine
    from mimscale.train.loop import train

    objective = MaskedReconstruction(config)
    engine = Engine(objective.build(1), config, ranks)
    run, batch = RunDir(folder), synthetic_batch(config, 1, ranks.device)
    watch = SyncWatch(host=[batch.sample_ids])
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    ends = (None, None, None)
    at_step = {
        PROFILED: lambda: profile.__enter__(),
        PROFILED + 1: lambda: (profile.__exit__(*ends), watch.__enter__()),
        WATCHED[1]: lambda: watch.__exit__(*ends),
    }
    health = judge(config.health, run, ranks, tree={}, rollback=lambda: None)
    health.start(0)
    with Meter(run, config.meter, ranks.world, steps=STEPS, global_batch=config.global_batch) as meter:
        meter.start(0)
        train(
            first_step=0,
            steps=STEPS,
            accumulation=accumulation(config, ranks.world.size),
            engine=engine,
            ranks=ranks,
            batches=repeat(batch),
            loss_of=lambda batch: objective.loss(engine, batch),
            meter=meter,
            health=health,
            stop_wanted=lambda: False,
            save=lambda step: None,
            save_due=lambda step: False,
            validate=dict,
            validation_due=lambda step: False,
            step_done=lambda step: at_step.get(step, lambda: None)(),
            take_yardsticks=objective.take_yardsticks,
        )
    return watch.places, waiting_events(profile), run.read_metrics()


def watch_steps(words):
    """In a process of its own: what waits in each case, in one with a curious judge, and in `bench train`."""
    from mimscale.train.engine import join_ranks, leave_ranks

    ranks = join_ranks(World.from_environment(os.environ))
    seen = []
    for judge, (stage, precision) in [*((Health, case) for case in CASES), (Curious, CASES[0])]:
        folder = Path(words[0]) / f"{stage}-{precision}-{judge.__name__}"
        config = config_of(f"engine.zero_stage={stage}", f"engine.precision={precision}", "meter.log_every_steps=2")
        seen.append(train_watched(config, ranks, folder, judge))
    bench = Bench(config_of(), ranks, with_store=False)
    bench._run(bench.synthetic(), PROFILED)
    batch = next(bench.synthetic())
    with SyncWatch(host=[batch.sample_ids]) as watch:
        bench._run(repeat(batch), 2)
    seen.append((watch.places, [], []))
    print(json.dumps(seen))
    leave_ranks()
    return 0


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    (ended,) = run_ranks([str(tmp_path_factory.mktemp("runs"))], size=1, body=watch_steps)
    assert ended.code == 0, ended.err
    return [
        [tuple(map(tuple, found)) for found in case[:2]] + case[2:] for case in json.loads(ended.out.splitlines()[-1])
    ]


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_the_loop_waits_at_any_stage_with_health_and_meter_as_they_are_by_default(case, seen):
    assert config_of().health == HealthConfig()
    places, profiled, lines = seen[CASES.index(case)]
    assert [place for place in places if place not in OF_MASKS] == [LATE_READ] * (WATCHED[1] - WATCHED[0])
    assert profiled == ()
    assert [line["step"] for line in lines] == [2, 4, 6, STEPS]
    assert all(line["grad_norm"] > 0 for line in lines)


def test_a_look_at_a_loss_between_two_steps_is_seen(seen):
    places, profiled, _ = seen[len(CASES)]
    mine = "test_train_step_never_waits.py:keep"
    assert places.count(("_local_scalar_dense", mine)) == places.count(("numpy", mine)) == WATCHED[1] - WATCHED[0]
    assert ("item", "") in profiled


def test_what_bench_train_times_waits_no_more_than_a_run_does(seen):
    places, *_ = seen[-1]
    assert [place for place in places if place not in OF_MASKS] == [LATE_READ] * 2


HOSTS_FILES = ("slots.py", "batch.py", "loader.py", "workers.py")  # what the loader does with the host's own memory


def watch_session(told, _rank):
    """Planted into a run: five of its steps are watched, with all that a session puts into the loop."""
    from mimscale.train import session

    train, watch = session.train, SyncWatch(host=[])

    def noted(batches):
        for batch in batches:
            watch.host.append(batch.sample_ids)
            yield batch

    def watched_train(*, batches, step_done, **parts):
        def and_watch(step):
            step_done(step)
            if step == 8:
                watch.__enter__()
            if step == 13:
                watch.__exit__(None, None, None)
                told.write_text(json.dumps(watch.places))

        return train(batches=noted(batches), step_done=and_watch, **parts)

    session.train = watched_train


def test_nothing_that_a_run_puts_into_the_loop_waits(tmp_path):
    write_store(tmp_path, SHAPES)
    words = pretrain_words(tmp_path, tmp_path / "run", "meter.log_every_steps=3", "validation.every_steps=0")
    (ended,) = run_ranks(words, size=1, plant=partial(watch_session, tmp_path / "places.json"))
    assert ended.code == 0, ended.err
    places = [tuple(place) for place in json.loads((tmp_path / "places.json").read_text())]
    places = [place for place in places if place not in OF_MASKS and not place[1].startswith(HOSTS_FILES)]
    assert places == [LATE_READ] * 5


@pytest.mark.parametrize("name", NETWORKS)
def test_augmentation_loss_and_gradients_of_every_network_wait_for_no_copy(name):
    # A device that computes shapes alone: a value that had to come back would raise, a copy is seen.
    device = torch.device("meta")
    objective, model, batch = without_numbers(name)
    with SyncWatch(host_works=True) as watch:
        loss = objective.loss(model, batch)
        loss.backward()
    assert loss.device == device
    assert watch.places == []
    assert watch.copies == {"device.py:to_device"}  # which has the memory page-locked


def test_what_the_host_made_goes_to_a_gpu_from_page_locked_memory(monkeypatch):
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor) or tensor)
    indices = torch.arange(3)
    assert to_device(indices, torch.device("meta")).is_meta
    assert locked == []
    with pytest.raises((RuntimeError, AssertionError)):  # there is none here
        to_device(indices, torch.device("cuda", 0))
    assert len(locked) == 1


def test_the_watch_sees_what_waits():
    values = torch.tensor([1.0, 0.0])
    with SyncWatch() as watch:
        values.sum().item()
        values.nonzero()
        values.tolist()
        values.numpy()
        values.cpu()
        torch.tensor(1.0, device=values.device)
        torch.tensor(1.0)
    seen = ["_local_scalar_dense", "nonzero", "tolist", "numpy", "cpu", "tensor"]
    assert [name for name, _ in watch.places] == seen
    with SyncWatch(host=[values]) as theirs:
        values.tolist()
    assert theirs.places == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        values[values > 0].sum().item()
    assert {name for name, _ in waiting_events(profile)} == {"_local_scalar_dense", "item", "nonzero"}
    assert all(place.endswith("test_the_watch_sees_what_waits") for _, place in watch.places)
    with pytest.raises(NotImplementedError), SyncWatch() as watch:
        torch.ones(2, device="meta").cpu()
    assert [name for name, _ in watch.places] == ["_to_copy"]
    with SyncWatch(host_works=True) as watch:
        values.to("meta")
        values.to("meta", non_blocking=True)
        values.sum().item()
    assert [name for name, _ in watch.places] == ["_to_copy"]
    assert watch.copies == {"test_train_step_never_waits.py:test_the_watch_sees_what_waits"}
