"""`slurm/devcluster/up` and `down`: they can be repeated, say what is wrong, and leave nothing behind."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from devcluster import PIDS, SCRIPTS, DevCluster, Setup

pytestmark = pytest.mark.timeout(200)
UP = str(SCRIPTS / "up")


def traces() -> list[str]:
    """What a cluster leaves on the machine while it is up."""
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    hosts = [line for line in Path("/etc/hosts").read_text().splitlines() if "devcluster" in line]
    return [line for line in (*links, *spaces) if "msdev" in line] + hosts


def pids() -> dict[str, str]:
    return {path.name: path.read_text() for path in PIDS.iterdir()}


def test_up_again_changes_nothing_starts_what_has_died_and_refuses_another_setup(cluster: DevCluster) -> None:
    before = pids()
    again = cluster.up()
    assert "is up already" in again.stderr
    assert again.stdout == f"export SLURM_CONF={cluster.folder}/slurm.conf\n"
    assert pids() == before

    cluster.kill("node1")
    read_end, write_end = os.pipe()
    up = [UP, "--dir", str(cluster.folder), *cluster.setup.words()]
    again = subprocess.run(up, capture_output=True, text=True, check=True, pass_fds=[write_end], timeout=60)
    assert "started again: node1" in again.stderr
    os.close(write_end)
    os.set_blocking(read_end, False)
    assert os.read(read_end, 1) == b"", "a daemon keeps open what the caller of `up` had open"
    os.close(read_end)
    assert {name for name, text in pids().items() if text != before[name]} == {"node1"}

    other = subprocess.run(
        [UP, "--dir", str(cluster.folder), "--nodes", "3"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "nodes=2 preempt=requeue-usr2 accounting=yes" in other.stderr
    assert "down first" in other.stderr
    assert pids().keys() == before.keys()


@pytest.mark.parametrize(
    "after_s", [pytest.param(0.3, marks=pytest.mark.soak), 1.0, pytest.param(1.8, marks=pytest.mark.soak)]
)
def test_what_a_killed_up_leaves_is_cleaned_by_the_next_and_down_leaves_nothing(
    machine: DevCluster, tmp_path: Path, after_s: float
) -> None:
    if machine.setup is not None:
        machine.take_down()
    killed = subprocess.Popen([UP, "--dir", str(tmp_path), "--nodes", "3"], stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    killed.kill()
    killed.wait()
    began_s = time.monotonic()
    machine.bring_up(Setup(accounting=False))
    assert time.monotonic() - began_s < 30
    assert len(machine.command("sinfo", "--Node", "--noheader", "--partition=main").splitlines()) == 2
    processes = [machine.pid(name) for name in pids()]
    shutil.rmtree(machine.folder)  # as a cleaner of /tmp would
    machine.take_down()
    assert traces() == []
    left = [
        pid for pid in processes if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert left == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--nodes", "0"], "--nodes 0: expected a number from 1 to 64"),
        (["--preempt", "suspend"], "--preempt suspend: expected requeue-usr2, requeue-term or cancel"),
        (["--dir", "/tmp/a b"], "--dir /tmp/a b: expected a path of letters"),
        (["--foo"], "unknown argument --foo"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_made(
    machine: DevCluster, words: list[str], complaint: str
) -> None:
    before = traces()
    done = subprocess.run([UP, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert traces() == before


def test_missing_programs_are_named_with_their_debian_packages(machine: DevCluster, tmp_path: Path) -> None:
    for name in ("bash", "dirname", "readlink", "id", "sort", "xargs", "printf", "echo"):
        found = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / name).symlink_to(found)
    # In a mount namespace of its own, where Slurm's programs are out of reach.
    hide = f"mount -t tmpfs none /usr/sbin && mount -t tmpfs none /sbin; PATH={tmp_path} exec bash {UP}"
    done = subprocess.run(["unshare", "--mount", "bash", "-c", hide], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for package in ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "slurmdbd", "mariadb-server"):
        assert package in done.stderr
