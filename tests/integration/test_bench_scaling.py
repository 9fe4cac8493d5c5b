"""`mimscale bench scaling`, and the programs of `benchmarks/` that keep results, on sizes that take seconds."""

import sys

import pytest
from benchmark_modules import benchmark
from rank_pool import run_ranks

from mimscale.bench import scaling
from mimscale.bench.results import read_result
from mimscale.cli import main
from mimscale.errors import LaunchError

CROPS = ["crop_voxels=[16,16,16]", "patch_voxels=[8,8,8]", "micro_batch=2", "global_batch=4"]
MODEL = ["model={dim: 48, depth: 1, heads: 4}", "mae={decoder_dim: 48, decoder_depth: 1, decoder_heads: 4}"]
pytestmark = pytest.mark.two_process


def run_in_the_pool(words, count, threads):
    """What `scaling.run_ranks` does, without the ten seconds that torchrun takes to import torch."""
    assert threads == 1
    ended = run_ranks(["bench", *words], size=count)
    assert [rank.code for rank in ended] == [0] * count, ended[0].err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The run directory of `bench scaling` on one and two ranks."""
    run_dir = tmp_path_factory.mktemp("scaling") / "run"
    words = ["bench", "scaling", "demo/pretrain", *CROPS, *MODEL, f"run_dir={run_dir}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "run_ranks", run_in_the_pool)
        patch.setattr(scaling, "STAGES", (0, 1))
        assert main([*words, "--ranks", "1", "2", "--memory-ranks", "2", "--steps=2", "--windows=2"]) == 0
    return run_dir


def test_one_and_two_ranks_become_tables_in_the_run_directory(measured):
    """`run_dir=` was passed over: without --out the tables went to the terminal alone."""
    result = read_result(measured)
    assert sorted(path.name for path in measured.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert {kind: [row["ranks"] for row in rows] for kind, rows in result["scaling"].items()} == {
        "weak": [1, 2],
        "strong": [1, 2],
    }
    assert [row["global_batch"] for row in result["scaling"]["weak"]] == [4, 8]
    assert [row["global_batch"] for row in result["scaling"]["strong"]] == [4, 4]
    for one, two in result["scaling"].values():
        rates = [row["modes"]["synthetic"]["samples_per_s"] for row in (one, two)]
        assert one["modes"]["synthetic"]["efficiency"] == 1
        assert two["modes"]["synthetic"]["efficiency"] == pytest.approx(rates[1] / rates[0] / 2, abs=0.001)
    assert [(row["zero_stage"], len(row["bytes_of_rank"])) for row in result["memory"]] == [(0, 2), (1, 2)]
    assert all(min(row["bytes_of_rank"]) > 8 * row["parameters"] for row in result["memory"])
    text = (measured / "bench.md").read_text()
    assert "Weak scaling" in text
    assert "Strong scaling" in text
    assert f"({100 * result['scaling']['weak'][1]['modes']['synthetic']['efficiency']:.0f} %)" in text
    assert "| 1 | 2 | bf16 |" in text


def test_a_rank_that_fails_ends_the_benchmark_of_scaling():
    with pytest.raises(LaunchError, match=r"bench train on 1 rank\(s\) ended with 1; its output stands above"):
        scaling.run_ranks(["train", "no_such_recipe"], 1, 1)


def test_the_benchmark_of_training_trains_on_its_own_store_and_keeps_both_results(measured, tmp_path, monkeypatch):
    bench, tables = benchmark("bench_training"), read_result(measured)
    asked = {}

    def scaling_again(config, counts, *, steps, windows, threads):
        asked.update(counts=counts, steps=steps, windows=windows, store=(config.store / "store.json").exists())
        return tables["scaling"]

    monkeypatch.setattr(scaling, "run_ranks", run_in_the_pool)
    monkeypatch.setattr(scaling, "measure_scaling", scaling_again)  # measured above
    monkeypatch.setattr(scaling, "measure_memory", lambda config, counts, threads: tables["memory"])
    monkeypatch.setattr(bench, "VOLUMES", 2)
    monkeypatch.setattr(bench, "SETTINGS", CROPS)
    monkeypatch.setattr(bench, "SMALL", MODEL)
    words = ["--steps=1", "--windows=2", "--ranks", "2", "1", "--edge=40", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *words])
    monkeypatch.setattr(bench, "STREAM", "stream={workers: 1, crops_per_volume: 4}")
    assert bench.main() == 0
    assert asked == {"counts": [1, 2], "steps": 1, "windows": 2, "store": True}
    (train,) = tmp_path.glob("train_unnamed_*.json")
    result = read_result(train)
    assert set(result["modes"]) == {"synthetic", "loader", "end_to_end"}
    assert all(mode["samples_per_s"] > 0 for mode in result["modes"].values())
    assert (result["config"]["store"], result["windows"]["count"]) == ("synthetic", 2)
    (kept,) = tmp_path.glob("scaling_unnamed_*.json")
    assert read_result(kept)["scaling"] == tables["scaling"]
    assert read_result(kept)["settings"]["edge"] == 40
    assert kept.with_suffix(".png").stat().st_size > 1000
    assert "Weak scaling" in kept.with_suffix(".md").read_text()
    assert "end to end" in train.with_suffix(".md").read_text()


def test_a_verbs_result_is_kept_beside_those_of_the_other_benchmarks(tmp_path, monkeypatch, capfd):
    words = ["checkpoint", "demo/pretrain", *MODEL, "--repeats=1", f"--folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["bench_verbs.py", "--hardware=test", f"--out={tmp_path}", *words])
    assert benchmark("bench_verbs").main() == 0
    (path,) = tmp_path.glob("checkpoint_test_*.json")
    result = read_result(path)
    assert result["repeats"] == 1
    assert result["surroundings"]["commit"]
    text = path.with_suffix(".md").read_text()
    assert f"# bench {' '.join(words)}: {result['surroundings']['cpu']}, " in text
    assert "a copy in memory" in text
    assert text in capfd.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_verb_that_measures_nothing_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_verbs.py", f"--out={tmp_path}", "simulate", "--nodes=2"])
    assert benchmark("bench_verbs").main() == 2
    assert list(tmp_path.iterdir()) == []
