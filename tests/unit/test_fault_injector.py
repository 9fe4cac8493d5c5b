"""The faults that other tests plant do happen, and are gone after their block."""

import errno
import os
import subprocess
import time

import pytest
from fault_injector import DAMAGES, clock_jump, failing_write, restored, run_program, slow_disk


@pytest.mark.parametrize(("damage", "size"), [("truncated", 66), ("bit flipped", 100), ("emptied", 0)])
def test_a_damaged_file_is_another_file_of_the_size_that_its_damage_says(damage, size, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    DAMAGES[damage](file)
    assert file.stat().st_size == size
    assert file.read_bytes() != bytes(100)


def test_a_folder_is_put_back_to_its_bytes(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one").write_text("1")
    (folder / "two").write_text("2")
    with restored(folder):
        for damage, name in (("deleted", "one"), ("emptied", "two")):
            DAMAGES[damage](folder / name)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"one": "1", "two": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_nth_write_or_fsync_fails_and_only_below_the_folder(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with failing_write(2, errno.EIO, below=disk) as written:
        (tmp_path / "elsewhere").write_text("fine")
        (disk / "first").write_text("fine")
        with (disk / "second").open("wb") as file:
            file.write(b"fine")
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(file.fileno())
        with pytest.raises(OSError, match="Input/output error"):
            (disk / "third").write_text("no more")
    assert [path.name for path in written] == ["first", "second", "second", "third"]
    (disk / "third").write_text("fine again")


def test_the_nth_write_hangs_and_those_before_do_not(tmp_path):
    text = """
from pathlib import Path
import fault_injector
fault_injector.arm(fault_injector.hanging_write(1, below=Path(sys.argv[1]) / "disk"))
for name in ("disk/first", "elsewhere", "disk/second"):
    (Path(sys.argv[1]) / name).write_text(name)
"""
    (tmp_path / "disk").mkdir()
    with pytest.raises(subprocess.TimeoutExpired):
        run_program(text, str(tmp_path), timeout_s=1.5)
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        "first": "disk/first",
        "elsewhere": "elsewhere",
        "second": "",
    }


def test_the_clock_on_the_wall_jumps_and_the_monotonic_one_does_not():
    wall_s, monotonic_s = time.time(), time.monotonic()
    with clock_jump(-1e6):
        assert time.time() < wall_s - 9e5
        assert time.monotonic() >= monotonic_s
    assert time.time() >= wall_s


def test_each_fsync_of_a_slow_disk_takes_its_time(tmp_path):
    with (tmp_path / "file").open("wb") as file, slow_disk(0.05):
        start_s = time.perf_counter()
        os.fsync(file.fileno())
        assert time.perf_counter() - start_s >= 0.05


@pytest.mark.parametrize(
    ("fault", "code", "left"),
    [
        ('kill_at("pathlib:Path.rename")', -9, ["made"]),
        ('kill_at("pathlib:Path.rename", call=1)', -9, ["renamed"]),
        ('kill_at("pathlib:Path.rename", call=2)', 0, ["twice"]),
        ("kill_at_operation(0)", -9, []),
        ("kill_at_operation(1)", -9, ["made"]),
        ("kill_at_random_time(seed=1, within_s=0.01)", -14, None),
    ],
)
def test_a_process_dies_where_it_is_told_to(fault, code, left, tmp_path):
    sleeps = "import time; time.sleep(60)" if "random" in fault else ""
    text = f"""
from pathlib import Path
import fault_injector
fault_injector.arm(fault_injector.{fault})
{sleeps}
path = Path(sys.argv[1])
(path / "made").mkdir()
(path / "made").rename(path / "renamed")
(path / "renamed").rename(path / "twice")
"""
    folder = tmp_path / "folder"
    folder.mkdir()
    ended = run_program(text, str(folder))
    assert ended.returncode == code, ended.stderr
    if left is not None:
        assert [path.name for path in folder.iterdir()] == left
