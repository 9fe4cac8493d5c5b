"""The benchmark of ingest still runs. No number is compared: that is for a machine that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_ingest.py"


def test_the_benchmark_of_ingest_writes_a_result_for_programs_and_for_people(tmp_path):
    little = ["--repeats", "1", "--mb-a-run", "1", "--edge-factor", "1", "--receipts", "600", "--rows", "1000"]
    words = [*little, "--kinds", "mni152_t1_uint8", "--hardware", "test", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("ingest_test_*.json")
    tree = json.loads(path.read_text())
    assert tree["schema_version"] == 1
    assert tree["surroundings"]["versions"]["numcodecs"]
    assert tree["conversion"]["mni152_t1_uint8"].keys() == {".nii zstd", ".nii fast", ".nii.gz zstd", ".nii.gz fast"}
    assert tree["merge"]["receipts"] == 600
    assert tree["manifest"]["plan"]["peak_mb"] > 0
    assert all(one["times_volume"] > 0 for one in tree["memory"].values())
    assert path.with_suffix(".md").read_text() in done.stdout
