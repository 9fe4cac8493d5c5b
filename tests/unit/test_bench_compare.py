"""`bench compare`: what is worse beyond the spread, what was measured on other work, and what cannot be compared."""

import json
from pathlib import Path

import pytest

from mimscale.bench.compare import compare as compared
from mimscale.bench.compare import differences, other_work
from mimscale.bench.figures import LESS_IS_BETTER, MORE_IS_BETTER, figures, spread_percent
from mimscale.cli import main

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Estimates beside what was measured are no figures: one that is off by as much either way is no slower.
RECORDED = sorted(path for path in RESULTS.glob("*.json") if not path.name.startswith("plan_"))


def result(per_s, spread=4.0, **more):
    row = {"name": "mimscale", "samples_per_s": per_s, "spread_percent": spread}
    return {
        "schema_version": 1,
        "benchmark": "step",
        "surroundings": {"cpu": "one", "cores": 2, "versions": {"numpy": "2"}},
        "tables": [{"setting": "small", "contenders": [row]}],
        **more,
    }


def compare(tmp_path, before, after, *words):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, tree in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(tree))
    return main(["bench", "compare", *map(str, paths), *words])


@pytest.mark.parametrize(("after", "code"), [(100.0, 0), (97.0, 0), (95.0, 1), (140.0, 0)])
def test_only_what_is_slower_than_both_spreads_allow_is_flagged(after, code, tmp_path, capsys):
    assert compare(tmp_path, result(100.0, 4.0), result(after, 4.0)) == code
    assert ("slower |" in capsys.readouterr().out) == bool(code)


def test_a_wide_spread_hides_a_loss_that_a_narrow_one_shows(tmp_path):
    assert compare(tmp_path, result(100.0, 1.0), result(90.0, 1.0)) == 1
    assert compare(tmp_path, result(100.0, 15.0), result(90.0, 15.0)) == 0


def test_the_json_names_figures_changes_and_what_else_differs(tmp_path, capsys):
    other = result(50.0, surroundings={"cpu": "another", "cores": 2, "versions": {"numpy": "3"}, "nccl": "2.27"})
    assert compare(tmp_path, result(100.0), other, "--json") == 1
    tree = json.loads(capsys.readouterr().out)
    (row,) = tree["rows"]
    assert row["name"] == "tables / small / contenders / mimscale: samples_per_s"
    assert row["change_percent"] == -50.0
    assert (row["slower"], row["spread_assumed"]) == (True, False)
    assert tree["differences"] == ["cpu: one -> another", "nccl: None -> 2.27", "numpy: 2 -> 3"]
    assert tree["other_work"] == []


def test_results_that_share_nothing_are_refused(tmp_path, capsys):
    assert compare(tmp_path, result(1.0), result(1.0, benchmark="stream")) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert compare(tmp_path, result(1.0), result(1.0, tables=[])) == 2
    assert "no figure in common" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_named(tmp_path, capsys):
    assert compare(tmp_path, {"schema_version": 99, "benchmark": "step"}, result(1.0)) == 2
    assert "a.json: no result of a benchmark with schema_version 1" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "none.json"), str(tmp_path / "b.json")]) == 2


def test_rows_are_told_apart_by_what_they_say_not_by_their_place():
    rows = [{"name": name, "mode": "random", "crops_per_s": 1, "spread_percent": 0} for name in "ab"]
    names = {figure.name for figure in figures({"contenders": rows})}
    assert names == {figure.name for figure in figures({"contenders": rows[::-1]})}
    assert names == {f"contenders / {name}, random: crops_per_s" for name in "ab"}


def test_repeats_are_a_median_and_a_spread_and_one_of_them_has_none():
    (stall, load) = figures({"stall_s": {"sync": [1.0, 2.0, 1.5]}, "load_s": [0.5]})
    assert (stall.name, stall.value, stall.is_assumed) == ("stall_s sync", 1.5, False)
    assert stall.spread_percent == pytest.approx(100 / 1.5)
    assert (load.value, load.is_assumed, load.spread_percent) == (0.5, True, 30.0)
    assert spread_percent([3.0]) is None
    (once,) = figures({"name": "a", "samples_per_s": 3.0, "spread_percent": 0.0})  # of one window
    assert once.is_assumed


def test_seconds_and_bytes_are_worse_when_they_grow():
    def growth(seconds, peak_bytes):
        row = {"part": "plan", "ranks": 8, "seconds": seconds, "spread_percent": 10.0, "peak_bytes": peak_bytes}
        return result(1.0, benchmark="simulate", tables=[], by_ranks=[row])

    for after, worse in (((1.05, 100), []), ((1.2, 105), ["seconds"]), ((0.5, 120), ["peak_bytes"])):
        rows = compared(growth(1.0, 100), growth(*after))
        assert [row["name"].rpartition(" ")[2] for row in rows if row["slower"]] == worse


def test_a_slower_ceiling_is_the_machines_and_no_regression(tmp_path, capsys):
    before = result(1.0, ceiling_s={"copy": [1.0, 1.1]})
    assert compare(tmp_path, before, result(1.0, ceiling_s={"copy": [2.0, 2.1]})) == 0
    assert "slower: the machine |" in capsys.readouterr().out


def with_settings(batch, **more):
    table = result(10.0)["tables"][0]
    config = {"global_batch": batch, "steps": 100, "run_dir": f"/runs/{batch}", "model": {"dim": 768}}
    return result(10.0, tables=[{**table, "config": config, "threads": 2, "dtype": "float32", **more}])


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (with_settings(2), "tables / small / config.global_batch: 16 -> 2"),
        (with_settings(16, threads=1), "tables / small / threads: 2 -> 1"),
        (with_settings(16, dtype="bfloat16"), "tables / small / dtype: float32 -> bfloat16"),
        (with_settings(16, config={"model": {"dim": 384}}), "tables / small / config.model.dim: 768 -> 384"),
    ],
)
def test_figures_of_other_work_are_refused_by_name_and_compared_only_anyway(after, said, tmp_path, capsys):
    assert compare(tmp_path, with_settings(16), after) == 2
    assert f"have measured different work:\n  {said}\n" in capsys.readouterr().err
    assert compare(tmp_path, with_settings(16), after, "--anyway") == 0
    assert f"other work: {said}\n" in capsys.readouterr().out


def test_settings_that_leave_the_work_as_it_is_are_listed():
    before, after = with_settings(16), with_settings(16)
    after["tables"][0]["config"] |= {"steps": 200, "run_dir": "/elsewhere", "engine": {"zero_stage": 3}}
    assert other_work(before, after) == []
    assert differences(before, after) == [
        "tables / small / config.engine.zero_stage: (not there) -> 3",
        "tables / small / config.steps: 100 -> 200",
    ]


def worsened(tree):
    """The same result with every figure half as good."""
    if isinstance(tree, list):
        return [worsened(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: halved(value, 2.0) if key in LESS_IS_BETTER else halved(value, 0.5) if key in MORE_IS_BETTER else item
        for key, value in tree.items()
        for item in [value if key in ("config", "exponents") else worsened(value)]
    }


def halved(value, factor):
    if isinstance(value, dict):
        return {key: halved(item, factor) for key, item in value.items()}
    return [item * factor for item in value] if isinstance(value, list) else value * factor


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_each_recorded_result_equals_itself_and_a_worse_one_is_found(path, tmp_path, capsys):
    tree = json.loads(path.read_text())
    names = [figure.name for figure in figures(tree)]
    assert len(names) == len(set(names)) > 0
    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert f"0 of {len(names)} figures are worse" in capsys.readouterr().out
    assert compare(tmp_path, tree, worsened(tree)) == 1
    assert compare(tmp_path, worsened(tree), tree) == 0
