"""A store is Zarr v3: zarr-python reads a pack as it is, zarrs and tensorstore read an unzipped copy."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from store_samples import config_of, make_store, opened, write_nifti

from mimscale.ingest.run import ingest
from mimscale.store import layout


@pytest.fixture(scope="module", params=["zstd", "fast"])
def store(tmp_path_factory, request):
    """Labelled int16 volumes, and in a second store every other dtype, channels and tiny volumes."""
    folder = tmp_path_factory.mktemp(request.param)
    make_store(folder, count=3, codec=request.param)
    random = np.random.RandomState(0)
    for name, dtype, shape in (
        ("bytes", np.uint8, (33, 40, 17, 2)),
        ("words", np.uint16, (20, 31, 44, 2)),
        ("floats", np.float32, (25, 16, 32, 2)),
        ("tiny", np.int16, (1, 2, 3, 2)),
    ):
        write_nifti(folder / "other" / f"{name}.nii", (random.rand(*shape) * 200 + 0.25).astype(dtype))
    config = config_of(str(folder / "other"), folder / "many", channels=2, codec=request.param, chunk_voxels=16)
    ingest(config)
    return folder


def stores(folder):
    return [folder / "store", folder / "many"]


def test_zarr_python_reads_every_volume_from_the_pack(store):
    seen = set()
    for path in stores(store):
        manifest, reader = opened(path)
        for index in range(len(manifest)):
            row = manifest.row(index)
            with zarr.storage.ZipStore(layout.pack_path(path, row.part), mode="r") as files:
                array = zarr.open_group(files, mode="r")[row.id]["0"]
                assert array.dtype == row.dtype
                assert array.fill_value == row.fill_value
                assert np.array_equal(array[...], reader.read_volume(row))
            for name, place in row.overlays.items():
                with zarr.storage.ZipStore(layout.overlay_path(path, name, place.part), mode="r") as files:
                    array = zarr.open_group(files, mode="r")[row.id]["0"]
                    assert np.array_equal(array[...], reader.read_volume(row, name))
            seen.add(row.dtype)
    assert seen == {"uint8", "uint16", "int16", "float32"}


READ_WITH = {
    "zarrs": """
import zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
def read(folder):
    return zarr.open_array(folder, mode="r")[...]
""",
    "tensorstore": """
import tensorstore
def read(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": folder}}
    return tensorstore.open(spec).result().read().result()
""",
}
SAVE = """
import json, sys
import numpy as np
for folder, out in json.load(sys.stdin):
    np.save(out, np.asarray(read(folder)))
"""


@pytest.mark.parametrize("tool", READ_WITH)
def test_other_readers_agree_on_an_unzipped_copy(store, tmp_path, tool):
    jobs, expected = [], []
    for path in stores(store):
        manifest, reader = opened(path)
        for zipped in path.rglob("*.zarr.zip"):
            with zipfile.ZipFile(zipped) as pack:
                pack.extractall(tmp_path / zipped.relative_to(store).with_suffix(""))
        for row in (manifest.row(index) for index in range(len(manifest))):
            places: dict[str | None, Path] = {None: layout.pack_path(path, row.part)}
            places |= {name: layout.overlay_path(path, name, place.part) for name, place in row.overlays.items()}
            for overlay, zipped in places.items():
                out = str(tmp_path / f"{row.id}-{overlay}.npy")
                jobs.append((str(tmp_path / zipped.relative_to(store).with_suffix("") / row.id / "0"), out))
                expected.append((out, reader.read_volume(row, overlay)))
    assert len(jobs) == 3 + 3 + 4  # images, their labels, and the volumes of the other store
    # In a process of its own: both start threads that do not survive a fork of the test process.
    subprocess.run(
        [sys.executable, "-c", READ_WITH[tool] + SAVE], input=json.dumps(jobs), text=True, check=True, timeout=120
    )
    for out, voxels in expected:
        other = np.load(out)
        assert other.dtype == voxels.dtype
        assert np.array_equal(other, voxels)
