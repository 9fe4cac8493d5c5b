"""The recorded comparison of the planner's estimates with measurements: of today's formulas, and within its limits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from mimscale.bench import peak, shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench_plan():
    sys.path.insert(0, str(BENCHMARKS))  # as for a script that lies there
    spec = importlib.util.spec_from_file_location("bench_plan", BENCHMARKS / "bench_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def recorded():
    """(what, name) -> row, of the newest result."""
    files = [path for path in BENCHMARKS.glob("results/plan_*.json") if "-quick_" not in path.name]
    trees = [json.loads(path.read_text()) for path in files]
    newest = max(trees, key=lambda tree: tree["surroundings"]["time"])
    return {(row["what"], row["name"]): row for row in newest["rows"]}


def test_the_recorded_sizes_are_those_that_the_planner_says_today(recorded):
    for name in shapes.RECIPES:
        config = shapes.config_of(name)
        sizes = shapes.planned_sizes(config)
        assert recorded["parameters", name]["estimate"] == pytest.approx(sizes.parameters / 1e6, rel=1e-5)
        assert recorded["FLOPs of a sample", name]["estimate"] == pytest.approx(sizes.flops / 1e9, rel=1e-5)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            row = recorded[f"kept activations of a sample, {precision}", name]
            assert row["estimate"] == pytest.approx(shapes.planned_kept_bytes(config, dtype) / 1e6, rel=1e-5)


def test_the_recorded_memory_is_what_the_planner_says_today(bench_plan, recorded):
    for ranks, cases in peak.CASES.items():
        for case, trees in cases.items():
            for tree in trees:
                estimates = peak.against_estimates(tree, ranks, {"peak": 1, "saved": 1})
                for kind, (estimate, _) in estimates.items():
                    row = recorded[bench_plan.title_of(kind, ranks, case), f"ZeRO-{tree['engine']['zero_stage']}"]
                    assert row["estimate"] == pytest.approx(estimate / 1e6, rel=1e-5)


def test_what_was_asked_of_the_estimates_holds_in_the_recorded_run(recorded):
    limits = {what.split(",")[0]: row["most_miss"] for (what, _), row in recorded.items()}
    assert limits["parameters"] == 0
    assert limits["FLOPs of a sample"] == 0.02
    assert limits["peak of a rank"] == limits["files of a checkpoint"] == limits["a checkpoint on disk"] == 0.1
    assert [row for row in recorded.values() if row["holds"] is False] == []


@pytest.mark.parametrize(
    ("estimate", "most_miss", "holds"), [(1.09, 0.1, True), (1.11, 0.1, False), (0.89, 0.1, False), (3.0, None, None)]
)
def test_an_estimate_holds_within_its_limit_of_what_was_measured(bench_plan, estimate, most_miss, holds):
    row = bench_plan.row("what", "name", "MB", estimate * 50, 50, most_miss)
    assert (row["ratio"], row["holds"]) == (estimate, holds)
