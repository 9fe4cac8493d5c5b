"""An environment on the disk of a node: complete or absent, whoever unpacks it, and whoever kills him."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import small_disk
from launch_fake_verb import wait_until

from launch.unpack import draft_of, main, unpack
from mimscale.errors import LaunchError


def _archive(folder: Path, *names: str) -> Path:
    source = folder / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    subprocess.run(["tar", "-C", source, "-czf", folder / "env.tar.gz", "."], check=True)
    return folder / "env.tar.gz"


def _command(archive: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "launch.unpack", str(archive), str(target)]


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    archive, target = _archive(tmp_path, "bin/python", "lib/a.py"), tmp_path / "node" / "env"
    assert unpack(archive, target)
    assert (target / "lib" / "a.py").read_text() == "lib/a.py"
    assert target.stat().st_mode & 0o077 == 0
    archive.write_bytes(b"broken now, and not needed again")
    assert not unpack(archive, target)
    assert sorted(path.name for path in target.parent.iterdir()) == [".env.lock", "env"]


def test_of_several_tasks_on_one_node_one_unpacks_and_each_finds_it_complete(tmp_path: Path) -> None:
    archive, target = _archive(tmp_path, "bin/python", *(f"lib/{n}.py" for n in range(50))), tmp_path / "env"
    tasks = [subprocess.Popen(_command(archive, target), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    shown = ""
    for task in tasks:
        shown += task.communicate(timeout=60)[0]
        assert task.returncode == 0
        assert len(list((target / "lib").iterdir())) == 50
    assert (shown.count(f"{target} unpacked on "), shown.count(f"{target} found on ")) == (1, 2)
    assert not draft_of(target).exists()


def test_what_a_killed_task_has_half_unpacked_is_not_used_and_does_not_stay(tmp_path: Path) -> None:
    archive, target = _archive(tmp_path, "bin/python", "lib/a.py"), tmp_path / "env"
    (tmp_path / "source" / "weights").write_bytes(os.urandom(100_000))
    slow = tmp_path / "slow.tar"
    os.mkfifo(slow)  # an archive whose end never comes
    task = subprocess.Popen(_command(slow, target))
    try:
        with slow.open("wb") as pipe:
            whole = subprocess.run(
                ["tar", "-C", tmp_path / "source", "-c", "."], capture_output=True, check=True
            ).stdout
            pipe.write(whole[: 5 * 10_240])  # records, as tar reads them
            pipe.flush()
            wait_until(lambda: draft_of(target).exists() and any(draft_of(target).iterdir()))
            task.send_signal(signal.SIGKILL)
    finally:
        task.kill()
        task.wait(timeout=20)
    assert draft_of(target).exists()
    assert not target.exists()
    (draft_of(target) / "stale.py").write_text("of the killed one")
    assert unpack(archive, target)
    assert sorted(path.name for path in target.iterdir()) == ["bin", "lib"]
    assert not draft_of(target).exists()


@pytest.mark.parametrize(
    ("names", "broken", "text"),
    [(("lib/a.py",), False, "holds no bin/python at its top"), (("bin/python",), True, "not unpacked as .* on ")],
)
def test_an_archive_that_cannot_be_used_leaves_nothing(
    tmp_path: Path, names: tuple[str, ...], broken: bool, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, target = _archive(tmp_path, *names), tmp_path / "node" / "env"
    if broken:
        archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(LaunchError, match=text):
        unpack(archive, target)
    assert [path.name for path in target.parent.iterdir()] == [".env.lock"]
    assert main([str(archive), str(target)]) == 5
    assert str(archive) in capsys.readouterr().err


def test_an_interpreter_that_the_node_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "source" / "bin").mkdir(parents=True)
    (tmp_path / "source" / "bin" / "python").symlink_to("/none/python3.11")
    with pytest.raises(LaunchError, match=r"its bin/python is a link to /none/python3.11, which is not there; install"):
        unpack(_archive(tmp_path, "lib/a.py"), tmp_path / "env")


def test_a_full_disk_is_named_with_the_way_out_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_bytes(os.urandom(300_000))
    archive = _archive(tmp_path, "bin/python")
    with small_disk(tmp_path / "disk", 128) as disk:
        with pytest.raises(LaunchError, match=r"env.tar.gz: not unpacked as .*: the disk is full .*slurm.node_dir"):
            unpack(archive, disk / "env")
        assert [path.name for path in disk.iterdir()] == [".env.lock"]


def _is_a_link(folder: Path) -> None:
    (folder.parent / "theirs").mkdir()
    folder.symlink_to(folder.parent / "theirs")


def _is_open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize("put_there", [_is_a_link, _is_open_to_all])
def test_a_folder_that_somebody_else_could_have_filled_is_not_used(
    tmp_path: Path, put_there: Callable[[Path], None]
) -> None:
    archive, target = _archive(tmp_path, "bin/python"), tmp_path / "env"
    put_there(target)
    with pytest.raises(LaunchError, match=r"env on .*: others made it or may write to it.* remove it, or name another"):
        unpack(archive, target)
