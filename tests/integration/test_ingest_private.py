"""Names, dates and identifiers of headers, file names and tables: none may be found in what ingest leaves."""

import json
import os
import subprocess
import sys

import numpy as np
import planted_names
from store_samples import phantom, write_nifti

from mimscale.store.manifest import load_manifest
from mimscale.store.verify import verify

RUN = "import sys; from mimscale.cli import main; sys.exit(main(sys.argv[1:]))"


def planted_archive(folder):
    """Every format with names in all text fields, two that cannot be stored, and labels for one."""
    voxels = phantom(0, (24, 22, 20))
    planted_names.write_all(folder, voxels)
    home = next(folder.iterdir())
    cut = home / f"{planted_names.NAME}_cut.nii.gz"
    cut.write_bytes(write_nifti(folder / "whole.nii.gz", phantom(1)).read_bytes()[:-50])
    (folder / "whole.nii.gz").unlink()
    (home / f"{planted_names.NAME}.nii").write_bytes(planted_names.TEXT.encode() * 30)
    return folder


def run(*words, job=True):
    """A verb in a process of its own, as a job runs it; returns all that it printed."""
    variables = {"MIMSCALE_JOB_ID": "4711"} if job else {}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_nothing_planted_is_in_the_store_or_in_a_job_s_log(tmp_path):
    archive = planted_archive(tmp_path / "archive")
    store, out = tmp_path / "stores" / "store", tmp_path / "out"
    out.mkdir()
    words = ["ingest", "ingest_mr", f"sources={archive}", f"out={store}", "workers=1", "--json"]
    printed = run(*words)
    summary = json.loads(printed[printed.index("{") : printed.index("}\n") + 1])
    # The formats hold the same voxels: those that also agree in their affine are one scan.
    assert summary["stored"] >= 1
    assert summary["stored"] + summary["duplicates"] == 5
    assert summary["quarantined"] == 2
    printed += run("inspect", str(store), "--png", str(out / "contact.png"))
    printed += run("inspect", str(store), "--verify")
    manifest = load_manifest(store)
    for index in range(len(manifest)):
        volume = manifest.row(index).id
        assert planted_names.found_in(repr(manifest.row(index))) == []  # Parquet compresses: its bytes would hide it
        printed += run("inspect", str(store), volume)
        printed += run("export", str(store), volume, str(out / f"{volume}.nii"))
    assert planted_names.found_below(store) == {}
    assert planted_names.found_below(out) == {}
    assert planted_names.found_in(printed.replace(str(tmp_path), "")) == []
    assert verify(store) == []

    beside = [path for path in (tmp_path / "stores").iterdir() if path != store]
    assert {path.stat().st_mode & 0o777 for path in beside} == {0o600}
    # What a person at a terminal is told does name the file, or nobody could put it right.
    (store / "manifest.parquet").unlink()
    assert f"{planted_names.NAME}_cut.nii.gz" in run(*words, job=False)


def test_a_table_s_people_stay_out_and_its_other_columns_can_be_filtered_by(tmp_path):
    for number in range(3):
        write_nifti(tmp_path / f"{number}.nii", phantom(number))
    rows = [f"{number}.nii,{planted_names.NAME} {number},{planted_names.DATE},site_{number % 2}" for number in range(3)]
    table = tmp_path / "scans.csv"
    table.write_text("\n".join(["image,patient_name,birth_date,site", *rows]) + "\n")
    store = tmp_path / "stores" / "store"
    printed = run("ingest", "ingest_mr", f"sources={table}", f"out={store}", "workers=1")
    assert planted_names.found_below(store) == {}
    assert planted_names.found_in(printed.replace(str(tmp_path), "")) == []
    manifest = load_manifest(store)
    assert sorted(manifest.row(index).tags["site"] for index in range(3)) == ["site_0", "site_0", "site_1"]
    assert np.unique(manifest.column("subject")).size == 3
