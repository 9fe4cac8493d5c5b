import json

import numpy as np
import pytest
import torch
from small_segmentation import SOURCES, make_pretrain_run, make_store

from mimscale.cli import main
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.models.config import MaeConfig
from mimscale.models.masking import draw_masks
from mimscale.store import layout
from mimscale.store.manifest import load_manifest
from mimscale.stream.config import StreamConfig
from mimscale.stream.device import normalise
from mimscale.stream.loader import fixed_batches
from mimscale.stream.plan import FixedPlan
from mimscale.train.build import build_pretrain
from mimscale.train.config import load_run_config
from mimscale.world import World

SMALL = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    return make_pretrain_run(tmp_path_factory.mktemp("runs") / "pretrain", store)


@pytest.fixture(scope="module")
def scores(run):
    return evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, crops=2, pictures=1))


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_networks_error_is_the_training_loss_of_the_same_crops_and_masks(tmp_path, store, loss):
    folder = make_pretrain_run(tmp_path / "run", store, mae=MaeConfig(loss=loss, target="raw", **SMALL))
    scores = evaluate(EvaluateConfig(threads=1, run_dir=folder, batch=3, crops=2, pictures=0))

    config, manifest = load_run_config(folder), load_manifest(store)
    stream = StreamConfig(workers=0, crops_per_volume=2, origins="foreground")
    indices = manifest.select(split="val")
    plan = FixedPlan.of(manifest, indices, seed=config.seed, crop_voxels=config.crop_voxels, config=stream)
    batches = fixed_batches(
        store=store, manifest=manifest, indices=indices, plan=plan, world=World(), batch=6, config=stream
    )
    (batch,) = batches
    torch.manual_seed(0)
    image, valid = normalise(batch)
    hidden = torch.from_numpy(draw_masks(batch.seeds, config.crop_voxels, config.patch_voxels, config.mask))
    expected = build_pretrain(config, 1)(image, hidden, valid).sample_loss

    assert [crop["network"] for crop in scores["crops"]] == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_baseline_of_a_constant_guess_is_as_wrong_as_computed_by_hand(run, scores):
    crop = next(crop for crop in scores["crops"] if crop["file"])
    with np.load(run / "evaluate" / crop["file"]) as arrays:
        original, hidden = arrays["original"], arrays["hidden"]
    # This volume fills its crops, so all voxels count.
    guess = original[~hidden].mean()
    assert crop["hidden_voxels"] == hidden.sum() == 6 * 8**3
    expected = np.abs(original[hidden] - guess).mean()
    assert scores["error"] == "mean absolute error"
    assert crop["baseline"] == pytest.approx(expected, rel=1e-4)


def test_voxels_outside_of_a_small_volume_are_not_counted(scores):
    # The last source has 12 of the crop's 16 voxels along Z: at least the rest is never scored.
    counts = [crop["hidden_voxels"] for crop in scores["crops"] if crop["volume"] == "cccc"]
    assert counts
    assert all(count < 6 * 8**3 for count in counts)


def test_every_volume_has_its_crops_and_the_one_with_most_to_find_is_kept_for_the_picture(run, scores):
    assert [(crop["volume"], crop["crop"]) for crop in scores["crops"]] == [(v, c) for v in SOURCES for c in (0, 1)]
    hardest = max(scores["crops"][:2], key=lambda crop: crop["baseline"])
    assert hardest["file"] == f"reconstructions/aaaa_{hardest['crop']}.npz"
    assert sum(crop["file"] is not None for crop in scores["crops"]) == 1
    assert (run / "evaluate" / hardest["file"]).exists()


def test_two_evaluations_give_the_same_scores(store, scores, tmp_path):
    again = evaluate(
        EvaluateConfig(threads=1, run_dir=make_pretrain_run(tmp_path / "run", store), batch=2, crops=2, pictures=1)
    )
    # Another batch size may round differently in the last digits.
    for first, second in zip(scores["crops"], again["crops"], strict=True):
        assert first["network"] == pytest.approx(second["network"], rel=1e-5)
        assert first["origin_zyx"] == second["origin_zyx"]


def test_a_patch_normalised_target_is_compared_with_what_it_gives_away(tmp_path, store):
    folder = make_pretrain_run(tmp_path / "run", store, mae=MaeConfig(loss="l2", target="patch_normalised", **SMALL))
    scores = evaluate(EvaluateConfig(threads=1, run_dir=folder, batch=4, crops=1, pictures=1))
    assert scores["error"] == "mean squared error"
    assert "gives away" in scores["baseline"]
    with np.load(folder / "evaluate" / scores["crops"][0]["file"]) as arrays:
        original, hidden = arrays["original"], arrays["hidden"]
    patches = original.reshape(2, 8, 2, 8, 2, 8).mean(axis=(1, 3, 5)).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    expected = np.square(original - patches)[hidden].mean()
    assert scores["crops"][0]["baseline"] == pytest.approx(expected, rel=1e-4)


def test_the_verb_knows_a_pretraining_run_from_its_config(store, capsys, tmp_path):
    run = make_pretrain_run(tmp_path / "run", store)
    assert main(["evaluate", "threads=1", f"run_dir={run}", "crops=1", "pictures=0", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["kind"] == "pretrain"
    assert tree["mean"].keys() == {"network", "baseline"}


def test_a_damaged_crop_stops_the_evaluation_and_names_the_volume(tmp_path, capsys):
    store = make_store(tmp_path / "data")
    run = make_pretrain_run(tmp_path / "run", store)
    manifest = load_manifest(store)
    row = manifest.row(manifest.index_of("bbbb"))
    pack = layout.pack_path(store, 0)
    data = bytearray(pack.read_bytes())
    data[row.offset_bytes + 100] ^= 0xFF
    pack.write_bytes(data)
    assert main(["evaluate", "threads=1", f"run_dir={run}", "crops=4"]) == 3
    assert "bbbb" in capsys.readouterr().err
    assert not (run / "evaluate" / "scores.json").exists()
