"""A store behind a URL is the same store: from a real S3 server, `memory://` and `file://`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from s3_server import S3Server, upload, use_server
from small_segmentation import make_finetune_run, make_store
from store_samples import make_store as ingested
from stream_stores import open_loader, write_store

from mimscale.cli import main
from mimscale.config import build_config, config_tree, config_yaml, parse_yaml
from mimscale.errors import ConfigError, DataError
from mimscale.store import files
from mimscale.store.chunk_maps import load_chunk_maps
from mimscale.store.layout import read_info
from mimscale.store.manifest import load_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.stage import STAGE_COLUMNS, Added, Stage, packs_of
from mimscale.store.verify import verify
from mimscale.train.config import PretrainConfig

SHAPES = [(40, 36, 44)] * 6


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, SHAPES)
    return folder


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        server = S3Server()
        use_server(patch, server)
        yield server
        server.close()


@pytest.fixture(scope="module")
def on_s3(local, server) -> Path:
    return upload(server, local, "stores/one")


@pytest.fixture(scope="module")
def in_memory(local) -> Path:
    system = fsspec.filesystem("memory")
    for path in local.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/stores/one/{path.relative_to(local)}", path.read_bytes())
    return Path("memory://stores/one")


@pytest.fixture(params=["s3", "memory", "file"])
def remote(request, local, on_s3, in_memory) -> Path:
    return {"s3": on_s3, "memory": in_memory, "file": Path(f"file://{local}")}[request.param]


def first_batches(store: Path, count: int, workers: int) -> list:
    with open_loader(store, crop_voxels=(16, 24, 20), workers=workers, global_batch=4, overlay="label") as loader:
        return [next(loader) for _ in range(count)]


def test_info_manifest_volumes_and_labels_are_those_of_the_folder(remote, local):
    assert read_info(remote) == read_info(local)
    manifest, reference = load_manifest(remote), load_manifest(local)
    ours, theirs = ShardReader(remote, manifest), ShardReader(local, reference)
    for index in range(len(reference)):
        row = manifest.row(index)
        assert row == reference.row(index)
        assert np.array_equal(ours.read_volume(row), theirs.read_volume(row))
        box = (row, (-3, 5, 30), (20, 16, 24))
        assert np.array_equal(ours.read(*box), theirs.read(*box))
        assert np.array_equal(ours.read(*box, overlay="label"), theirs.read(*box, overlay="label"))


@pytest.mark.parametrize("workers", [0, 2])
def test_forked_loader_workers_read_what_they_read_from_the_folder(remote, local, workers):
    read_info(remote)  # the parent has a client of its own, with its thread, when the workers are forked
    ours, theirs = first_batches(remote, 6, workers), first_batches(local, 6, workers)
    for one, other in zip(ours, theirs, strict=True):
        assert one.volume_ids == other.volume_ids
        assert not one.bad
        assert np.array_equal(one.volume, other.volume)
        assert np.array_equal(one.label, other.label)


def test_a_store_behind_a_url_verifies(remote):
    assert verify(remote) == []


def test_near_chunks_are_one_request_and_far_ones_go_together(on_s3, server, local):
    manifest = load_manifest(on_s3)
    reader = ShardReader(on_s3, manifest)
    row = manifest.row(0)
    server.gets.clear()
    reader.read_volume(row)
    pack = [byte_range for path, byte_range in server.gets if path.endswith(".zip")]
    assert len(pack) == 2, "the index, then all 27 chunks at once"


def test_the_bytes_of_a_crop_are_few_when_chunks_lie_far_apart(on_s3, server, monkeypatch):
    monkeypatch.setattr(files.RemoteFile, "gap_bytes", 0)
    manifest = load_manifest(on_s3)
    reader = ShardReader(on_s3, manifest)
    row = manifest.row(0)
    reader.read(row, (0, 0, 0), (1, 1, 1))
    server.gets.clear()
    before = reader.bytes_read
    reader.read(row, (0, 0, 0), (20, 20, 20))  # 2 x 2 x 2 chunks: four runs of two
    assert len(server.gets) == 4
    assert reader.bytes_read - before < row.length_bytes / 2


def test_inspect_prints_the_same_of_a_store_on_s3(on_s3, local, capsys):
    texts = []
    for words in ([], ["--verify", "--workers", "1"], ["vol_002"]):
        for store in (f"s3://bucket/{'/'.join(on_s3.parts[2:])}", str(local)):
            assert main(["inspect", store, *words, "--json"]) == 0
            texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] == {"ok": True, "bad": []}
    assert texts[4] == texts[5]


def test_the_url_of_a_store_survives_the_resolved_config():
    tree = {
        "store": "s3://bucket/stores/one",
        "run_dir": "run",
        "steps": 1,
        "global_batch": 1,
        "micro_batch": 1,
        "crop_voxels": [16, 16, 16],
        "patch_voxels": [8, 8, 8],
    }
    config = build_config(PretrainConfig, tree, "recipe")
    assert files.url_of(config.store) == "s3://bucket/stores/one"
    again = build_config(PretrainConfig, parse_yaml(config_yaml(config), "config.yaml"), "config.yaml")
    assert again == config
    assert files.url_of(Path(config_tree(config)["store"])) == "s3://bucket/stores/one"


def test_pretraining_from_s3_has_the_losses_of_pretraining_from_the_folder(on_s3, local, tmp_path):
    losses = []
    for name, store in (("s3", "s3://bucket/stores/one"), ("folder", str(local))):
        words = ["pretrain", "demo/pretrain", f"store={store}", f"run_dir={tmp_path / name}", "steps=3"]
        words += ["global_batch=4", "micro_batch=2", "crop_voxels=[16, 16, 16]", "patch_voxels=[8, 8, 8]"]
        words += ["model={dim: 24, depth: 1, heads: 2}", "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"]
        words += ["stream={workers: 1}", "meter={tensorboard: false}", "validation={every_steps: 0}"]
        command = [sys.executable, "-c", "import sys; from mimscale.cli import main; sys.exit(main(sys.argv[1:]))"]
        done = subprocess.run([*command, *words], env=os.environ, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_evaluation_reads_a_labelled_store_from_s3(server, tmp_path, capsys):
    store = make_store(tmp_path)
    place = upload(server, store, "stores/labelled")
    run = make_finetune_run(tmp_path / "run", store)
    scores = []
    for where in (place, store):
        words = [f"run_dir={run}", f"store={where}", "threads=1", "pictures=0", "save_predictions=false"]
        assert main(["evaluate", *words, "--json"]) == 0
        tree = json.loads(capsys.readouterr().out)
        tree.pop("seconds")
        scores.append(tree)
    assert scores[0] == scores[1]


def test_what_is_no_store_is_refused_by_its_name(server, on_s3):
    with pytest.raises(DataError, match=r"s3:/bucket/nothing/store.json: .*give the folder or URL"):
        read_info(Path("s3://bucket/nothing"))
    with pytest.raises(DataError, match=r"s3:/nobucket/store/store.json"):
        read_info(Path("s3://nobucket/store"))


def test_a_scheme_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", _no_library)
    with pytest.raises(ConfigError, match=r"pip install 'mimscale\[remote\]'"):
        read_info(Path("s3://bucket/store"))


def _no_library(scheme, **options):
    raise ImportError(f"Install {scheme}fs to access it")


def test_packs_of_a_bucket_are_staged_on_the_node(on_s3, local, tmp_path):
    stage = Stage(tmp_path / "stage", 2**30, packs_of(on_s3, load_manifest(on_s3, STAGE_COLUMNS), "label"))
    for path in stage.packs:
        assert stage.add(path) is Added.COPIED
        assert stage.copy_of(path).read_bytes() == (local / Path(*path.parts[4:])).read_bytes()
    # The copies are those of the content: a run on the folder finds them too.
    same = Stage(tmp_path / "stage", 2**30, packs_of(local, load_manifest(local, STAGE_COLUMNS), "label"))
    assert all(same.copy_of(path) for path in same.packs)


def test_chunk_maps_of_a_bucket_are_those_of_the_folder(server, tmp_path):
    local = ingested(tmp_path, count=2, chunk_voxels=16)
    place = upload(server, local, "stores/mapped")
    manifest = load_manifest(place)
    ours, theirs = load_chunk_maps(place, manifest), load_chunk_maps(local, load_manifest(local))
    found = 0
    for index in range(len(manifest)):
        shape = manifest.row(index).shape[1:]
        assert np.array_equal(ours.occupied(index, shape), theirs.occupied(index, shape))
        found += len(ours.occupied(index, shape))
        labelled = ours.labelled(index, "label", shape), theirs.labelled(index, "label", shape)
        assert all(np.array_equal(one, other) for one, other in zip(*labelled, strict=True))
    assert found
    assert verify(place) == []
