import json
import shutil
import threading
from types import SimpleNamespace

import pytest
from fakes import FileEngine, OneRank, checkpoints_of
from fault_injector import flip_bit, run_program

from mimscale.errors import CheckpointError
from mimscale.train import committed
from mimscale.train.run_dir import RunDir
from mimscale.world import World


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def saved(run, *steps, keep=9):
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, keep=keep)
    for step in steps:
        engine.state = step
        checkpoints.save(step, {"samples_done": 2 * step})
    return checkpoints


def test_a_saved_state_is_restored_with_its_position(run):
    saved(run, 10, 20)
    engine = FileEngine()
    restored = checkpoints_of(run, engine).restore()
    assert (engine.state, restored.step, restored.position) == (20, 20, {"samples_done": 40})


def test_a_run_without_checkpoints_starts_at_step_0(run):
    restored = checkpoints_of(run, FileEngine()).restore()
    assert (restored.step, restored.position) == (0, None)


def test_only_the_newest_ones_are_kept(run):
    saved(run, 1, 2, 3, 4, keep=2)
    assert [tag.name for tag in committed.tags(run)] == ["step_00000004", "step_00000003"]
    assert (run.checkpoints / "newest").read_text() == "step_00000004\n"
    assert not list(run.checkpoints.glob(".tmp-*"))


BREAKS = {
    "sha256 differs": lambda tag: flip_bit(tag / "state-rank00000.json"),
    "bytes instead of": lambda tag: (tag / "weights.safetensors").write_text(""),
    "is missing": lambda tag: (tag / "weights.safetensors").unlink(),
    "no readable manifest.json": lambda tag: (tag / "manifest.json").unlink(),
    "no readable manifest.json (Expecting": lambda tag: (tag / "manifest.json").write_text("{"),
    "manifest version 7": lambda tag: (tag / "manifest.json").write_text('{"manifest_version": 7}'),
}


@pytest.mark.parametrize("reason", BREAKS)
def test_a_broken_newest_checkpoint_is_passed_over_loudly(run, capsys, reason):
    saved(run, 10, 20)
    BREAKS[reason](run.checkpoints / "step_00000020")
    engine = FileEngine()
    assert checkpoints_of(run, engine).restore().step == 10
    assert engine.state == 10
    heard = capsys.readouterr().err
    assert "step_00000020" in heard
    assert reason in heard


def test_when_all_are_broken_each_is_named_and_the_run_does_not_start_from_step_0(run):
    saved(run, 10, 20)
    flip_bit(run.checkpoints / "step_00000010" / "weights.safetensors")
    (run.checkpoints / "step_00000020" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints_of(run, FileEngine()).restore()
    message = str(caught.value)
    assert "step_00000010: weights.safetensors has other bytes" in message
    assert "step_00000020: no readable manifest.json" in message
    assert caught.value.exit_code == 4


def test_a_file_name_that_points_out_of_the_checkpoint_is_refused(run):
    saved(run, 10)
    path = run.checkpoints / "step_00000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../outside"] = {"bytes": 0, "sha256": ""}
    path.write_text(json.dumps(manifest))
    assert committed.why_not_loadable(path.parent) == "../../outside points out of the checkpoint"


def test_another_number_of_ranks_and_stage_continue_and_the_run_says_so(run, capsys):
    saved(run, 10)
    engine = FileEngine()
    engine.zero_stage = 3

    class Two(OneRank):
        world = World(size=2)

    assert checkpoints_of(run, engine, Two()).restore().step == 10
    assert engine.state == 10
    assert "step_00000010: ranks 1 -> 2, ZeRO stage 1 -> 3\n" in capsys.readouterr().err


def test_a_state_of_an_earlier_version_is_refused_and_its_weights_stay_readable(run):
    saved(run, 10)
    path = run.checkpoints / "step_00000010" / "manifest.json"
    path.write_text(path.read_text().replace('"manifest_version": 2', '"manifest_version": 1'))
    with pytest.raises(CheckpointError, match="manifest version 1 holds the training state in DeepSpeed's files"):
        checkpoints_of(run, FileEngine()).restore()
    assert committed.newest(run) == path.parent


def test_a_write_error_leaves_the_last_good_checkpoint_and_nothing_half_written(run):
    checkpoints = saved(run, 10)
    checkpoints._engine.error = OSError("no space left")
    with pytest.raises(CheckpointError, match=r"step_00000020: not saved .*\n  rank 0: no space left"):
        checkpoints.save(20, {"samples_done": 40})
    assert [tag.name for tag in committed.tags(run)] == ["step_00000010"]
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_ranks_at_different_samples_do_not_commit(run):
    checkpoints = saved(run, 10)

    class Disagreeing(OneRank):
        def gather_to_first(self, item):
            return [item, item | {"rank": 1, "position": {"samples_done": 39}}]

    checkpoints._ranks = Disagreeing()
    with pytest.raises(CheckpointError, match=r"rank 1 stands at another sample: {'samples_done': 39}"):
        checkpoints.save(20, {"samples_done": 40})
    assert [tag.name for tag in committed.tags(run)] == ["step_00000010"]


def test_a_second_save_of_the_same_step_does_nothing(run):
    checkpoints = saved(run, 10)
    shutil.rmtree(run.checkpoints / "step_00000010")
    checkpoints.save(10, {})
    assert committed.tags(run) == []


def test_a_background_save_is_committed_once_it_is_written(run):
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, mode="background")
    engine.state = 10
    engine.may_write.clear()
    assert checkpoints.save(10, {"samples_done": 20}) is None
    engine.state = 11  # training goes on
    assert not checkpoints.is_written()
    assert committed.tags(run) == []
    engine.may_write.set()
    saved = checkpoints.commit()
    assert (saved.step, saved.stall_s >= 0, saved.total_bytes > 0) == (10, True, True)
    assert not checkpoints.is_written()
    assert checkpoints.commit() is None
    restored = FileEngine()
    assert checkpoints_of(run, restored).restore().step == 10
    assert restored.state == 10


def test_the_next_save_waits_for_the_one_before(run):
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, mode="background")
    engine.may_write.clear()
    checkpoints.save(10, {})
    threading.Timer(0.2, engine.may_write.set).start()
    saved = checkpoints.save(20, {})
    assert saved.step == 10
    assert saved.stall_s > 0.1, "the wait is part of the stall"
    assert checkpoints.finish().step == 20
    assert [tag.name for tag in committed.tags(run)] == ["step_00000020", "step_00000010"]


SAVE_AND_LEAVE = """
from pathlib import Path
import fault_injector
from fakes import FileEngine, checkpoints_of
from mimscale.train.run_dir import RunDir

run = RunDir(Path(sys.argv[1]))
fault_injector.arm(fault_injector.hanging_write(0, below=run.checkpoints))
checkpoints_of(run, FileEngine(), mode="background").save(1, {})
sys.exit(3)
"""


def test_a_process_that_fails_does_not_wait_for_a_disk_that_hangs(run):
    assert run_program(SAVE_AND_LEAVE, str(run.path), timeout_s=20).returncode == 3


def save_and_commit(checkpoints, step):
    checkpoints.save(step, {})
    checkpoints.commit()


@pytest.mark.parametrize("mode", ["background", "sync"])
def test_after_a_failed_save_a_run_stops_or_goes_on_as_configured(run, capsys, mode):
    engine = FileEngine()
    checkpoints = checkpoints_of(run, engine, mode=mode)
    engine.error = OSError("no space left")
    with pytest.raises(CheckpointError, match="step_00000010: not saved"):
        save_and_commit(checkpoints, 10)

    checkpoints = checkpoints_of(run, engine, mode=mode, on_failure="continue")
    assert checkpoints.save(10, {}) is None
    assert checkpoints.commit() is None
    assert "Training goes on (checkpoint.on_failure=continue)" in capsys.readouterr().err
    engine.error = None
    checkpoints.save(20, {})
    checkpoints.finish()
    assert [tag.name for tag in committed.tags(run)] == ["step_00000020"]
    engine.error = OSError("no space left")
    checkpoints.save(30, {})
    with pytest.raises(CheckpointError, match="step_00000030: not saved"):
        checkpoints.finish()


def test_the_message_says_how_many_bytes_were_missing(run, monkeypatch):
    engine = FileEngine()
    engine.error = OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(CheckpointError, match=r"it takes 9 bytes, 3 are free on its disk, 6 bytes are missing\)"):
        checkpoints_of(run, engine).save(10, {})


def test_ranks_share_the_work_of_verifying(run):
    saved(run, 10)
    tag = run.checkpoints / "step_00000010"
    flip_bit(tag / "weights.safetensors")
    reasons = [committed.why_not_loadable(tag, share=(rank, 3)) for rank in range(3)]
    assert reasons == [None, None, "weights.safetensors has other bytes than were saved (sha256 differs)"]
