"""Older checkpoints at a commit: what rank 0 of thousands waits for does not grow with the ranks' files in them."""

import os
import shutil
import threading

import pytest

from mimscale.bench.simulate_checkpoint import PART_BYTES, FakeEngine, ManyRanks
from mimscale.train import committed
from mimscale.train.checkpoint import Checkpoints
from mimscale.train.config import CheckpointConfig
from mimscale.train.older import OlderCheckpoints
from mimscale.train.run_dir import RunDir
from mimscale.train.state import state_file
from mimscale.world import World

KEPT = 3
CALLS = [(os, "stat"), (os, "lstat"), (os, "scandir"), (os, "listdir"), (os, "open"), (os, "unlink")]


@pytest.fixture
def calls(monkeypatch):
    """Looks at the file system by the thread that would train."""
    seen = []
    trainer = threading.get_ident()

    def watch(module, name):
        original = getattr(module, name)

        def watched(path=".", *args, **kwargs):
            if threading.get_ident() == trainer:
                seen.append((name, str(path)))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for module, name in CALLS:
        watch(module, name)
    return seen


def checkpoints_of(run, size):
    ranks = ManyRanks(World(rank=0, size=size, local_rank=0, local_size=8, node="simulated"), 1)
    return Checkpoints(run, CheckpointConfig(mode="background", keep=KEPT), FakeEngine(1), ranks, lambda *_: [])


def save(checkpoints, run, step, size):
    """Save and commit, and let the other ranks have written their files."""
    checkpoints.save(step, {"samples_done": step})
    checkpoints.commit()
    (newest, *_) = committed.tags(run)
    for rank in range(size):
        (newest / state_file(rank)).write_bytes(b"x" * PART_BYTES)


def looks_of_a_commit(tmp_path, calls, size):
    """Calls of a commit beside KEPT older checkpoints: in the process that wrote them, and in one that goes on."""
    run = RunDir(tmp_path / str(size))
    first = checkpoints_of(run, size)
    for step in range(1, KEPT + 2):
        save(first, run, step, size)
    counts = []
    for checkpoints, step in ((first, KEPT + 2), (checkpoints_of(run, size), KEPT + 3)):
        if checkpoints is not first:
            checkpoints._look_at_older(committed.tags(run)[0], committed.tags(run))
        checkpoints.save(step, {"samples_done": step})
        calls.clear()
        checkpoints.commit()
        counts.append(len(calls))
        assert not any(committed.PART_PREFIX in path for _, path in calls)
        (newest, *_) = committed.tags(run)
        for rank in range(size):
            (newest / state_file(rank)).write_bytes(b"x" * PART_BYTES)
        checkpoints.finish()
        assert [committed.step_of(tag) for tag in committed.tags(run)] == list(range(step, step - KEPT, -1))
        assert not list(run.checkpoints.glob(".tmp-*"))
    return counts


def test_a_commit_looks_at_no_more_files_with_more_ranks(tmp_path, calls):
    assert looks_of_a_commit(tmp_path, calls, 8) == looks_of_a_commit(tmp_path, calls, 48)


def test_ranks_share_the_look_at_the_checkpoints_of_an_earlier_process(tmp_path, calls):
    run, size = RunDir(tmp_path), 16
    writer = checkpoints_of(run, size)
    for step in (1, 2, 3):
        save(writer, run, step, size)
    again = checkpoints_of(run, size)
    calls.clear()
    again._look_at_older(committed.tags(run)[0], committed.tags(run))
    looked_at = {path for _, path in calls if committed.PART_PREFIX in path}
    assert len(looked_at) == 2  # one of each older checkpoint, a sixteenth of their files


def test_a_checkpoint_that_lost_a_ranks_file_before_the_start_goes_and_one_that_is_copied_in_counts(tmp_path):
    run, size = RunDir(tmp_path), 8
    writer = checkpoints_of(run, size)
    for step in (10, 20, 30):
        save(writer, run, step, size)
    shutil.copytree(run.checkpoints / committed.tag_name(10), tmp_path / "copy")
    (run.checkpoints / committed.tag_name(20) / state_file(5)).unlink()
    older = OlderCheckpoints(run, CheckpointConfig(keep=2))
    older.prune(run.checkpoints / committed.tag_name(30))
    older.wait()
    assert [committed.step_of(tag) for tag in committed.tags(run)] == [30, 10]
    shutil.copytree(tmp_path / "copy", run.checkpoints / committed.tag_name(25))
    older.prune(run.checkpoints / committed.tag_name(30))
    older.wait()
    assert [committed.step_of(tag) for tag in committed.tags(run)] == [30, 25]


def test_what_cannot_be_deleted_is_named_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    run, size = RunDir(tmp_path), 8
    writer = checkpoints_of(run, size)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in range(1, KEPT + 2):
        save(writer, run, step, size)
    writer.finish()
    assert "an older checkpoint could not be deleted ([Errno 5] Input/output error)" in capsys.readouterr().err
    assert [committed.step_of(tag) for tag in committed.tags(run)] == [4, 3, 2]
