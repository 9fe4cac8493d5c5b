"""A real process is killed with SIGKILL at every step of a save; the run must go on from a complete checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FileEngine, checkpoints_of

from mimscale.train.run_dir import RunDir

# Saves step 1, then dies at the n-th file operation of saving step 2.
PROGRAM = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fakes import FileEngine, checkpoints_of
from mimscale.train.run_dir import RunDir

engine = FileEngine()
checkpoints = checkpoints_of(RunDir(Path({run!r})), engine, keep=1)
engine.state = 1
checkpoints.save(1, {{"samples_done": 1}})
left = {operations}

def dying(function):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **options)
    return call

for owner, name in ((os, "fsync"), (os, "open"), (Path, "rename"), (Path, "replace"), (Path, "open"),
                    (Path, "write_text"), (Path, "mkdir"), (shutil, "rmtree")):
    setattr(owner, name, dying(getattr(owner, name)))
engine.state = 2
checkpoints.save(2, {{"samples_done": 2}})
print("complete after", {operations} - left, "operations")
"""


def save_and_die(run: Path, operations: int) -> subprocess.CompletedProcess:
    program = PROGRAM.format(tests=str(Path(__file__).parent.parent), run=str(run), operations=operations)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_a_kill_at_any_operation_of_a_save_leaves_a_complete_checkpoint(tmp_path):
    survived, operations = [], 0
    while True:
        run = RunDir(tmp_path / f"run{operations}")
        finished = save_and_die(run.path, operations)
        engine = FileEngine()
        restored = checkpoints_of(run, engine).restore()
        assert restored.step in (1, 2)
        assert engine.state == restored.step == restored.position["samples_done"]
        assert not list(run.checkpoints.glob(".tmp-*"))
        survived.append(restored.step)
        if finished.returncode == 0:
            break
        assert finished.returncode == -9, finished.stderr
        operations += 1
    assert operations > 15, "the kills did not reach the protocol"
    assert survived[0] == 1
    assert survived[-1] == 2
    assert survived == sorted(survived), "an older checkpoint after a newer one was committed"


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
