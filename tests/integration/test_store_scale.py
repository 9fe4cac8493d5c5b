"""What must not grow with the number of volumes, and what must not grow faster than their size."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import write_nifti
from stream_stores import write_store

from mimscale.cli import main
from mimscale.store import layout
from mimscale.store.manifest import TRAINING_COLUMNS, Manifest, load_manifest, write_manifest
from mimscale.store.writer import PackWriter

VOLUMES, PARTS = 10_000, 30  # of 6 MB each: 60 GB of sources, which an ingest plans as 30 parts of 2 GiB


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """10 000 tiny labelled volumes, written through PackWriter: an ingest would take its time for reading files."""
    store = tmp_path_factory.mktemp("scale") / "store"
    template = write_store(store, [(4, 4, 4)]).row(0)
    voxels, label = np.arange(64, dtype=np.int16).reshape(1, 4, 4, 4), np.ones((1, 4, 4, 4), np.uint8)
    rows = []
    for part in range(PARTS):
        options = {"chunk_voxels": 16, "codec": "zstd"}
        with (
            PackWriter(layout.pack_path(store, part), **options) as pack,
            PackWriter(layout.overlay_path(store, "label", part), **options) as labels,
        ):
            for number in range(part, VOLUMES, PARTS):
                volume = {"fill_value": 0, "spacing_mm": (1, 1, 1), "attributes": {}}
                name = f"vol_{number:05d}"
                place = dataclasses.asdict(pack.add(name, voxels, **volume))
                there = dataclasses.asdict(labels.add(name, label, **volume))
                overlay = dataclasses.replace(template.overlays["label"], part=part, **there)
                rows.append(
                    dataclasses.replace(
                        template, id=name, part=part, overlays={"label": overlay}, fill_value=0.0, **place
                    )
                )
        receipt = layout.receipt_path(store, part)
        receipt.parent.mkdir(exist_ok=True)
        receipt.write_text(f'{{"id": "x{part}", "outcome": "quarantined", "reason": "truncated"}}\n')
    layout.write_info(store, dataclasses.replace(layout.read_info(store), num_parts=PARTS))
    write_manifest(store, rows)
    return store


def test_a_store_of_10_000_volumes_has_less_than_200_files(store):
    paths = list(store.rglob("*"))
    assert len(load_manifest(store)) == VOLUMES
    assert len(paths) < 200, [path.name for path in paths][:10]


def test_a_store_is_described_without_a_row_object(store, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a row object for every volume")

    monkeypatch.setattr(Manifest, "row", refuse)
    monkeypatch.setattr(Manifest, "sample_row", refuse)
    assert main(["inspect", str(store), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["volumes"], tree["labelled"], tree["shapes"]) == (VOLUMES, {"label": VOLUMES}, {"4 x 4 x 4": VOLUMES})
    assert tree["reasons"] == {"truncated": PARTS}
    assert main(["inspect", str(store)]) == 0
    assert "vol_00019" in capsys.readouterr().err


OPEN = """
import os, sys
from pathlib import Path
from mimscale.store.manifest import TRAINING_COLUMNS, load_manifest
import numpy as np
threads = len(os.listdir("/proc/self/task"))
columns = {"training": TRAINING_COLUMNS, "plan": ("id", "split", "shape", "foreground_box")}[sys.argv[2]]
manifest = load_manifest(Path(sys.argv[1]), columns)
assert len(os.listdir("/proc/self/task")) == threads, "a thread that a fork would lose"
train = manifest.select(split="train")
assert manifest.column("shape")[train].shape == (len(train), 4)
# Not ru_maxrss: that begins with the memory of the process that started this one.
peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(manifest), int(peak_kb) * 1024 / 1e6)
"""


@pytest.fixture(scope="module")
def large_manifest(tmp_path_factory):
    """400 000 rows: the rows of a small store over and over, under ids of their own."""
    store = tmp_path_factory.mktemp("large")
    write_store(store, [(40, 50, 60), (20, 30, 40)])
    table = load_manifest(store)._table
    rows = 400_000
    many = table.take(pa.array(np.arange(rows) % 2))
    ids = pa.array([f"{number:016x}" for number in range(rows)])
    many = many.set_column(many.schema.get_field_index("id"), many.schema.field("id"), ids)
    pq.write_table(many, layout.manifest_path(store), compression="zstd", row_group_size=32_768)
    return store


@pytest.mark.parametrize(("columns", "limit_mb"), [("plan", 400), ("training", 500)])
def test_a_manifest_of_400_000_rows_opens_in_bounded_memory_and_without_threads(large_manifest, columns, limit_mb):
    # The interpreter with numpy and pyarrow takes 80 MB of it; all columns take 700 MB.
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(large_manifest), columns], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, peak_mb = map(float, done.stdout.split())
    assert rows == 400_000
    assert peak_mb < limit_mb


def test_a_row_of_a_large_manifest_needs_no_other_row(large_manifest):
    manifest = load_manifest(large_manifest, TRAINING_COLUMNS)
    assert manifest.sample_row(399_999).id == f"{399_999:016x}"
    assert manifest.sample_row(399_999).shape == (1, 20, 30, 40)


INGEST = """
import re, sys
from pathlib import Path
from store_samples import config_of
from mimscale.ingest.run import ingest

def peak_bytes():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path(sys.argv[1])
before = [ingest(config_of(str(folder / "small.nii.gz"), folder / "small", class_names=[])), peak_bytes()]
ingest(config_of(str(folder / "large.nii.gz"), folder / "large", class_names=[]))
print(peak_bytes() - before[1])
"""


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_worker_needs_less_than_four_times_its_largest_volume(dtype, tmp_path):
    voxels = np.random.RandomState(0).randint(0, 900, (320, 320, 160)).astype(dtype)
    voxels = voxels if dtype == "int16" else voxels / np.float32(7)
    write_nifti(tmp_path / "small.nii.gz", voxels[:8, :8, :8])
    write_nifti(tmp_path / "large.nii", voxels)
    packed = gzip.compress((tmp_path / "large.nii").read_bytes(), compresslevel=1)
    (tmp_path / "large.nii.gz").write_bytes(packed)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", INGEST, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * voxels.nbytes
    assert int(done.stdout) > voxels.nbytes / 2  # it was measured
