"""Every file of a real checkpoint is damaged in turn: the broken one is named, and the one before it is used."""

import contextlib
import errno
import json
import time
from pathlib import Path

import pytest
from fakes import FileEngine, checkpoints_of
from fault_injector import DAMAGES, clock_jump, failing_write, flip_bit, restored, slow_disk
from rank_pool import run_ranks
from stream_stores import write_store
from tiny_runs import SHAPES, pretrain_words, run_of

from mimscale.errors import CheckpointError
from mimscale.report.inspect import describe_run
from mimscale.train import committed
from mimscale.train.run_dir import RunDir


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The command line of a run that has finished 4 steps with two checkpoints."""
    store = tmp_path_factory.mktemp("store")
    write_store(store, SHAPES)
    words = pretrain_words(store, tmp_path_factory.mktemp("runs") / "run", "steps=4", "checkpoint.every_steps=2")
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    return words


def files_of(tag: Path) -> list[Path]:
    return sorted(path for path in tag.rglob("*") if path.is_file())


@pytest.mark.two_process
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_checkpoint_is_named_and_the_one_before_is_used(words, damage, capsys, survived):
    run = run_of(words)
    newest, before = committed.tags(run)
    names = [path.relative_to(newest) for path in files_of(newest)]
    assert {"weights.safetensors", "contract.json", "manifest.json"} <= {name.name for name in names}
    for name in names:
        with restored(newest):
            DAMAGES[damage](newest / name)
            assert committed.newest(run) == before, f"{name} {damage}"
            said = capsys.readouterr().err
            assert newest.name in said, f"{name} {damage}"
            assert name.name in said, f"{name} {damage}"
        survived[f"file of a checkpoint {damage}"] += 1
    assert committed.newest(run) == newest, "the files are back"


@pytest.mark.two_process
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_with_the_same_weights(words, survived):
    run = run_of(words)
    newest = committed.tags(run)[0]
    weights = (newest / "weights.safetensors").read_bytes()
    flip_bit(max(files_of(newest), key=lambda path: path.stat().st_size))
    (ended,) = run_ranks(words, size=1)
    assert ended.code == 0, ended.err
    assert f"checkpoint passed over: {newest.name}" in ended.err
    assert "continues at step 2 of 4" in ended.err
    assert (newest / "weights.safetensors").read_bytes() == weights
    assert committed.why_not_loadable(newest) is None
    survived["run that goes on from the checkpoint before"] += 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["disk full", "input/output error"])
def test_a_write_that_fails_anywhere_in_a_save_leaves_the_last_good_checkpoint(number, tmp_path, survived):
    run, nth = RunDir(tmp_path / "run"), 0
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, keep=1)
    engine.state = 1
    checkpoints.save(1, {"samples_done": 1})
    engine.state = 2
    while True:
        with failing_write(nth, number, below=run.path) as written, contextlib.suppress(CheckpointError):
            checkpoints.save(2, {"samples_done": 2})
        if len(written) <= nth:
            break
        again = FileEngine()
        step = checkpoints_of(run, again).restore().step
        assert step == again.state
        assert not list(run.checkpoints.glob(".tmp-*"))
        if step == 2:  # it was committed, and what follows failed: the save that comes next clears up
            assert {committed.step_of(tag) for tag in committed.tags(run)} <= {1, 2}
            break
        survived[f"write that fails with {errno.errorcode[number]}"] += 1
        nth += 1
    assert nth > 5, "the failures did not reach the protocol"


def test_on_a_slow_disk_training_stands_still_for_the_copy_alone(tmp_path, survived):
    run, engine = RunDir(tmp_path / "run"), FileEngine()
    checkpoints = checkpoints_of(run, engine, mode="background")
    with slow_disk(0.2):
        began_s = time.perf_counter()
        checkpoints.save(1, {"samples_done": 1})
        away_s = time.perf_counter() - began_s
        writing = checkpoints.writing()
        while not checkpoints.is_written():
            time.sleep(0.01)
        assert checkpoints.writing() is None
    saved = checkpoints.commit()
    assert writing.name == "step_00000001"
    assert away_s < 0.2 < saved.write_s
    assert checkpoints_of(run, FileEngine()).restore().step == 1
    survived["slow disk"] += 1


def test_a_clock_that_jumps_changes_neither_order_nor_retention(tmp_path, survived):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "config.yaml").write_text(json.dumps({"kind": "pretrain", "checkpoint": {"keep": 2}}))
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, keep=2)
    for step, seconds in enumerate([0.0, 1e8, -1e8, 3600.0], 1):
        engine.state = step
        with clock_jump(seconds):
            checkpoints.save(step, {"samples_done": step})
    told = describe_run(run.path)["checkpoints"]
    assert [(tag["step"], tag["kept_as"]) for tag in told] == [(4, ["newest"]), (3, ["one of the last 2"])]
    assert checkpoints_of(run, FileEngine()).restore().step == 4
    survived["jump of the clock"] += 3
