"""One writer at a time, and a job that is started again finds the place that its earlier start has left."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from mimscale import lock
from mimscale.errors import LaunchError
from mimscale.lock import sole_writer
from mimscale.world import Process


def _held_elsewhere(path: Path, owner: str | None) -> None:
    process = {**vars(Process.this()), "host": "elsewhere"}
    entry = {"holder": "job 5", "owner": owner, "since_unix_s": time.time(), "process": process}
    path.write_text(json.dumps(entry))
    path.with_name(f"{path.name}.alive").write_text(json.dumps({"time_s": time.time()}))


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with sole_writer(path, "job 5"), pytest.raises(LaunchError, match=f"job 5 .process {os.getpid()} "):
        sole_writer(path, "job 6").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_the_living_lock_of_another_host_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    _held_elsewhere(path, "logs/001")
    with pytest.raises(LaunchError, match=r"job 5 .process .* on elsewhere. is writing here"):
        sole_writer(path, "job 6", "logs/002").__enter__()


def test_what_an_earlier_start_of_the_same_job_left_on_a_dead_node_is_taken_over_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "OWN_EXPIRES_S", 0.5)
    path = tmp_path / "lock.json"
    _held_elsewhere(path, "logs/001")
    start_s = time.monotonic()
    with sole_writer(path, "job 5", "logs/001"):
        assert json.loads(path.read_text())["process"] == vars(Process.this())
    assert 0.5 <= time.monotonic() - start_s < 5


def test_an_earlier_start_of_the_same_job_that_still_writes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "OWN_EXPIRES_S", 0.6)
    path = tmp_path / "lock.json"
    _held_elsewhere(path, "logs/001")
    last_beat_s = time.monotonic() + 1.5

    def beat() -> None:
        while time.monotonic() < last_beat_s:
            _held_beat = path.with_name(f"{path.name}.alive")
            _held_beat.write_text(json.dumps({"time_s": time.time()}))
            time.sleep(0.1)

    alive = threading.Thread(target=beat)
    alive.start()
    with sole_writer(path, "job 5", "logs/001"):
        assert time.monotonic() > last_beat_s
    alive.join()


def test_an_earlier_start_that_never_ends_is_refused_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "EXPIRES_S", 0.5)
    path = tmp_path / "lock.json"
    process = vars(Process.this())  # alive
    entry = {"holder": "job 5", "owner": "logs/001", "since_unix_s": time.time(), "process": process}
    path.write_text(json.dumps(entry))
    with pytest.raises(LaunchError, match="job 5"):
        sole_writer(path, "job 5", "logs/001").__enter__()
