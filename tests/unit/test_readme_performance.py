"""README's figures are those of the result files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme_section():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script that lies there
    spec = importlib.util.spec_from_file_location("readme_section", ROOT / "benchmarks" / "readme_section.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_the_readme_matches_the_results(readme_section, capsys):
    assert readme_section.main(["--check"]) == 0, capsys.readouterr().err


def step_result(samples_per_s):
    row = {"step_s": 1.0, "samples_per_s": samples_per_s, "spread_percent": 2.0, "of_ceiling": 0.91}
    rows = [
        {**row, "name": "mimscale", "times": None},
        {**row, "name": "compiled", "times": 1.02, "plain_functions": 1, "plain_reason": "no compiler"},
    ]
    use = {"mfu": None, "hfu": None, "mfu_of_measured": 0.8, "hfu_of_measured": 0.84, "measured_flops_per_s": 2e11}
    table = {"setting": "ViT-B", "dtype": "float32", "threads": 2, "device": "cpu", "utilisation": use}
    return {
        "benchmark": "step",
        "surroundings": {"cpu": "Xeon", "commit": "abc"},
        "tables": [{**table, "contenders": rows}],
    }


def test_a_result_that_changes_is_written_into_the_readme_and_found_when_it_is_not(readme_section, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(f"before\n{readme_section.BEGIN}\nold\n{readme_section.END}\nafter\n")
    (results / "step_xeon_202610.json").write_text(json.dumps(step_result(7.0)))
    (results / "step_xeon_202611.json").write_text(json.dumps(step_result(8.0)))
    (results / "step_xeon-quick_202611.json").write_text(json.dumps(step_result(9.0)))
    words = ["--readme", str(readme), "--results", str(results)]
    assert readme_section.main([*words, "--check"]) == 1
    assert readme_section.main(words) == 0
    text = readme.read_text()
    assert "| ViT-B | mimscale | 8.00 | 2 % | 91 % |  |" in text
    assert "| ViT-B | compiled (1 function(s) fell back to plain: no compiler) | 8.00 | 2 % | 91 % | 1.02 |" in text
    assert "ViT-B 80 and 84 % of 200 GFLOP/s" in text
    assert "7.00" not in text
    assert "9.00" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert readme_section.main([*words, "--check"]) == 0


def test_a_readme_without_its_markers_is_refused(readme_section):
    with pytest.raises(ValueError, match=r"must hold .* once, it holds it 0 times"):
        readme_section.replaced("nothing", "text")


WHERE = {"cpu": "Xeon", "commit": "abc", "load_average": 0.5, "time": "2026-11-01"}


def write_sections(readme_section, folder, result, section, *, file="README.md"):
    """The file's text once a result is written into its section."""
    (folder / "benchmarks").mkdir()
    (folder / "README.md").write_text("\n".join([*readme_section.markers("performance"), ""]))
    (folder / "benchmarks" / "README.md").write_text("")
    begin, end = readme_section.markers(section)
    with (folder / file).open("a") as text:
        text.write(f"before\n{begin}\nby hand\n{end}\nafter\n")
    (folder / f"{result['benchmark']}_xeon_202611.json").write_text(json.dumps({**result, "surroundings": WHERE}))
    words = ["--readme", str(folder / "README.md"), "--results", str(folder)]
    assert readme_section.main([*words, "--check"]) == 1
    assert readme_section.main(words) == 0
    assert readme_section.main([*words, "--check"]) == 0
    text = (folder / file).read_text()
    assert "by hand" not in text
    assert text.endswith("after\n")
    return text


def estimate_row(what, name, ratio, most_miss, holds):
    numbers = {"estimate": 10 * ratio, "measured": 10.0, "ratio": ratio}
    return {"what": what, "name": name, "unit": "MB", **numbers, "most_miss": most_miss, "holds": holds}


def test_estimates_stand_beside_what_was_measured_and_a_miss_is_named(readme_section, tmp_path):
    rows = [
        estimate_row("peak", "ZeRO-0", 1.0, 0.1, True),
        estimate_row("peak", "ZeRO-3", 1.2, 0.1, False),
        estimate_row("save", "ViT", 0.5, None, None),
        estimate_row("parameters", "ViT", 1.0, 0.0, True),
    ]
    text = write_sections(readme_section, tmp_path, {"benchmark": "plan", "rows": rows}, "plan")
    assert "| peak: ZeRO-0 / ZeRO-3 | 10 / 12 MB | 10 / 10 MB | 1.000 / 1.200 | within 10 % | no: ZeRO-3 |" in text
    assert "| save: ViT | 5 MB | 10 MB | 0.500 |  |  |" in text
    assert "| parameters: ViT | 10 MB | 10 MB | 1.000 | exact | yes |" in text
    assert "From `benchmarks/results/plan_xeon_202611.json`: Xeon, commit abc, load average 0.5." in text


def test_the_stream_is_told_by_its_peers_and_cores(readme_section, tmp_path):
    peers = [("zarr-python", 10.0), ("zarrs", 50.0), ("tensorstore", 100.0), ("blosc2 (nnU-Net)", 250.0)]
    rates = [("mimscale", "random", 200.0), ("mimscale", "region_4", 500.0)]
    rates += [(name, "random", rate) for name, rate in peers]
    contenders = [{"name": name, "mode": mode, "crops_per_s": rate} for name, mode, rate in rates]
    workers = [
        {"workers": number, "of_linear": 1 - number / 10, "cores_for": {"A100": 10 + number}} for number in (0, 1, 2)
    ]
    table = {"volumes": "ct", "crop_voxels": [96] * 3, "condition": "warm", "contenders": contenders}
    result = {
        "benchmark": "stream",
        "config": {"crops": [96, 128], "conditions": ["warm"]},
        "gpu_crops_per_s": {"A100": 1873},
        "volumes": {"ct": {"dtype": "int16"}},
        "tables": [table, {**table, "crop_voxels": [128] * 3, "contenders": []}],
        "loader": {f"ct, {mode}": workers for mode in ("random origins", "four crops of a region")},
    }
    text = write_sections(readme_section, tmp_path, result, "stream")
    assert "| ct, int16 | warm | 200 | 20.00 | 4.00 | 2.00 | 0.80 | 500 | 2.00 |" in text
    assert "| ct, random origins | 2 | 80 % | 12 |" in text
    assert "cores for one A100, 1873 crops/s" in text
    assert "Warm: from `benchmarks/results/stream_xeon_202611.json`: Xeon" in text


def test_thousands_of_ranks_are_told_in_the_readme_of_benchmarks(readme_section, tmp_path):
    rows = [
        {"part": part, "ranks": ranks, "seconds": ranks / 2000, "peak_bytes": ranks * 5000, "volumes": 1}
        for part in ("commit, ZeRO-1", "plan of all samples")
        for ranks in (64, 4096)
    ]
    result = {"benchmark": "simulate", "by_ranks": rows}
    text = write_sections(readme_section, tmp_path, result, "simulation", file="benchmarks/README.md")
    assert "| ranks | commit, ZeRO-1 |\n" in text
    assert "| 64 | 32 ms, 0.3 MB |\n| 4 096 | 2.05 s, 20 MB |\n" in text


def test_a_result_without_a_place_in_the_readme_is_refused(readme_section):
    with pytest.raises(ValueError, match=r"must hold '<!-- plan: .* once, it holds it 0 times"):
        readme_section.written("nothing", {"plan": "text", "stream": ""})
