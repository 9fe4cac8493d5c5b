"""`mimscale bench train`, `memory` and `step` on sizes that take seconds: every number is there and adds up."""

import json
import subprocess
import sys
import warnings

import pytest
from benchmark_modules import benchmark
from rank_pool import run_ranks
from store_samples import make_store

from mimscale.bench.results import read_result
from mimscale.bench.scaling import efficiency_table

SMALL = [
    "crop_voxels=[16,16,16]",
    "patch_voxels=[8,8,8]",
    "model={dim: 48, depth: 2, heads: 4}",
    "mae={decoder_dim: 48, decoder_depth: 1, decoder_heads: 4}",
    "modality=null",
    "micro_batch=2",
]
SHORT = ["--steps=2", "--warmup=1", "--windows=2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), count=4, val_fraction=0.0)


def bench_train(store, run_dir, ranks):
    words = ["bench", "train", "demo/pretrain", f"store={store}", f"run_dir={run_dir}", *SMALL, *SHORT, "--json"]
    ended = run_ranks([*words, f"global_batch={4 * ranks}", "stream={workers: 1, crops_per_volume: 2}"], size=ranks)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return json.loads(ended[0].out.splitlines()[-1]), ended


@pytest.mark.two_process
def test_one_and_two_ranks_measure_three_modes_and_make_a_table_of_scaling(store, tmp_path):
    results = {}
    for ranks in (1, 2):
        result, ended = bench_train(store, tmp_path / str(ranks), ranks)
        assert all("{" not in rank.out for rank in ended[1:])  # rank 0 alone tells
        assert read_result(tmp_path / str(ranks)) == result
        assert (tmp_path / str(ranks) / "bench.png").stat().st_size > 1000
        assert "end to end" in (tmp_path / str(ranks) / "bench.md").read_text()
        results[ranks] = result
        assert set(result["modes"]) == {"synthetic", "loader", "end_to_end"}
        for name, mode in result["modes"].items():
            assert mode["samples_per_s"] > 0
            assert len(mode["windows_s"]) == 2
            if name != "loader":
                assert mode["step_p50_s"] <= mode["step_p95_s"] <= mode["step_max_s"]
                assert len(mode["data_wait_percent"]) == len(mode["memory"]) == ranks
        assert max(result["modes"]["synthetic"]["data_wait_percent"]) < 5
        assert result["utilisation"]["mfu"] is None  # no data sheet says what this CPU could
        assert 0 < result["utilisation"]["mfu_of_measured"] < 1
        assert result["utilisation"]["hfu_of_measured"] >= result["utilisation"]["mfu_of_measured"]
        assert result["end_to_end_of_smaller"] > 0
        assert result["verdict"]
    assert [row["ranks"] for row in efficiency_table(list(results.values()), kind="weak")] == [1, 2]


def test_a_job_on_this_machine_leaves_its_result_in_its_run_directory(tmp_path):
    run_dir = tmp_path / "run"
    words = ["demo/pretrain", f"run_dir={run_dir}", *SMALL, "global_batch=2", "--processes=1", "--wait"]
    command = [sys.executable, "-m", "mimscale.cli", "submit", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = read_result(run_dir)
    assert list(result["modes"]) == ["synthetic"]  # no store was given
    assert result["verdict"] == "synthetic only: no store was given"


@pytest.mark.two_process
def test_two_ranks_take_the_same_steps_and_the_slowest_counts(tmp_path):
    words = ["bench", "step", "demo/pretrain", *SMALL, "--no-compile", "--repeats=2", "--seconds=0.02"]
    ended = run_ranks([*words, "--json", f"--out={tmp_path}"])
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert ended[1].out == ""
    result = json.loads(ended[0].out.splitlines()[-1])
    assert read_result(tmp_path) == result
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert (result["ranks"], result["config"]["global_batch"]) == (2, 4)
    rows = {row["name"]: row for row in result["contenders"]}
    own = rows["mimscale"]
    assert own["samples_per_s"] == pytest.approx(4 / own["step_s"], rel=1e-2)
    assert own["energy_j_per_sample"] is None  # there is no GPU here
    assert result["utilisation"]["hfu_of_measured"] > result["utilisation"]["mfu_of_measured"] > 0


@pytest.mark.two_process
def test_what_two_ranks_hold_is_what_theory_says(tmp_path):
    out = tmp_path / "memory.json"
    # 4 M weights, so that tensors of a fixed size count for nothing.
    larger = ["model={dim: 240, depth: 4, heads: 4}", "engine={precision: bf16, zero_stage: 1}"]
    words = ["bench", "memory", "demo/pretrain", *SMALL, *larger, "--out", str(out), "--stages", "0", "1", "2"]
    ended = run_ranks(words)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    rows = json.loads(out.read_text())
    assert [(row["zero_stage"], row["precision"]) for row in rows] == [(0, "fp32"), (1, "bf16"), (2, "bf16")]
    by_stage = {row["zero_stage"]: max(row["bytes_of_rank"]) / row["parameters"] for row in rows}
    assert by_stage[0] == pytest.approx(16, rel=0.02)
    # Stage 1 drops the gradients of the other ranks' shares as soon as they are reduced, so it ends as stage 2 does.
    assert by_stage[1] == pytest.approx(2 + 1 + 6, rel=0.05)
    assert by_stage[2] == pytest.approx(2 + 1 + 6, rel=0.05)
    assert rows[1]["theory_bytes"] == rows[1]["parameters"] * 10


def bench_tiny_step(words):
    """In a process of its own: `bench_step.py WORDS` with a size that takes a second."""
    warnings.filterwarnings("ignore", "torch.meshgrid")  # MONAI calls it so
    bench_step = benchmark("bench_step")
    own = ["patch_voxels=[8,8,8]", "crop_voxels=[16,16,16]", "model={dim: 48, depth: 2, heads: 4}"]
    bench_step.SIZES["tiny"] = ([bench_step.MAE_RECIPE, *own, SMALL[3]], 2, 2)
    bench_step.SIZES["tiny SimMIM"] = ([bench_step.SIMMIM_RECIPE, *own], 2, 2)
    sys.argv = ["bench_step.py", *words]
    return bench_step.main()


def test_the_step_of_ours_and_of_its_peers_is_measured_against_its_products(tmp_path):
    words = [
        "--sizes",
        "tiny",
        "tiny SimMIM",
        "--quick",
        "--no-compile",
        "--repeats=2",
        "--seconds=0.01",
        f"--out={tmp_path}",
    ]
    (ended,) = run_ranks(words, size=1, body=bench_tiny_step)
    assert ended.code == 0, ended.err
    bench_step = benchmark("bench_step")
    (path,) = tmp_path.glob("step_unnamed_*.json")
    peers = [{bench_step.MONAI, bench_step.FULL}, {bench_step.SIMMIM}]
    for table, of_others in zip(json.loads(path.read_text())["tables"], peers, strict=True):
        rows = {row["name"]: row for row in table["contenders"]}
        assert set(rows) == {bench_step.PLAIN, bench_step.CEILING, bench_step.ENGINE.format(1)} | of_others
        assert all(row["step_s"] > 0 for row in rows.values())
        assert 0 < rows[bench_step.PLAIN]["of_ceiling"] < 1.5
        # The first loss of the plain step and of the engine come from the same weights, batch and masks.
        assert rows[bench_step.PLAIN]["loss"] == pytest.approx(rows[bench_step.ENGINE.format(1)]["loss"], rel=1e-5)
    assert path.with_suffix(".png").exists()
    assert "of ceiling" in path.with_suffix(".md").read_text()
