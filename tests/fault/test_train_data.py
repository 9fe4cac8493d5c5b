"""Training when the data change between two jobs of a run, or cannot be read."""

import dataclasses
import json
from pathlib import Path

import pytest
from rank_pool import run_ranks
from stream_stores import damage, write_store
from tiny_runs import SHAPES, pretrain_words, run_of

from mimscale.store.manifest import load_manifest, write_manifest
from mimscale.train.run_dir import RunDir

pytestmark = pytest.mark.two_process


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> list[str]:
    """The words of a run that has finished 4 steps."""
    words = pretrain_words(store, tmp_path_factory.mktemp("runs") / "run", "steps=4", "validation.every_steps=0")
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    return words


def samples_of(run: RunDir) -> dict[int, list[int]]:
    lines = [json.loads(line) for line in (run.samples / "rank00000.jsonl").read_text().splitlines()]
    return {line["step"]: line["sample_ids"] for line in lines}


def test_a_store_that_grew_and_another_filter_are_refused_until_they_are_accepted(finished, tmp_path):
    run = run_of(finished)
    write_store(tmp_path / "larger", [*SHAPES, SHAPES[0]])
    grown = [*finished, f"store={tmp_path / 'larger'}"]
    (ended,) = run_ranks([*grown, "steps=6"], size=1)
    assert ended.code == 2
    hashes = next(line.split() for line in ended.err.splitlines() if "plan_hash:" in line)
    assert len({hashes[1], hashes[3]}) == 2
    assert "number of volumes: 8 -> 9" in ended.err
    assert "--fresh-data" in ended.err

    (ended,) = run_ranks([*grown, "steps=6", "--fresh-data"], size=1)
    assert ended.code == 0, ended.err
    assert run.read_outcome().step == 6
    assert samples_of(run)[6] == list(range(40, 48)), "the run does not go on at its step"

    filtered = [*grown, "stream.filter=shape[1] > 0 and id != 'vol_000'", "seed=3"]
    (ended,) = run_ranks([*filtered, "steps=8"], size=1)
    assert ended.code == 2
    assert "stream.filter: None -> " in ended.err
    assert "seed: 0 -> 3" in ended.err
    assert "--fresh-data accepts another seed, modality, global_batch and stream.*" in ended.err
    (ended,) = run_ranks([*filtered, "steps=8", "--fresh-data"], size=1)
    assert ended.code == 0, ended.err
    # What was accepted is what the run has now.
    (ended,) = run_ranks([*filtered, "steps=9"], size=1)
    assert ended.code == 0, ended.err
    assert run.read_outcome().step == 9


def test_another_model_is_refused_with_fresh_data_too(finished):
    (ended,) = run_ranks([*finished, "model.depth=3", "--fresh-data"], size=1)
    assert ended.code == 2
    assert "model.depth: 2 -> 3" in ended.err


def test_a_filter_that_leaves_nothing_says_so(store, tmp_path):
    words = pretrain_words(store, tmp_path / "run", "stream.filter=modality == 'pet'")
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 3
    assert "no training volume with modality=None, overlay=None, stream.filter=modality == 'pet'" in ended.err


def test_replaced_samples_stand_in_the_metrics_and_too_many_stop_the_run_with_exit_code_3(tmp_path):
    store = tmp_path / "store"
    manifest = write_store(store, SHAPES)
    damage(store, manifest, 2)
    words = pretrain_words(store, tmp_path / "run", "steps=4", "validation.every_steps=0")
    (ended,) = run_ranks([*words, "stream.max_bad_samples=1"], size=1)
    assert ended.code == 3
    assert "2 samples could not be read, more than stream.max_bad_samples=1" in ended.err
    assert "vol_002 (sample " in ended.err
    (ended,) = run_ranks([*words, "stream.max_bad_samples=20"], size=1)
    assert ended.code == 0, ended.err
    metrics = [line for line in RunDir(tmp_path / "run").read_metrics() if "loss" in line]
    # Four steps of eight samples are two epochs of two crops: of each of eight volumes four, and one is damaged.
    assert sum(line["substituted"] for line in metrics) == 4
    assert all(line["voxels_decoded_per_crop"] >= 16 * 24 * 32 for line in metrics)
    assert all(line["bytes_read_per_crop"] > 0 for line in metrics)
    assert len(load_manifest(store)) == 8


def test_training_at_a_target_spacing_from_regions_with_weights_and_labels(tmp_path):
    bare = write_store(tmp_path / "store", SHAPES)
    rows = [
        dataclasses.replace(
            bare.row(number),
            spacing_mm=(1.0 + number % 3, 1.0, 1.2),
            tags={"site": "AB"[number % 2]},
            split="val" if number == 7 else "train",
        )
        for number in range(len(SHAPES))
    ]
    write_manifest(tmp_path / "store", rows)
    stream = [
        "stream.workers=2",
        "stream.crops_per_volume=2",
        "stream.weights.by=tags['site']",
        "stream.weights.values={A: 1, B: 0.7}",
        "stream.filter=shape[1] >= 40",
    ]
    words = pretrain_words(
        tmp_path / "store", tmp_path / "pretrain", "steps=3", "validation.every_steps=3", "global_batch=4", *stream
    )
    words += ["stream.target_spacing_mm=[1.5, 1.1, 1.2]", "stream.region_voxels=[20, 28, 36]"]
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    metrics = RunDir(tmp_path / "pretrain").read_metrics()
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    assert any("val_loss" in line for line in metrics)

    words = ["finetune", "demo/finetune", f"store={tmp_path / 'store'}", f"run_dir={tmp_path / 'finetune'}", *stream]
    words += ["steps=2", "global_batch=4", "micro_batch=2", "crop_voxels=[16, 16, 16]", "patch_voxels=[8, 8, 8]"]
    words += [
        "model={dim: 24, depth: 4, heads: 2}",
        "unetr={feature_size: 4, num_classes: 3}",
        "validation.every_steps=2",
    ]
    words += ["stream.target_spacing_mm=[1.5, 1.1, 1.2]", "stream.region_voxels=[20, 20, 20]"]
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    assert any("val_dice" in line for line in RunDir(tmp_path / "finetune").read_metrics())
