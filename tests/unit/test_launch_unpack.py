"""An environment on the disk of a node: complete or absent, whoever unpacks it."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.unpack import main, unpack
from mimscale.errors import LaunchError


def _archive(folder: Path, *names: str) -> Path:
    source = folder / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    subprocess.run(["tar", "-C", source, "-czf", folder / "env.tar.gz", "."], check=True)
    return folder / "env.tar.gz"


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    archive, target = _archive(tmp_path, "bin/python", "lib/a.py"), tmp_path / "node" / "env"
    unpack(archive, target)
    assert (target / "lib" / "a.py").read_text() == "lib/a.py"
    assert target.stat().st_mode & 0o077 == 0
    archive.write_bytes(b"broken now, and not needed again")
    unpack(archive, target)
    assert [path.name for path in target.parent.iterdir()] == ["env"]


def test_of_several_tasks_on_one_node_each_finds_it_complete(tmp_path: Path) -> None:
    archive, target = _archive(tmp_path, "bin/python", *(f"lib/{n}.py" for n in range(50))), tmp_path / "env"
    command = [sys.executable, "-m", "launch.unpack", str(archive), str(target)]
    tasks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for task in tasks:
        shown, _ = task.communicate(timeout=60)
        assert task.returncode == 0
        assert f"{target} ready in" in shown
    assert len(list((target / "lib").iterdir())) == 50
    assert not list(tmp_path.glob(".tmp-*"))


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
    assert list(target.parent.iterdir()) == []
    assert main([str(archive), str(target)]) == 5
    assert str(archive) in capsys.readouterr().err
