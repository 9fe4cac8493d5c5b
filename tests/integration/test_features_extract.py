"""Features of a whole store: what they are, the same from any number of tasks, refused where they mean nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_samples import make_cohort
from rank_pool import run_ranks
from small_segmentation import make_finetune_run, make_pretrain_run

from mimscale.cli import main
from mimscale.errors import ConfigError, DataError
from mimscale.evaluate.planes import Normalised
from mimscale.evaluate.weights import load_model
from mimscale.evaluate.windows import covered_box, sliding_origins
from mimscale.features.config import ExtractConfig
from mimscale.features.layout import read_features
from mimscale.features.plan import read_plan
from mimscale.features.run import extract
from mimscale.features.tokens import read_tokens
from mimscale.store.intensity import normalisation
from mimscale.store.layout import read_info
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.train.config import load_run_config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("cohort"), subjects=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    return make_pretrain_run(tmp_path_factory.mktemp("runs") / "pretrain", store)


def config_of(run, out, **options):
    defaults = {"windows": True, "tokens": True, "part_volumes": 3, "threads": 1, "device": "cpu"}
    return ExtractConfig(run_dir=run, out=out, **{**defaults, **options})


@pytest.fixture(scope="module")
def straight(tmp_path_factory, run):
    out = tmp_path_factory.mktemp("features") / "straight"
    extract(config_of(run, out))
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_features_are_the_mean_tokens_of_windows_over_the_foreground(store, run, straight):
    features = read_features(straight)
    manifest = load_manifest(store)
    assert features.ids == manifest.column("id").tolist()
    assert features.subjects == manifest.column("subject").tolist()
    assert features.splits == manifest.column("split").tolist()
    tag = run / "checkpoints" / "step_00000005"
    model, _ = load_model(load_run_config(run), tag, 1, torch.device("cpu"))
    windows = pq.read_table(straight / "windows.parquet").to_pylist()
    row = manifest.row(4)
    mine = [one for one in windows if one["id"] == row.id]
    start, stop = covered_box(row.foreground_box, row.shape[1:], (16, 16, 16))
    assert [tuple(one["origin_zyx"]) for one in mine] == sliding_origins(start, stop, (16, 16, 16), 0.0)
    assert len(mine) > 1
    raw, numbers = ShardReader(store, manifest).read_volume(row), normalisation(read_info(store).intensity, row.stats)
    image = Normalised(raw, row.fill_value, numbers, (16, 16, 16)).planes(0, max(16, row.shape[1])).numpy()
    with torch.inference_mode():
        for one in mine:
            z, y, x = one["origin_zyx"]
            cut = torch.from_numpy(image[None, :, z : z + 16, y : y + 16, x : x + 16])
            tokens, _ = model.encoder(cut)
            # In batches of other sizes sums are rounded in another order.
            np.testing.assert_allclose(one["feature"], tokens[0].mean(dim=0), rtol=1e-5, atol=1e-6)
    pooled = np.mean([one["feature"] for one in mine], axis=0)
    np.testing.assert_allclose(features.vectors[4], pooled, rtol=1e-6, atol=1e-7)
    tokens = read_tokens(straight / "tokens" / "part-00001.zarr.zip", row.id)  # row 4, three a part
    assert tokens.shape == (len(mine), 2, 2, 2, 24)
    assert tokens.dtype == np.float16
    np.testing.assert_allclose(tokens.reshape(-1, 8, 24).mean(axis=1), [one["feature"] for one in mine], atol=2e-3)


def test_the_contract_says_what_the_features_are_and_stands_in_each_file(store, run, straight):
    contract = json.loads((straight / "features.json").read_text())
    assert (contract["run"], contract["store"]) == (str(run), str(store))
    assert (contract["step"], contract["checkpoint"], contract["weights"]) == (5, "step_00000005", "trained")
    assert (contract["crop_voxels"], contract["patch_voxels"], contract["dim"]) == ([16] * 3, [8] * 3, 24)
    assert contract["target_spacing_mm"] is None
    assert len(contract["store_sha256"]) == len(contract["encoder_sha256"]) == 64
    assert contract["failed"] == []
    for name in ("features.parquet", "windows.parquet"):
        schema = pq.read_schema(straight / name)
        assert json.loads(schema.metadata[b"mimscale_features"]).items() <= contract.items()
        assert str(schema.field("feature").type) == "fixed_size_list<element: float>[24]"
    spacing = pq.read_table(straight / "features.parquet").column("spacing_mm").to_pylist()
    assert spacing == load_manifest(store).column("spacing_mm").tolist()


def test_three_tasks_make_the_bytes_of_one(run, straight, tmp_path):
    config = config_of(run, tmp_path / "f")
    for index in (2, 0, 1):
        extract(replace(config, task=f"{index}/3"))
    assert not (tmp_path / "f" / "features.json").exists()
    with pytest.raises(DataError, match="extraction that has ended"):
        read_features(tmp_path / "f")
    extract(replace(config, merge=True))
    assert files_of(tmp_path / "f") == files_of(straight)


def test_ranks_of_a_launcher_each_take_a_share(run, straight, tmp_path):
    words = ["extract", f"run_dir={run}", f"out={tmp_path / 'f'}", "windows=true", "tokens=true", "part_volumes=3"]
    ended = run_ranks([*words, "threads=1", "device=cpu"], size=2)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert main([*words, "merge=true"]) == 0
    assert files_of(tmp_path / "f") == files_of(straight)


def test_the_same_command_again_computes_nothing(run, straight, capsys):
    before = files_of(straight)
    extract(config_of(run, straight))
    assert "4 of 4 parts are finished already" in capsys.readouterr().err
    assert files_of(straight) == before


def test_a_merge_before_all_tasks_have_ended_names_the_parts(run, tmp_path):
    config = config_of(run, tmp_path / "f")
    with pytest.raises(DataError, match="nothing to merge"):
        extract(replace(config, merge=True))
    extract(replace(config, task="1/3"))
    with pytest.raises(DataError, match=r"3 of 4 parts are not finished \(0, 2, 3\)"):
        extract(replace(config, merge=True))


def test_random_weights_are_a_control_that_a_seed_repeats(run, straight, tmp_path):
    options = {"windows": False, "tokens": False, "weights": "random", "split": "val"}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        extract(config_of(run, tmp_path / name, seed=seed, **options))
    a, b, c = (read_features(tmp_path / name) for name in "abc")
    assert a.name == "random, seed 1"
    assert set(a.splits) == {"val"}
    assert np.array_equal(a.vectors, b.vectors)
    assert not np.allclose(a.vectors, c.vectors)
    trained = read_features(straight)
    assert not np.allclose(a.vectors, trained.vectors[[trained.ids.index(one) for one in a.ids]])
    assert a.contract["encoder_sha256"] != trained.contract["encoder_sha256"]


def test_crops_of_a_volume_do_not_depend_on_which_others_there_are(run, tmp_path):
    extract(config_of(run, tmp_path / "all", crops=3, tokens=False))
    extract(config_of(run, tmp_path / "some", crops=3, tokens=False, split="train", part_volumes=1, batch=1))
    alone = {row["id"]: row for row in pq.read_table(tmp_path / "some" / "features.parquet").to_pylist()}
    together = [row for row in pq.read_table(tmp_path / "all" / "features.parquet").to_pylist() if row["id"] in alone]
    assert len(together) == len(alone) > 1
    for row in together:
        assert row["windows"] == 3
        np.testing.assert_allclose(row["feature"], alone[row["id"]]["feature"], rtol=1e-5, atol=1e-6)


def test_volumes_are_resampled_to_the_spacing_that_is_asked_for(store, run, tmp_path):
    extract(
        config_of(run, tmp_path / "f", target_spacing_mm=(0.5, 1.0, 0.5), region="volume", tokens=False, split="val")
    )
    rows = pq.read_table(tmp_path / "f" / "windows.parquet").to_pylist()
    assert rows[0]["spacing_mm"] == [0.5, 1.0, 0.5]
    # 22 x 18 x 20 voxels of 2 x 1.5 x 1 mm become 88 x 27 x 40.
    assert np.max([row["origin_zyx"] for row in rows], axis=0).tolist() == [88 - 16, 27 - 16, 40 - 16]


def test_the_encoder_of_a_fine_tuning_run_and_max_pooling(store, straight, tmp_path):
    run = make_finetune_run(tmp_path / "run", store)
    config = config_of(run, tmp_path / "f", pool="max", split="val", store=store)
    extract(config)
    features = read_features(tmp_path / "f")
    assert features.contract["kind"] == "finetune"
    windows = pq.read_table(tmp_path / "f" / "windows.parquet").to_pylist()
    of_first = [row["feature"] for row in windows if row["id"] == features.ids[0]]
    assert np.array_equal(features.vectors[0], np.max(of_first, axis=0).astype(np.float32))


REFUSED = {
    "another intensity": ({"intensity": {"kind": "zscore", "window": None}}, "intensities are normalised by"),
    "other channels": ({"channels": 2}, r"trained on 2 channel\(s\), the store has 1"),
    "another spacing": (
        {"spacing_mm": [4.5, 1.5, 1.0]},
        r"10 of 10 volumes have voxels of another size .*\[4\.5, 1\.5, 1\] mm .*: 2 x 1\.5 x 1 mm\): "
        r"resample them with target_spacing_mm=\[4\.5, 1\.5, 1\], .* max_spacing_ratio=2",
    ),
}


@pytest.mark.parametrize(("contract", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_store_that_does_not_fit_the_weights_is_refused_in_words(store, tmp_path, contract, said):
    run = make_pretrain_run(tmp_path / "run", store, **contract)
    with pytest.raises(ConfigError, match=said):
        extract(config_of(run, tmp_path / "f"))


def test_volumes_of_another_spacing_are_taken_when_they_are_resampled_or_allowed(store, tmp_path):
    run = make_pretrain_run(tmp_path / "run", store, spacing_mm=[4.5, 1.5, 1.0])
    extract(config_of(run, tmp_path / "a", split="val", target_spacing_mm=(4.5, 1.5, 1.0)))
    extract(config_of(run, tmp_path / "b", split="val", max_spacing_ratio=3.0))
    a, b = read_features(tmp_path / "a"), read_features(tmp_path / "b")
    assert a.contract["trained_spacing_mm"] == b.contract["trained_spacing_mm"] == [4.5, 1.5, 1.0]
    assert not np.allclose(a.vectors, b.vectors)


def test_what_was_begun_with_other_settings_weights_or_volumes_is_not_mixed(run, straight, tmp_path, capsys):
    before = files_of(straight)
    with pytest.raises(ConfigError, match=r"settings\.overlap: 0\.0 -> 0\.5"):
        extract(config_of(run, straight, overlap=0.5))
    with pytest.raises(ConfigError, match=r"settings\.weights: 'trained' -> 'random'"):
        extract(config_of(run, straight, weights="random"))
    with pytest.raises(ConfigError, match="store_sha256"):
        extract(config_of(run, straight, store=make_cohort(tmp_path / "other", subjects=2)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"no features, and not empty \(it holds thesis\.tex\)"):
        extract(config_of(run, tmp_path / "full"))
    assert main(["extract", f"run_dir={run}", f"out={tmp_path / 'e'}", "split=test", "device=cpu"]) == 3
    assert "no volume with split=test" in capsys.readouterr().err
    assert main(["extract", f"run_dir={run}", f"out={tmp_path / 'e'}", "checkpoint=step_00000009"]) == 4
    assert files_of(straight) == before


def test_a_checkpoint_that_comes_between_two_tasks_changes_nothing(store, tmp_path, monkeypatch):
    run = make_pretrain_run(tmp_path / "run", store)
    config = config_of(run, tmp_path / "f")
    extract(replace(config, task="0/2"))
    newer = make_pretrain_run(tmp_path / "newer", store)
    (newer / "checkpoints" / "step_00000005").rename(run / "checkpoints" / "step_00000009")
    extract(replace(config, task="1/2"))
    extract(replace(config, merge=True))
    assert read_features(tmp_path / "f").contract["checkpoint"] == "step_00000005"
    assert (tmp_path / "f" / "features.parquet").stat().st_size > 0
    with pytest.raises(ConfigError, match="checkpoint: 'step_00000005' -> 'step_00000009'"):
        extract(replace(config, checkpoint="step_00000009"))
    # Also when the faster task writes the plan after this one has looked for it.
    looks = [lambda folder: None, read_plan]
    monkeypatch.setattr("mimscale.features.run.read_plan", lambda folder: looks.pop(0)(folder))
    assert extract(replace(config, task="0/2"))["checkpoint"] == "step_00000005"
