"""README's figures are those of the result files."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme_section():
    spec = importlib.util.spec_from_file_location("readme_section", ROOT / "benchmarks" / "readme_section.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
