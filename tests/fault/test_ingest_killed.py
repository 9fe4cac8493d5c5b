"""An ingest that is killed: what is finished stays, nothing is half-written, the same command gives the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import is_alive, write_lock
from store_samples import config_of, make_store, write_pairs

from mimscale import durable
from mimscale.errors import DataError
from mimscale.ingest.run import ingest
from mimscale.store.manifest import load_manifest
from mimscale.store.verify import verify

RUN = "import sys; from mimscale.cli import main; sys.exit(main(sys.argv[1:]))"


def packs_of(store):
    paths = [*(store / "packs").iterdir(), *(store / "overlays" / "label").iterdir()]
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(paths)}


def children_of(pid):
    tasks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(task) for task in tasks]


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_in_the_middle_and_a_restart_give_the_bytes_of_a_straight_run(tmp_path, workers):
    sources = write_pairs(tmp_path / "s", 12, (72, 64, 60))
    options = {"sources": sources, "class_names": ["a", "b", "c"], "workers": workers, "parts": 6}
    (tmp_path / "r.yaml").write_text(json.dumps(options))
    words = ["ingest", str(tmp_path / "r.yaml")]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", RUN, *words, f"out={killed}"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("receipts/*.jsonl"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    workers_alive = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.parquet").exists()
    with pytest.raises(DataError, match="has not ended; run the same ingest command again"):
        load_manifest(killed)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers_alive):
        assert time.monotonic() < deadline, "a worker outlives its ingest"
        time.sleep(0.05)
    again = subprocess.run(
        [sys.executable, "-c", RUN, *words, f"out={killed}", "--json"], capture_output=True, text=True, check=True
    )
    assert "of 6 parts are finished already" in again.stderr
    assert json.loads(again.stdout)["stored"] == 12
    subprocess.run([sys.executable, "-c", RUN, *words, f"out={straight}"], check=True, capture_output=True)
    assert packs_of(killed) == packs_of(straight)
    assert verify(killed) == []
    assert list(killed.rglob(".tmp-*")) == []


def test_a_pack_without_a_receipt_is_written_again(tmp_path, monkeypatch):
    """Killed between the pack and its receipt."""
    sources = write_pairs(tmp_path / "s", 2)
    config = config_of(sources, tmp_path / "store")

    real_write = durable.write_text

    def die_at_the_receipt(path, text):
        if path.parent.name == "receipts":
            raise KeyboardInterrupt
        real_write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_text", die_at_the_receipt)
        with pytest.raises(KeyboardInterrupt):
            ingest(config)
    assert (tmp_path / "store" / "packs" / "part-00000.zarr.zip").exists()
    assert not list((tmp_path / "store").glob("receipts/*"))
    assert ingest(config)["stored"] == 2


def test_the_lock_and_litter_of_a_dead_ingest_are_cleared(tmp_path):
    store = make_store(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lock(store / "ingest.lock", "an ingest", pid=dead.pid)
    names = ("packs/.tmp-part-00001.zarr.zip.77", ".tmp-manifest.parquet.77", f"../.tmp-{store.name}.sources.jsonl.77")
    for name in names:
        (store / name).write_bytes(b"half a file")
    sources = {kind: str(tmp_path / "sources" / kind / "*.nii.gz") for kind in ("images", "labels")}
    ingest(config_of(sources, store, parts=2, chunk_voxels=16))
    assert not [name for name in names if (store / name).exists()]
    assert not (store / "ingest.lock").exists()


def test_a_killed_worker_is_a_clear_error_and_the_rest_is_kept(tmp_path):
    sources = write_pairs(tmp_path / "s", 12, (72, 64, 60))
    options = {"sources": sources, "class_names": ["a", "b", "c"], "workers": 2, "parts": 6}
    (tmp_path / "r.yaml").write_text(json.dumps(options))
    words = [sys.executable, "-c", RUN, "ingest", str(tmp_path / "r.yaml"), f"out={tmp_path}/store"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "store").glob("receipts/*.jsonl"))) < 1:
        assert time.monotonic() < deadline
        assert process.poll() is None, "finished before a worker could be killed"
        time.sleep(0.002)
    os.kill(max(children_of(process.pid)), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "a worker process was killed" in error
    assert "with a smaller workers=N" in error
    assert subprocess.run(words, capture_output=True).returncode == 0
