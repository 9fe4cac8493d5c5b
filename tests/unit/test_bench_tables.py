"""Arithmetic of benchmarks: efficiency, blame, theory of memory, exponents of growth, utilisation."""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mimscale.bench import hardware, memory, simulate, step
from mimscale.bench.scaling import efficiency_table, foretold, kind_of, ranks_text
from mimscale.bench.training import blame
from mimscale.bench.verbs import bench_config
from mimscale.cli import main
from mimscale.config import recipe_text
from mimscale.errors import ConfigError
from mimscale.world import World


def test_a_run_directory_that_the_recipe_or_the_command_line_names_is_kept(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text("demo/pretrain") + "run_dir: /runs/a\nstore: /stores/a\n")
    config = bench_config([str(recipe)], needs_store=False)
    assert (str(config.run_dir), str(config.store)) == ("/runs/a", "/stores/a")
    config = bench_config([str(recipe), "run_dir=/runs/b"], needs_store=False)
    assert (str(config.run_dir), str(config.store)) == ("/runs/b", "/stores/a")
    config = bench_config(["demo/pretrain"], needs_store=False)
    assert (str(config.run_dir), str(config.store)) == ("none", "none")
    with pytest.raises(ConfigError, match="store: missing"):
        bench_config(["demo/pretrain"])


def test_the_help_says_what_each_kind_takes_and_what_training_measures_without_a_store(capsys):
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert "mimscale bench memory RECIPE [key=value ...] --out FILE [--stages N ...]" in text
    assert "mimscale bench simulate [--nodes N] [--volumes N] [--json] [--out FOLDER]" in text
    with pytest.raises(SystemExit):
        main(["bench", "train", "--help"])
    assert "Without store=STORE there is nothing to load" in " ".join(capsys.readouterr().out.split())


def result(ranks, samples_per_s, global_batch):
    mode = {"samples_per_s": samples_per_s, "spread_percent": 1.0, "data_wait_percent": [1.0, 2.0]}
    return {
        "ranks": ranks,
        "nodes": ["a"],
        "device": "cpu",
        "threads": 1,
        "surroundings": {"cores_used": [0, 1]},
        "config": {"global_batch": global_batch},
        "modes": {"synthetic": mode},
        "utilisation": {"mfu": None},
        "verdict": "limited by the step",
    }


def test_weak_scaling_is_the_rate_by_ranks_over_that_of_one():
    rows = efficiency_table([result(2, 15.0, 16), result(1, 10.0, 8)], kind="weak")
    assert [row["ranks"] for row in rows] == [1, 2]
    assert [row["modes"]["synthetic"]["efficiency"] for row in rows] == [1.0, 0.75]


def test_a_fit_that_knows_which_ranks_share_a_core_foretells_the_largest_number():
    # A step of 0.4 s alone, and a wait of 0.1 s x (n - 1) / n; four ranks of two cores compute in turns.
    step_s = {1: 0.4, 2: 0.45, 4: 2 * 0.4 + 0.075}
    rows = efficiency_table([result(n, 8 * n / seconds, 8 * n) for n, seconds in step_s.items()], kind="weak")
    assert [row["ranks_a_core"] for row in rows] == [1, 1, 2]
    assert [ranks_text(row) for row in rows] == ["1", "2", "4 (2 a core)"]
    text = foretold({"scaling": {"weak": rows}})
    assert "fit of the synthetic step to 1 and 2 ranks" in text
    assert "foretells 875 ms a step for 4 ranks, 2 of which share a core, and 875 ms were measured" in text
    assert foretold({"scaling": {"weak": rows[:2]}}) == foretold({"scaling": {"strong": rows}}) == ""
    on_gpus = {**result(4, 30.0, 32), "device": "NVIDIA H200"}
    assert efficiency_table([result(1, 8.0, 8), on_gpus], kind="weak")[1]["ranks_a_core"] == 1


def test_strong_scaling_keeps_the_batch_and_counts_from_the_fewest_ranks():
    results = [result(2, 10.0, 8), result(8, 30.0, 8)]
    assert kind_of(results) == "strong"
    rows = efficiency_table(results, kind="strong")
    assert rows[1]["modes"]["synthetic"]["efficiency"] == 0.75


@pytest.mark.parametrize("results", [[result(1, 1.0, 8)], [result(1, 1.0, 8), result(1, 1.0, 8)]])
def test_scaling_needs_two_numbers_of_ranks(results):
    with pytest.raises(ConfigError, match="two or more different numbers of ranks"):
        efficiency_table(results, kind="weak")


def test_batches_that_do_not_fit_the_kind_are_refused():
    with pytest.raises(ConfigError, match="needs 16"):
        efficiency_table([result(1, 1.0, 8), result(2, 2.0, 24)], kind="weak")


def modes(step, loader, both, wait):
    return {
        "synthetic": {"samples_per_s": step},
        "loader": {"samples_per_s": loader},
        "end_to_end": {"samples_per_s": both, "data_wait_percent": [0.1, wait]},
    }


@pytest.mark.parametrize(
    ("rates", "part", "words"),
    [
        ((10.0, 50.0, 9.8, 1.0), 0.98, "limited by the step"),
        ((50.0, 10.0, 9.8, 80.0), 0.98, "limited by the loader"),
        ((10.0, 12.0, 7.0, 30.0), 0.7, "the loader: ranks wait 30 %"),
        ((10.0, 12.0, 7.0, 1.0), 0.7, "the step: it does not wait"),
    ],
)
def test_what_end_to_end_loses_is_blamed_on_the_part_that_loses_it(rates, part, words):
    assert blame(modes(*rates))[0] == part
    assert words in blame(modes(*rates))[1]


@pytest.mark.parametrize(
    ("stage", "ranks", "bf16", "bytes_a_parameter"),
    [(0, 4, True, 16), (1, 4, True, 7), (2, 4, True, 5.5), (3, 4, True, 4), (1, 1, True, 16), (0, 2, False, 16)],
)
def test_theory_is_16_bytes_a_parameter_less_what_is_sharded(stage, ranks, bf16, bytes_a_parameter):
    assert memory.theory_bytes(1000, stage, ranks, bf16=bf16) == 1000 * bytes_a_parameter


def rows_growing(exponent):
    return [
        {"part": "p", "ranks": ranks, "seconds": 0.01 * ranks**exponent, "peak_bytes": 1000} for ranks in (8, 64, 512)
    ]


def test_growth_faster_than_linear_is_found_and_slower_is_not():
    assert simulate.exponents(rows_growing(2), "ranks") == {"p": {"seconds": 2.0, "bytes": 0.0}}
    assert simulate.worse_than_linear(simulate.exponents(rows_growing(2), "ranks")) == ["p"]
    assert simulate.worse_than_linear(simulate.exponents(rows_growing(1), "ranks")) == []


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("A100-SXM4-80GB", 312e12, 19.5e12),  # as older drivers say it
        ("NVIDIA A40", 149.7e12, 37.4e12),
        ("NVIDIA RTX A6000", 154.8e12, 38.7e12),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA A40-48Q", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("cpu", None, None),
    ],
)
def test_a_devices_peak_follows_from_its_whole_name_and_the_type_of_the_products(name, bf16, fp32):
    assert hardware.peak_flops_per_s(name, torch.bfloat16) == bf16
    assert hardware.peak_flops_per_s(name, torch.float32) == fp32
    assert hardware.peak_flops_per_s(name, torch.float64) is None


@pytest.mark.parametrize(("dtype", "mfu"), [(torch.bfloat16, 0.5), (torch.float32, 8.0)])
def test_mfu_is_flops_over_seconds_peak_of_the_type_and_devices(dtype, mfu):
    use = hardware.utilisation(
        flops=312e12,
        hardware_flops=624e12,
        seconds=2.0,
        devices=1,
        name="NVIDIA A100-SXM4-80GB",
        dtype=dtype,
        measured=624e12,
    )
    assert (use["mfu"], use["hfu"], use["mfu_of_measured"]) == (mfu, 2 * mfu, 0.25)


class FakeNvml(ModuleType):
    """NVML of a machine with one GPU, which counts in millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__("pynvml")
        self.problem = problem

    def nvmlInit(self):
        if self.problem is not None:
            raise self.problem

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-8f6d": "handle"}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        return 12_500


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8f6d"))
    return torch.device("cuda", 0)


def test_energy_is_what_nvml_counts_of_the_visible_device_in_joules(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert hardware.energy_j(gpu) == 12.5
    assert hardware.energy_j(torch.device("cpu")) is None


@pytest.mark.parametrize("nvml", [None, FakeNvml(FakeNvml.NVMLError("driver not loaded"))], ids=["missing", "broken"])
def test_without_nvml_there_is_no_energy(gpu, monkeypatch, nvml):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: importing it fails
    assert hardware.energy_j(gpu) is None


def test_energy_of_a_sample_is_that_of_all_ranks_by_their_samples(monkeypatch):
    counted_j = itertools.count(step=6.0)  # each look finds six joules more
    monkeypatch.setattr(hardware, "energy_j", lambda device: next(counted_j))
    world = World(rank=0, size=2, local_rank=0, local_size=2, node="a")
    ranks = SimpleNamespace(device=torch.device("cpu"), world=world, is_first=True, gather=lambda own: [own, own])
    setting = step.Setting(bench_config(["demo/pretrain", "micro_batch=4"], needs_store=False), 1, ranks)
    contenders = {step.PLAIN: lambda setting: lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).sum()}
    rows, _ = step.measure_steps(setting, contenders, repeats=1, round_s=1e-9)
    assert rows[0]["energy_j_per_sample"] == 2 * 6.0 / (2 * 4)
