"""`submit bench`: one job a number of nodes, each with its folder and its global batch."""

import json

import pytest

from launch.folder import JobFolder
from launch.plan import make_plan, split_kind
from launch.profile import load_profile
from launch.submission import _task
from mimscale.bench.verbs import bench_config
from mimscale.cli import main
from mimscale.config import config_tree

PROFILE = "executor: slurm\naccelerator: cpu\nprocesses_per_node: 2\ntimeout_min: 20\nslurm: {partition: main}\n"


def submit(tmp_path, capsys, *words):
    profile = tmp_path / "site.yaml"
    profile.write_text(PROFILE)
    code = main(["submit", "bench", "demo/pretrain", *words, "--profile", str(profile), "--dry-run", "--json"])
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_each_number_of_nodes_is_a_job_with_its_share_of_a_growing_batch(tmp_path, capsys):
    code, plans, _ = submit(tmp_path, capsys, f"run_dir={tmp_path / 'scaling'}", "--nodes", "4,1,2")
    assert code == 0
    assert [plan["topology"]["nodes"] for plan in plans] == [1, 2, 4]
    assert [plan["topology"]["processes"] for plan in plans] == [2, 4, 8]
    assert [plan["config"]["global_batch"] for plan in plans] == [8, 16, 32]
    assert [plan["run_dir"] for plan in plans] == [str(tmp_path / "scaling" / f"nodes_000{n}") for n in (1, 2, 4)]
    assert all(f"--nodes={plan['topology']['nodes']}\n" in plan["sbatch"] for plan in plans)
    assert all(plan["estimate"] is None for plan in plans)  # it saves no checkpoint
    assert not (tmp_path / "scaling").exists()


def test_strong_scaling_keeps_the_global_batch(tmp_path, capsys):
    _, plans, _ = submit(tmp_path, capsys, f"run_dir={tmp_path / 'scaling'}", "--nodes", "1,2", "--strong")
    assert [plan["config"]["global_batch"] for plan in plans] == [8, 8]


@pytest.mark.parametrize("kind", ["step", "checkpoint", "train"])
def test_other_benchmarks_are_jobs_too(kind, tmp_path, capsys):
    run_dir = tmp_path / "bench"
    words = ["submit", "bench", kind, "demo/pretrain", f"run_dir={run_dir}", "--dry-run", "--profile", "local"]
    assert main(words) == 0
    assert f"# mimscale bench {kind}, job files in {run_dir}/logs" in capsys.readouterr().out
    plan = make_plan("bench", plain_config(run_dir), load_profile("local"), nodes=1, processes=2, kind=kind)
    assert _task(plan, JobFolder(run_dir / "logs" / "001"), None).arguments[:2] == ("bench", kind)


def plain_config(run_dir):
    config = bench_config(["demo/pretrain", f"run_dir={run_dir}", "global_batch=4"], needs_store=False)
    return config_tree(config)


def test_a_benchmark_without_a_kind_is_that_of_training():
    assert split_kind("bench", ["demo/pretrain", "a=b"]) == ("train", ["demo/pretrain", "a=b"])
    assert split_kind("bench", ["step", "demo/pretrain"]) == ("step", ["demo/pretrain"])
    assert split_kind("pretrain", ["step", "x"]) == (None, ["step", "x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "1,2"], "run_dir=DIR is missing"),
        (["--nodes", "1"], "run_dir=DIR is missing"),
        (["run_dir=x", "--nodes", "1,3", "--strong"], "does not divide among 6 ranks"),
        (["run_dir=x", "--nodes", "0,1"], "--nodes 0,1: each at least 1"),
    ],
)
def test_what_cannot_run_is_refused_before_any_job(words, message, tmp_path, capsys):
    code, plans, error = submit(tmp_path, capsys, *words)
    assert code == 2
    assert plans == []
    assert message in error


def test_several_numbers_of_nodes_are_for_bench_alone(tmp_path, capsys):
    words = ["submit", "pretrain", "demo/pretrain", f"store={tmp_path}", f"run_dir={tmp_path}/run", "--nodes", "1,2"]
    assert main([*words, "--dry-run"]) == 2
    assert "are for bench" in capsys.readouterr().err
