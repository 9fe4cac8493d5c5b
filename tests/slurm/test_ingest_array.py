"""Ingest as a job array: a killed task is done again, the merge waits for it, and the store is that of one machine."""

import sys
from pathlib import Path

import pytest
from devcluster import DevCluster, Site
from processes import kill_all
from store_samples import write_pairs

from launch.attempts import read_attempts

TASKS = 8
KILLED = TASKS - 1  # Slurm gives the last the number of the array itself
pytestmark = pytest.mark.timeout(600)


def task_processes(cluster: DevCluster, task: int) -> list[int]:
    """The processes that convert in one task of an array, on whichever node; not srun, which may start before them."""
    found = []
    for pid in (pid for node in (1, 2) for pid in cluster.processes(node)):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        converts = words.startswith(sys.executable.encode()) and b"submitit" in words
        if f"SLURM_ARRAY_TASK_ID={task}".encode() in variables and converts:
            found.append(pid)
    return found


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def test_an_array_with_a_killed_task_makes_the_store_of_a_local_ingest_byte_for_byte(
    cluster: DevCluster, site: Site
) -> None:
    site.profile(processes_per_node=1)
    key = site.folder / "subject_key"  # the same for both stores, or they would hide the subjects' names differently
    key.write_text("5a" * 32)
    key.chmod(0o600)
    pairs = write_pairs(site.folder / "sources", TASKS)
    words = [
        "demo/ingest",
        f"sources={{images: '{pairs['images']}', labels: '{pairs['labels']}'}}",
        "class_names=[air, dark, bright]",
        f"parts={TASKS}",
        "workers=1",
        f"subject_key={key}",
    ]
    local = cluster.mimscale("ingest", *words, "out=local", cwd=site.folder)
    assert local.returncode == 0, local.stderr

    done = site.try_submit("ingest", *words, "out=array", "--array", str(TASKS), nodes=1)
    assert done.returncode == 0, done.stderr
    cluster.runs.append(site.run("array.job"))
    victims = cluster.wait_for("the task to start", lambda: task_processes(cluster, KILLED))
    kill_all(victims)
    cluster.wait_for("the merge to end", lambda: site.is_settled("array.job"), timeout_s=300)
    outcome = site.newest("array.job").read_outcome()
    assert outcome is not None
    assert outcome.outcome == "finished"
    killed, again = read_attempts(site.newest("array.job", 2).attempts_file(KILLED))  # the merge came last
    assert (killed.cause, again.cause) == ("lost rank", "ended")
    others = [read_attempts(site.newest("array.job", 2).attempts_file(task)) for task in range(TASKS) if task != KILLED]
    assert [len(attempts) for attempts in others] == [1] * (TASKS - 1)
    assert files_of(site.folder / "array") == files_of(site.folder / "local")
