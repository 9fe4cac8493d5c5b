"""The benchmark of ingest still runs. No number is compared: that is for a machine that does nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_samples import phantom, write_nifti

from mimscale.bench.results import read_result
from mimscale.cli import main

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


def test_the_verb_measures_an_ingest_and_keeps_no_store(tmp_path, monkeypatch, capfd):
    for number in range(2):
        write_nifti(tmp_path / "sources" / f"{number}.nii.gz", phantom(number))
    temporary, out = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cores = os.sched_getaffinity(0)
    words = ["bench", "ingest", "demo/ingest", f"sources={tmp_path / 'sources'}", "--repeats=2", f"--out={out}"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert read_result(out) == result
    raw_mb = 2 * phantom(0).nbytes / 1e6
    assert (result["volumes"], result["quarantined"], result["raw_mb"]) == (2, 0, pytest.approx(raw_mb, abs=0.01))
    assert min(result[name] for name in ("stored_mb", "mb_per_s", "mb_per_cpu_s", "volumes_per_s")) > 0
    assert "| volumes | raw MB |" in (out / "bench.md").read_text()
    assert (out / "bench.png").stat().st_size > 1000
    assert os.sched_getaffinity(0) == cores
    assert list(temporary.iterdir()) == []
