import json
import os
import socket
import subprocess
import sys
import time

import pytest
from processes import write_lock

from mimscale.errors import ConfigError, LaunchError
from mimscale.train.config import FREE_KEYS
from mimscale.train.run_dir import RunDir
from mimscale.world import Process

TREE = {"steps": 10, "seed": 1, "checkpoint": {"keep": 3}, "model": {"dim": 8}}


def opened(run: RunDir, tree: dict) -> None:
    run.open(tree, json.dumps(tree), free_keys=FREE_KEYS)


def test_a_run_continues_with_other_steps_and_checkpoint_settings(tmp_path):
    run = RunDir(tmp_path / "run")
    opened(run, TREE)
    opened(run, TREE | {"steps": 20, "checkpoint": {"keep": 1}})
    assert run.read_config_tree()["steps"] == 20


def test_the_config_of_a_run_that_has_saved_nothing_may_be_put_right(tmp_path):
    run = RunDir(tmp_path / "run")
    opened(run, TREE)
    opened(run, TREE | {"seed": 2, "model": {"dim": 16}})
    assert run.read_config_tree()["model"] == {"dim": 16}


def test_a_run_of_another_model_or_order_is_refused_with_the_differing_keys(tmp_path):
    run = RunDir(tmp_path / "run")
    opened(run, TREE)
    (run.checkpoints / "step_00000005").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        opened(run, TREE | {"seed": 2, "model": {"dim": 16}})
    assert "model.dim: 8 -> 16" in str(caught.value)
    assert "seed: 1 -> 2" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert run.read_config_tree() == TREE


def test_moving_aside_keeps_the_old_run(tmp_path):
    run = RunDir(tmp_path / "run")
    opened(run, TREE)
    run.move_aside()
    assert not run.path.exists()
    (kept,) = tmp_path.iterdir()
    assert RunDir(kept).read_config_tree() == TREE


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.locked("first"), pytest.raises(LaunchError, match=r"job first .* is writing here"), run.locked("second"):
        pass
    with run.locked("third"):
        assert json.loads(run.lock.read_text())["holder"] == "job third"
    assert not run.lock.exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = int(finished.stdout)
    write_lock(run.lock, "job 1", pid=dead)
    with run.locked("new"):
        assert json.loads(run.lock.read_text())["process"]["pid"] == os.getpid()


def test_the_lock_of_another_host_counts_until_its_last_sign_of_life_is_old(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_lock(run.lock, "job far", pid=1, host="elsewhere")
    sign = run.lock.with_name("lock.json.alive")
    sign.write_text(json.dumps({"time_s": time.time() - 300}))
    with pytest.raises(LaunchError, match="job far"), run.locked("new"):
        pass
    sign.write_text(json.dumps({"time_s": time.time() - 700}))
    with run.locked("new"):
        pass


def test_a_line_of_metrics_cut_by_a_kill_is_left_out(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_a_folder_without_config_is_no_run_directory(tmp_path):
    with pytest.raises(ConfigError, match="this is no run directory"):
        RunDir(tmp_path).read_config_tree()


def test_ranks_are_listed_while_they_live(tmp_path):
    run = RunDir(tmp_path)
    with run.registered(3):
        assert run.living_ranks() == {3: os.getpid()}
    assert run.living_ranks() == {}


def test_a_later_process_with_the_same_id_is_another_one():
    assert Process.this().is_alive()
    assert not Process(os.getpid(), socket.gethostname(), start_ticks=1).is_alive()


def test_a_lock_that_is_no_lock_is_not_taken_over(tmp_path):
    run = RunDir(tmp_path)
    run.lock.write_text("{")
    with pytest.raises(LaunchError, match=r"no lock file of this version; remove it"), run.locked("new"):
        pass


@pytest.mark.parametrize("left_by_a_dead_process", [False, True])
def test_of_many_that_want_the_lock_at_once_exactly_one_gets_it(tmp_path, left_by_a_dead_process):
    if left_by_a_dead_process:
        write_lock(RunDir(tmp_path).lock, "job 1", pid=2**22 - 1)
    program = (
        "import sys, time; from pathlib import Path; from mimscale.train.run_dir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).locked('a'):\n    print('mine', flush=True); time.sleep(3)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=60) for process in started]
    assert [out for out, _ in said].count(b"mine\n") == 1
    assert sum(b"is writing here" in err or b"at the same moment" in err for _, err in said) == 3
