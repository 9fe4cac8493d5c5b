"""`bench compare`: what is slower beyond the spread, and what cannot be compared."""

import json

import pytest

from mimscale.bench.results import rates
from mimscale.cli import main


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


def test_the_json_names_rates_changes_and_what_else_differs(tmp_path, capsys):
    other = result(50.0, surroundings={"cpu": "another", "cores": 2, "versions": {"numpy": "3"}})
    assert compare(tmp_path, result(100.0), other, "--json") == 1
    tree = json.loads(capsys.readouterr().out)
    (row,) = tree["rows"]
    assert row["name"] == "tables / small / contenders / mimscale: samples_per_s"
    assert row["change_percent"] == -50.0
    assert row["slower"] is True
    assert tree["differences"] == ["cpu: one -> another", "numpy: 2 -> 3"]


def test_results_that_share_nothing_are_refused(tmp_path, capsys):
    assert compare(tmp_path, result(1.0), result(1.0, benchmark="stream")) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert compare(tmp_path, result(1.0), result(1.0, tables=[])) == 2
    assert "no rate in common" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_named(tmp_path, capsys):
    assert compare(tmp_path, {"schema_version": 99, "benchmark": "step"}, result(1.0)) == 2
    assert "a.json: no result of a benchmark with schema_version 1" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "none.json"), str(tmp_path / "b.json")]) == 2


def test_rows_are_told_apart_by_what_they_say_not_by_their_place():
    rows = [{"name": name, "mode": "random", "crops_per_s": 1, "spread_percent": 0} for name in "ab"]
    names = {rate.name for rate in rates({"contenders": rows})}
    assert names == {rate.name for rate in rates({"contenders": rows[::-1]})}
    assert names == {f"contenders / {name}, random: crops_per_s" for name in "ab"}
