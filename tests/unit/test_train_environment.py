import os
import subprocess
import time

from launch.snapshot import snapshot_code
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
    for name in ("mimscale/cli.py", "mimscale/recipes/demo/pretrain.yaml", "launch/profiles/local.yaml"):
        assert (first / name).is_file()


def test_only_the_lock_of_a_build_that_was_killed_is_removed(tmp_path, capsys):
    for name, age_s in (("killed", STALE_BUILD_S + 60), ("going_on", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age_s,) * 2)
    remove_stale_build_locks(tmp_path)
    remove_stale_build_locks(tmp_path / "nowhere")
    assert [lock.parent.name for lock in tmp_path.glob("*/lock")] == ["going_on"]
    assert "killed/lock: removed" in capsys.readouterr().err
