import subprocess
import sys

import pytest
from fake_runs import add_segmentation_scores, fake_run
from small_segmentation import make_pretrain_run, make_store

SCRIPT = """
import sys
from mimscale.cli import main
code = main(sys.argv[1:])
loaded = [name for name in ("torch", "monai", "deepspeed") if name in sys.modules]
assert not loaded, loaded
sys.exit(code)
"""


def run(*words):
    return subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)


def test_a_report_with_pictures_needs_no_torch(tmp_path):
    folder = fake_run(tmp_path / "run", "finetune", store="gone", steps=3)
    add_segmentation_scores(folder, volumes=["aaaa"])
    done = run("report", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "report" / "run_segmentation_aaaa.png").exists()


@pytest.mark.parametrize("flags", [["--json"], ["--verify"], ["aaaa", "--png"]])
def test_inspecting_a_store_needs_no_torch(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("inspect", make_store(tmp_path / "data"), *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["--json"], ["--verify"]])
def test_inspecting_a_run_needs_no_torch(flags, tmp_path):
    done = run("inspect", make_pretrain_run(tmp_path / "run", tmp_path / "store"), *flags)
    assert done.returncode == 0, done.stderr


def test_exporting_a_volume_needs_no_torch(tmp_path):
    done = run("export", make_store(tmp_path / "data"), "bbbb", tmp_path / "out.nii.gz")
    assert done.returncode == 0, done.stderr


def test_checking_the_config_of_an_evaluation_needs_no_torch_and_prints_it(tmp_path):
    done = run("evaluate", f"run_dir={tmp_path}", "overlap=0.25", "--check")
    assert done.returncode == 0, done.stderr
    assert "overlap: 0.25" in done.stdout
    assert "nsd_tolerance_mm: 2.0" in done.stdout
