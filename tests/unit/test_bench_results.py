"""Where the result of a benchmark goes, and what a row of it may be called."""

import json
from pathlib import Path

import pytest

from mimscale.bench import scaling, simulate
from mimscale.bench.charts import Bars, draw_bars
from mimscale.bench.compiled import Fallbacks, reason_of
from mimscale.bench.results import read_result, shown_name, tell
from mimscale.cli import main

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RESULT = {"schema_version": 1, "benchmark": "step", "rows": [1, 2]}


def as_text(result):
    return f"rows {result['rows']}"


def draw(result, path):
    draw_bars([Bars(title="rows", unit="1", rows=[("mimscale", 1.0), ("ceiling", 2.0), ("other", 0.5)])], path)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_is_printed_and_written_as_table_json_and_chart(as_json, tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    tell(RESULT, as_text, draw, as_json=as_json, folder=folder)
    printed = capsys.readouterr().out
    assert json.loads(printed) == RESULT if as_json else printed == "rows [1, 2]\n"
    assert read_result(folder) == RESULT
    assert "rows [1, 2]" in (folder / "bench.md").read_text()
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_recorded_result_of_scaling_and_one_of_growth_are_drawn(tmp_path):
    scaling.draw(json.loads((RESULTS / "scaling_epyc_2core_202611.json").read_text()), tmp_path / "scaling.png")
    rows = [
        {"part": part, "ranks": ranks, "volumes": ranks, "seconds": 0.001 * ranks, "peak_bytes": 10 * ranks}
        for part in ("a", "b")
        for ranks in (8, 64)
    ]
    simulate.draw({"by_ranks": rows, "by_volumes": rows}, tmp_path / "simulate.png")
    for name in ("scaling.png", "simulate.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


COMMANDS = {
    "stream": ["bench", "stream", "demo/pretrain", "store=/nowhere"],
    "step": ["bench", "step", "demo/pretrain"],
    "train": ["bench", "train", "demo/pretrain"],
    "checkpoint": ["bench", "checkpoint", "demo/pretrain"],
    "ingest": ["bench", "ingest", "demo/ingest", "sources=/nowhere"],
    "scaling": ["bench", "scaling", "demo/pretrain"],
    "simulate": ["bench", "simulate"],
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_folder_that_cannot_be_made_is_named_before_anything_is_measured(kind, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main([*COMMANDS[kind], f"--out={file}"]) == 2
    assert f"--out {file}: File exists; give a folder that can be written" in capsys.readouterr().err


BAD = {
    "no such benchmark": (["bench", "speed"], "bench speed: no such benchmark; there are: stream, step"),
    "no round": (["bench", "step", "demo/pretrain", "--repeats=0"], "--repeats 0 --seconds 2.0: 1 or more"),
    "no second": (["bench", "step", "demo/pretrain", "--seconds=0"], "--seconds 0.0: 1 or more, and above 0"),
    "no step": (["bench", "train", "demo/pretrain", "--steps=0"], "--steps 0"),
    "no recipe": (["bench", "step", "no_such"], "no such file and no packaged recipe"),
    "one number of ranks": (["bench", "scaling", "demo/pretrain", "--ranks", "2"], "two or more different numbers"),
    "few nodes": (["bench", "simulate", "--nodes", "2"], "at least 8 nodes"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_measured_is_refused_in_words(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def one_of_two(monkeypatch):
    """This process as the second rank of two."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")


@pytest.mark.parametrize("kind", ["stream", "ingest"])
def test_what_measures_one_core_is_left_to_the_first_rank(kind, one_of_two, capsys):
    assert main(COMMANDS[kind]) == 0  # though there is nothing to measure
    assert capsys.readouterr().out == ""


def test_scaling_starts_its_own_ranks(one_of_two, capsys):
    assert main(COMMANDS["scaling"]) == 2
    assert "starts its ranks itself, and is one of 2 here" in capsys.readouterr().err


def test_a_row_that_fell_back_does_not_pass_for_compiled():
    row = {"name": "mimscale, blocks compiled"}
    assert shown_name(row) == shown_name({**row, "plain_functions": 0, "plain_reason": None}) == row["name"]
    assert shown_name({**row, "plain_functions": 1}) == f"{row['name']} (1 function(s) fell back to plain)"
    fell = {**row, "plain_functions": 2, "plain_reason": "InductorError: no compiler"}
    assert shown_name(fell) == f"{row['name']} (2 function(s) fell back to plain: InductorError: no compiler)"


LIMIT = """torch._dynamo hit config.recompile_limit (8)
   function: 'forward' (mimscale/models/vit.py:117)
   last reason: 0/7: tensor 'tokens' size mismatch at index 1. expected 64, actual 16"""
FAILED = """WON'T CONVERT forward mimscale/models/vit.py line 117
due to:
Traceback (most recent call last):
  File "torch/_inductor/cpp_builder.py", line 1, in f
    raise exc.InvalidCxxCompiler
torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found
"""


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (LIMIT, "torch._dynamo hit config.recompile_limit (8)"),
        (FAILED, "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found"),
    ],
)
def test_the_reason_is_the_line_that_says_why(message, reason):
    assert reason_of(message) == reason


def test_a_fall_back_without_a_message_says_so():
    assert Fallbacks().reason is None
    assert Fallbacks(count=1).reason == "torch gives no reason"
    assert Fallbacks(count=1, reasons=["a", "b"]).reason == "a; b"
