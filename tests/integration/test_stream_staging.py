"""A node's copier runs ahead of the trainer in plan order; what is read is the same with it and without."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stream_stores import write_store
from tiny_runs import pretrain_words

from mimscale.config import build_config
from mimscale.store import layout
from mimscale.store.manifest import load_manifest
from mimscale.store.stage import STAGE_COLUMNS, Stage, packs_of
from mimscale.stream.config import StreamConfig
from mimscale.stream.plan import SamplePlan
from mimscale.stream.staging import Copier, upcoming_packs
from mimscale.train.config import FinetuneConfig
from mimscale.train.training_data import TrainingData
from mimscale.world import World

SHAPES = [(40, 36, 44)] * 8


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


def a_stage(store: Path, folder: Path, limit_packs: float = 100) -> Stage:
    size = max(path.stat().st_size for path in (store / "packs").iterdir())
    return Stage(folder, int(limit_packs * size), packs_of(store, load_manifest(store, STAGE_COLUMNS)))


def soon(what: Callable[[], bool], within_s: float = 20) -> bool:
    deadline_s = time.monotonic() + within_s
    while not what() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return what()


def packs(store: Path, *parts: int) -> list[Path]:
    return [layout.pack_path(store, part) for part in parts]


def test_the_copier_takes_packs_in_plan_order_and_keeps_within_the_limit(store, tmp_path, monkeypatch):
    monkeypatch.setattr("mimscale.stream.staging.LOOK_EVERY_S", 0.05)
    stage = a_stage(store, tmp_path / "stage", limit_packs=2)
    order = [5, 0, 3, 7, 1]
    sizes = sorted(path.stat().st_size for path in packs(store, *order))
    assert sum(sizes[:3]) > 2 * sizes[-1], "three must not fit where two do"
    copier = Copier(stage, lambda batch: packs(store, *order[batch : batch + 1]), horizon=len(order), start_batch=0)

    def there() -> list[int]:
        return [part for part in order if stage.copy_of(*packs(store, part)) is not None]

    try:
        copier.start()
        assert soon(lambda: there() == [5, 0]), there()
        time.sleep(0.5)
        assert there() == [5, 0], "what the trainer has not read yet was pushed out"
        copier.reached(1)  # batch 0 is read
        assert soon(lambda: there() == [0, 3]), there()
        copier.reached(3)
        assert soon(lambda: there() == [7, 1]), there()
        assert copier.copied_bytes == sum(sizes)
    finally:
        copier.close()


def test_a_copier_that_starts_in_the_middle_skips_what_was_read(store, tmp_path):
    stage = a_stage(store, tmp_path / "stage")
    copier = Copier(stage, lambda batch: packs(store, batch), horizon=4, start_batch=3)
    try:
        copier.start()
        assert soon(lambda: all(stage.copy_of(path) for path in packs(store, 3, 4, 5, 6)))
        assert not any(stage.copy_of(path) for path in packs(store, 0, 1, 2, 7))
    finally:
        copier.close()


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_a_node_needs_the_packs_of_its_own_ranks(store, rank, local_rank):
    manifest = load_manifest(store)
    indices = np.arange(len(manifest))
    config = StreamConfig(crops_per_volume=2)
    plan = SamplePlan.of(manifest, indices, seed=1, crop_voxels=(16, 16, 16), config=config, global_batch=8)
    world = World(rank=rank, size=4, local_rank=local_rank, local_size=2)
    paths_of = lambda volume: [layout.pack_path(store, manifest.sample_row(volume).part)]  # noqa: E731
    upcoming = upcoming_packs(plan, world, 2, paths_of)
    for batch in range(plan.batches_per_epoch):
        mine = range(0, 2) if rank < 2 else range(2, 4)
        samples = np.concatenate([part for each in mine for part in plan.rank_samples(batch, each, 4, 2)])
        expected = {paths_of(volume)[0] for volume in plan.samples(samples).volume.tolist()}
        assert set(upcoming(batch)) == expected
        assert len(upcoming(batch)) == len(expected)


def a_finetune(store: Path, folder: Path, **stream) -> TrainingData:
    tree = {
        "store": str(store),
        "run_dir": str(folder / "run"),
        "steps": 5,
        "global_batch": 4,
        "micro_batch": 2,
        "crop_voxels": [16, 16, 16],
        "patch_voxels": [8, 8, 8],
        "unetr": {"feature_size": 4, "num_classes": 3},
        "stream": {"workers": 1, "crops_per_volume": 4, **stream},
    }
    return TrainingData(build_config(FinetuneConfig, tree, "test"), "label")


def test_batches_are_the_same_from_copies_and_each_node_has_one_copier(store, tmp_path):
    plain = a_finetune(store, tmp_path)
    staged = a_finetune(store, tmp_path, stage_dir=str(tmp_path / "stage"))
    world = World(rank=1, size=2, local_rank=1, local_size=2)
    with staged.loader(world, 0) as loader:
        next(loader)
        assert loader.take_counts()["staged_bytes"] == 0
        assert not list((tmp_path / "stage").iterdir()), "local rank 1 copied"
    counts = {"stage_hits": 0.0, "stage_misses": 0.0, "staged_bytes": 0.0}
    with staged.loader(World(), 0) as ours, plain.loader(World(), 0) as theirs:
        next(ours), next(theirs)
        assert soon(lambda: len(list((tmp_path / "stage").glob("*.zarr.zip"))) == 16), "8 packs and 8 of labels"
        time.sleep(1.1)  # readers look for a copy once a second
        for _ in range(13):
            one, other = next(ours), next(theirs)
            assert one.volume_ids == other.volume_ids
            assert np.array_equal(one.volume, other.volume)
            assert np.array_equal(one.label, other.label)
            for name, count in ours.take_counts().items():
                counts[name] += count
        assert theirs.take_counts() == {}
    files = [path for path in (tmp_path / "stage").iterdir() if path.suffix == ".zip"]
    assert counts["staged_bytes"] == sum(path.stat().st_size for path in files)
    assert counts["stage_hits"] > 0
    assert counts["stage_hits"] + counts["stage_misses"] >= 13 * 2 * 2


def test_a_run_counts_its_copies_and_has_the_losses_of_a_run_without(store, tmp_path):
    stage = a_stage(store, tmp_path / "stage")
    for path in packs(store, *range(8)):
        stage.add(path)
    runs = {}
    for name, more in (("plain", []), ("staged", [f"stream.stage_dir={tmp_path / 'stage'}", "stream.stage_gib=1"])):
        words = pretrain_words(store, tmp_path / name, "steps=6", "global_batch=4", "validation.every_steps=0", *more)
        command = [sys.executable, "-c", "import sys; from mimscale.cli import main; sys.exit(main(sys.argv[1:]))"]
        done = subprocess.run([*command, *words], env=os.environ, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        runs[name] = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in runs["plain"]] == [line["loss"] for line in runs["staged"]]
    assert not any("stage_hits" in line for line in runs["plain"])
    assert sum(line["stage_misses"] for line in runs["staged"]) == 0
    assert sum(line["stage_hits"] for line in runs["staged"]) >= 6 * 4
    assert sum(line["staged_bytes"] for line in runs["staged"]) == 0, "they were there already"
