import os
import subprocess
import sys
import time
from pathlib import Path

import launch
import mimscale
from launch.snapshot import snapshot_code
from mimscale.store import native
from mimscale.train.environment import STALE_BUILD_S, git_commit, recorded_variables, remove_stale_build_locks


def test_secrets_are_not_recorded():
    environment = {
        "OMP_NUM_THREADS": "1",
        "MIMSCALE_API_TOKEN": "x",
        "HOME": "/root",
        "NCCL_DEBUG": "INFO",
        "DS_KEY": "y",
    }
    assert recorded_variables(environment) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_the_same_code_is_copied_once_and_completely(tmp_path):
    first, second = snapshot_code(tmp_path / "code"), snapshot_code(tmp_path / "code")
    assert first == second
    assert [path.name for path in (tmp_path / "code").iterdir()] == [first.name]
    for package in (mimscale, launch):
        root = Path(package.__file__).parent
        files = {path.relative_to(root.parent) for path in root.rglob("*") if path.is_file()}
        files = {path for path in files if "__pycache__" not in path.parts}
        assert {path.relative_to(first) for path in (first / root.name).rglob("*") if path.is_file()} == files
        assert all((first / path).read_bytes() == (root.parent / path).read_bytes() for path in files)


def test_a_copy_of_the_code_reads_crops_by_what_was_compiled_for_the_original(tmp_path):
    code = snapshot_code(tmp_path / "code")
    program = "from mimscale.store import native; print(native.__file__, native.description, sep='|')"
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    file, description = done.stdout.strip().split("|")
    assert Path(file).is_relative_to(code)
    assert description == native.description


def test_only_the_lock_of_a_build_that_was_killed_is_removed(tmp_path, capsys):
    for name, age_s in (("killed", STALE_BUILD_S + 60), ("going_on", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age_s,) * 2)
    remove_stale_build_locks(tmp_path)
    remove_stale_build_locks(tmp_path / "nowhere")
    assert [lock.parent.name for lock in tmp_path.glob("*/lock")] == ["going_on"]
    assert "killed/lock: removed" in capsys.readouterr().err


def test_memory_that_a_step_frees_is_not_given_back_to_the_kernel():
    program = """
import resource
from mimscale.train.environment import keep_freed_memory
def faults_of_two_steps():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(b'1') * 2**26  # 16 384 pages, or 32 huge ones
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults_of_two_steps(), keep_freed_memory(), faults_of_two_steps())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    before, is_kept, after = ended.stdout.split()
    assert is_kept == "True"
    assert 4 * int(after) < int(before)
