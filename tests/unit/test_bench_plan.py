"""`mimscale plan`: what a run needs and how fast it goes, before any job."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimscale.bench.estimate import Assumptions, Cluster, Reading, best_interval_s, estimate, usable_bytes
from mimscale.bench.gpus import GPUS
from mimscale.bench.network import WeakStep, fit_scaling, traffic, transfer_s
from mimscale.cli import main
from mimscale.config import load_config
from mimscale.train.config import PretrainConfig
from mimscale.train.deepspeed_config import deepspeed_config
from mimscale.train.size import count_parameters

ON_A_NODE = Cluster(gpu_name="a100-80g", gpu=GPUS["a100-80g"], nodes=1, gpus_per_node=8)
USUAL = Assumptions()


def vit_b(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, "pretrain_mae_vit_b", ["store=none", "run_dir=none", *overrides])


def plan(capsys, *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["plan", *words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


def test_every_estimate_is_a_number_with_its_unit(capsys):
    code, result, _ = plan(capsys, "pretrain_mae_vit_b", "--nodes", "1", "--gpu", "a100-80g")
    assert code == 0
    assert result["parameters"] == count_parameters(vit_b())
    assert [row["zero_stage"] for row in result["memory"]["stages"]] == [0, 1, 2, 3]
    assert result["step"]["limit"] == "compute"
    assert result["whole_run"]["gpu_hours"] == pytest.approx(result["whole_run"]["days"] * 24 * 8)
    crop_bytes = 96**3 * 2
    loader = result["loader"]
    assert loader["gb_per_s_per_gpu"] == pytest.approx(loader["crops_per_s_per_gpu"] * crop_bytes / 1e9)
    assert loader["source"] is None


def test_the_step_of_one_gpu_is_its_products_at_the_share_of_the_peak_that_is_assumed():
    one = replace(ON_A_NODE, gpus_per_node=1)
    result = estimate(vit_b(), one, replace(USUAL, of_peak=0.5))
    hardware = result["flops_per_sample"]["total"]["hardware"]
    assert result["step"]["seconds"] == pytest.approx(256 * hardware / (0.5 * 312e12))
    assert result["step"]["network_s"] == 0
    assert result["step"]["mfu"] == pytest.approx(0.5 * result["flops_per_sample"]["total"]["training"] / hardware)


def test_the_mae_of_the_data_rate_table_needs_what_the_table_says():
    # ViT-B at 96^3 / 16^3 / 75 % with a decoder of 8 x 512 on an A100 at 40 %: about 1 870 crops/s and 3.3 GB/s.
    config = vit_b("mae={decoder_dim: 512, decoder_depth: 8, decoder_heads: 8, loss_on: all}")
    loader = estimate(config, replace(ON_A_NODE, gpus_per_node=1), replace(USUAL, of_peak=0.4))["loader"]
    assert loader["crops_per_s_per_gpu"] == pytest.approx(1873, rel=0.02)
    assert loader["gb_per_s_per_gpu"] == pytest.approx(3.3, rel=0.02)


@pytest.mark.parametrize(("crops_per_s", "limit"), [(10.0, "loader"), (1e6, "compute")])
def test_a_slow_store_is_named_as_the_limit(crops_per_s, limit):
    reading = Reading(crops_per_s=crops_per_s, file_bytes_per_crop=1e6, source="test")
    result = estimate(vit_b(), ON_A_NODE, USUAL, reading=reading)
    assert result["step"]["limit"] == limit
    assert result["loader"]["cores_per_gpu"] == math.ceil(result["loader"]["crops_per_s_per_gpu"] / crops_per_s)
    if limit == "loader":  # 8 workers of a GPU read its 32 crops
        assert result["step"]["seconds"] == pytest.approx(32 / (8 * crops_per_s))


def test_a_slow_network_is_named_as_the_limit():
    slow = replace(ON_A_NODE, nodes=2, gpu=replace(ON_A_NODE.gpu, network_gb_per_s=0.1))
    result = estimate(vit_b("global_batch=512"), slow, USUAL)
    assert result["step"]["limit"] == "network"
    by_nodes = {row["nodes"]: row["efficiency"] for row in result["scaling"]}
    assert by_nodes[2] < 0.1 < by_nodes[1]


def test_the_largest_micro_batch_fits_and_one_more_crop_does_not():
    assumptions = replace(USUAL, usable_memory=0.05)
    result = estimate(vit_b(), ON_A_NODE, assumptions)
    row = result["memory"]["stages"][1]
    assert row["largest_micro_batch"] > 32
    for micro_batch, fits in ((row["largest_micro_batch"], True), (row["largest_micro_batch"] + 1, False)):
        config = vit_b(f"micro_batch={micro_batch}", f"global_batch={8 * micro_batch}")
        assert estimate(config, ON_A_NODE, assumptions)["memory"]["stages"][1]["fits"] is fits


def test_recomputing_activations_takes_less_memory_and_more_time():
    plain, thrifty = (
        estimate(vit_b(f"model.checkpoint_activations={on}"), ON_A_NODE, USUAL) for on in ("false", "true")
    )
    assert thrifty["step"]["compute_s"] > plain["step"]["compute_s"]
    assert thrifty["memory"]["stages"][1]["peak"] < plain["memory"]["stages"][1]["peak"]
    for row in plain["memory"]["stages"]:
        assert row["activations_checkpointed"] < row["activations"]


def test_the_best_interval_loses_least():
    save_s, mtbf_s = 5.0, 86_400.0

    def lost(interval_s: float) -> float:
        return save_s / interval_s + interval_s / (2 * mtbf_s)

    best = best_interval_s(save_s, mtbf_s)
    assert best == pytest.approx(15.5 * 60, rel=0.01)
    assert lost(best) < min(lost(0.9 * best), lost(1.1 * best))


def test_more_nodes_fail_more_often():
    config = vit_b("global_batch=2048")
    one, four = (estimate(config, replace(ON_A_NODE, nodes=nodes), USUAL)["checkpoint"] for nodes in (1, 4))
    assert four["mtbf_h"] == pytest.approx(one["mtbf_h"] / 4)
    assert four["best_interval_s"] < one["best_interval_s"]


def test_a_save_that_outlasts_the_signal_lead_is_told(capsys):
    words = ["pretrain_mae_vit_l", "--nodes", "1", "--gpu", "h100", "--write-mb-per-s", "20"]
    assert main(["plan", *words]) == 0
    assert "TOO LATE" in capsys.readouterr().out


def test_what_a_rank_sends_by_stage():
    parameters = 1_000_000
    sent = [traffic(vit_b(f"engine.zero_stage={stage}"), parameters, 2, bf16=stage > 0) for stage in range(4)]
    # Gradients are summed in fp32; bf16 weights are gathered.
    assert [one.behind_backward + one.alone for one in sent] == [8e6, 6e6, 10e6, 16e6]
    assert sent[1].behind_backward == 0
    assert traffic(vit_b(), parameters, 1, bf16=True).behind_backward == 4e6


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_reductions_travel_behind_the_backward_pass_where_the_engine_overlaps_them(stage, micro_batches):
    config = vit_b(f"engine.zero_stage={stage}")
    engine = deepspeed_config(
        config.engine,
        precision="bf16",
        micro_batch=1,
        accumulation=micro_batches,
        world_size=2,
    )["zero_optimization"]
    assert (traffic(config, 100, micro_batches, bf16=True).behind_backward > 0) is engine["overlap_comm"]


def test_a_ring_is_as_slow_as_its_slowest_link():
    gpu = GPUS["l40s"]
    assert transfer_s(32e9, 1, 4, gpu) == pytest.approx(3 / 4)
    assert transfer_s(25e9, 2, 1, gpu) == pytest.approx(1 / 2)
    assert transfer_s(25e9, 2, 4, gpu) == pytest.approx(7 / 8)


def test_a_fit_finds_the_bandwidth_that_made_the_runs():
    sent, alone_s, gb_per_s = 4e9, 0.5, 10.0
    steps = [
        WeakStep(ranks, alone_s * crowding + sent / (gb_per_s * 1e9) * (ranks - 1) / ranks, crowding)
        for ranks, crowding in ((1, 1.0), (2, 1.0), (4, 2.0))  # the last on two cores
    ]
    fit = fit_scaling(steps, sent)
    assert (fit.alone_s, fit.gb_per_s) == (pytest.approx(alone_s), pytest.approx(gb_per_s))
    assert fit.worst_miss_percent == 0
    assert fit.exposed_s(sent, 64) == pytest.approx(0.4 * 63 / 64)


def test_runs_that_no_rank_slows_down_have_no_bandwidth():
    fit = fit_scaling([WeakStep(1, 1.0), WeakStep(2, 0.98), WeakStep(4, 1.98, 2.0)], 1e9)
    assert fit.gb_per_s is None
    assert fit.alone_s == pytest.approx(0.99)
    assert fit.worst_miss_percent == 1.0
    assert fit.exposed_s(1e9, 64) == 0


def scaling_file(folder: Path, step_s: dict[int, float]) -> Path:
    rows = [
        {"ranks": n, "nodes": n, "global_batch": 8 * n, "modes": {"synthetic": {"samples_per_s": 8 * n / seconds}}}
        for n, seconds in step_s.items()
    ]
    path = folder / "scaling.json"
    path.write_text(json.dumps({"schema_version": 1, "benchmark": "scaling", "scaling": {"weak": rows}}))
    return path


def test_measured_runs_replace_the_assumed_network(capsys, tmp_path):
    words = ["pretrain_mae_vit_b", "--nodes", "1", "--gpu", "a100-80g"]
    measured = scaling_file(tmp_path, {1: 1.0, 2: 1.5, 4: 1.75})
    _, result, _ = plan(capsys, *words, "--scaling", str(measured))
    assert result["scaling_fit"]["ranks"] == [1, 2, 4]
    assert result["step"]["network_s"] == pytest.approx(1.0 * 7 / 8)
    assert main(["plan", *words, "--scaling", str(measured)]) == 0
    assert "fitted to runs on 1, 2, 4 ranks on 4 node(s)" in capsys.readouterr().out


def test_a_recorded_result_of_scaling_knows_its_own_recipe(capsys):
    measured = Path(__file__).parents[2] / "benchmarks" / "results" / "scaling_epyc_2core_202611.json"
    words = ["pretrain_mae_vit_b", "--nodes", "1", "--gpu", "a100-80g", "--scaling", str(measured)]
    code, result, error = plan(capsys, *words)
    assert code == 0, error
    assert result["scaling_fit"]["ranks"] == [1, 2, 4]
    assert result["scaling_fit"]["nodes"] == 1


STREAM_RESULT = str(Path(__file__).parents[2] / "benchmarks" / "results" / "stream_epyc_2core_202611.json")
BAD = {
    "no recipe": (["no_such_recipe", "--gpu", "h100"], "no such file and no packaged recipe"),
    "unknown gpu": (["demo/pretrain", "--gpu", "h1000"], "known are a40, a100-40g, a100-80g, a100-pcie, h100"),
    "nodes": (["pretrain_mae_vit_b", "--gpu", "h100", "--nodes", "3"], "legal numbers of nodes are 1"),
    "zero nodes": (["demo/pretrain", "--gpu", "h100", "--nodes", "0"], "must be at least 1"),
    "batch": (["demo/pretrain", "--gpu", "h100", "global_batch=7"], "global_batch=7 is no multiple of micro_batch=2"),
    "share": (["demo/pretrain", "--gpu", "h100", "--of-peak", "1.5"], "a share at most 1"),
    "scaling": (["demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", "--scaling", "/none"], "cannot be read"),
    "benchmarks": (
        ["demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", "--stream-result", STREAM_RESULT],
        "of benchmarks/, not of one store",
    ),
    "stream": (["demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", "--stream-result", "/none"], "bench stream"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_a_plan_that_cannot_be_made_says_why(capsys, words, said):
    code, _, error = plan(capsys, *words)
    assert code == 2
    assert said in error


def test_a_store_that_does_not_exist_is_named(capsys):
    code, _, error = plan(capsys, "demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", "store=/no/store")
    assert code == 3
    assert "/no/store" in error


def test_a_model_that_fits_nowhere_says_by_how_much_and_what_would(capsys):
    huge = ["pretrain_mae_vit_b", "--gpu", "l40s", "--gpus-per-node", "1", "micro_batch=1", "global_batch=1"]
    huge += ["model={dim: 3072, depth: 40, heads: 24}"]
    code, _, error = plan(capsys, *huge)
    assert code == 2
    limit_gb = usable_bytes(GPUS["l40s"], USUAL) / 1e9
    assert "fits on no ZeRO stage" in error
    assert f"more than the {limit_gb:.1f} GB that l40s has" in error
    assert "--gpu a100-80g or a100-pcie or h100" in error


def test_a_recorded_result_is_named_and_taken(capsys, tmp_path):
    path = tmp_path / "stream.json"
    tree = {
        "schema_version": 1,
        "benchmark": "stream",
        "config": {"crop_voxels": [48, 48, 48]},
        "surroundings": {"cpu": "Some CPU"},
        "contenders": [{"name": "mimscale", "file_bytes": 50_000}],
        "loader": [{"workers": 0, "crops_per_s": 900.0}, {"workers": 1, "crops_per_s": 700.0}],
    }
    path.write_text(json.dumps(tree))
    words = ["demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", "--stream-result", str(path)]
    _, result, _ = plan(capsys, *words)
    assert result["loader"]["crops_per_s_per_core"] == 700
    assert result["loader"]["source"] == f"recorded in {path}: the loader with one worker on Some CPU"


def test_a_recorded_result_of_other_crops_is_refused(capsys, tmp_path):
    path = tmp_path / "stream.json"
    tree = {"schema_version": 1, "benchmark": "stream", "contenders": [], "config": {"crop_voxels": [32, 32, 32]}}
    path.write_text(json.dumps(tree))
    code, _, error = plan(
        capsys, "demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", "--stream-result", str(path)
    )
    assert code == 2
    assert "measured with crop_voxels=[32, 32, 32], the run has [48, 48, 48]" in error


@pytest.mark.parametrize("benchmark", ["stream", "scaling"])
@pytest.mark.parametrize("version", [2, None])
def test_a_result_of_another_schema_version_is_refused_by_its_number(capsys, tmp_path, benchmark, version):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"schema_version": version, "benchmark": benchmark, "contenders": [], "scaling": {}}))
    option = {"stream": "--stream-result", "scaling": "--scaling"}[benchmark]
    code, _, error = plan(capsys, "demo/pretrain", "--gpu", "h100", "--gpus-per-node", "1", option, str(path))
    assert code == 2
    assert (
        f"{path}: schema_version {version}, and this mimscale reads 1; run `mimscale bench {benchmark}` again" in error
    )
