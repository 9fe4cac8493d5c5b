"""A real process is killed with SIGKILL at every step of a save; the run must go on from a complete checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FileEngine, checkpoints_of

from mimscale.train.run_dir import RunDir

# A process for each n: it saves step 1, then dies at the n-th file operation of saving step 2, on whichever thread.
PROGRAM = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fakes import FileEngine, checkpoints_of
from mimscale.train.run_dir import RunDir

def save(run, left):
    engine = FileEngine()
    checkpoints = checkpoints_of(RunDir(run), engine, keep=1, mode={mode!r})
    engine.state = 1
    checkpoints.save(1, {{"samples_done": 1}})
    checkpoints.commit()

    def dying(function):
        def call(*arguments, **options):
            nonlocal left
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
    checkpoints.finish()

codes = []
while not codes or codes[-1] != 0:
    process = os.fork()
    if process == 0:
        save(Path({root!r}) / f"run{{len(codes)}}", len(codes))
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.parametrize("mode", ["background", "sync"])
def test_a_kill_at_any_operation_of_a_save_leaves_a_complete_checkpoint(tmp_path, mode):
    program = PROGRAM.format(tests=str(Path(__file__).parent.parent), root=str(tmp_path), mode=mode)
    ended = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    *killed, whole = json.loads(ended.stdout)
    assert (set(killed), whole) == ({-9}, 0), ended.stderr
    assert len(killed) > 15, "the kills did not reach the protocol"
    survived = []
    for operations in range(len(killed) + 1):
        run, engine = RunDir(tmp_path / f"run{operations}"), FileEngine()
        restored = checkpoints_of(run, engine).restore()
        assert restored.step in (1, 2)
        assert engine.state == restored.step == restored.position["samples_done"]
        assert not list(run.checkpoints.glob(".tmp-*"))
        survived.append(restored.step)
    assert survived[0] == 1
    assert survived[-1] == 2
    assert survived == sorted(survived), "an older checkpoint after a newer one was committed"
