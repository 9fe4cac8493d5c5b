"""status, logs and cancel tell the truth with accounting off, without a controller, and over many runs; many submit."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from devcluster import DevCluster, Setup, Site
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.folder import job_folders

pytestmark = pytest.mark.timeout(900)
STATE_SAVED_S = 6  # slurmctld writes what has changed within five
CONTROLLER_AWAY_S = 20.0


@pytest.mark.parametrize("cluster", [Setup(accounting=False)], ids=["no-accounting"], indirect=True)
def test_a_run_is_seen_and_steered_without_accounts_and_while_the_controller_is_away(
    cluster: DevCluster, site: Site
) -> None:
    site.profile(processes_per_node=1)
    job_id = site.submit("run", "checkpoint.every_steps=1000000", steps=1_000_000)
    site.wait_for_step(job_id, 5)
    (status,) = site.status()
    assert (status["state"], status["job_id"], status["nodes"]) == ("running", job_id, "node[1-2]")
    assert "step" in logs(cluster, site)

    time.sleep(STATE_SAVED_S)  # or it comes back without having heard that the job has started
    cluster.kill("slurmctld")
    gone_s = time.monotonic()
    (status,) = site.status()
    assert status["state"] == "unknown"
    assert "does not answer" in status["reason"]
    before = status["step"]
    assert "step" in logs(cluster, site)  # needs no controller
    unheard = cluster.mimscale("cancel", "run", cwd=site.folder)
    assert unheard.returncode == 5
    assert "give the same command again when Slurm answers" in unheard.stderr
    time.sleep(max(0.0, CONTROLLER_AWAY_S - (time.monotonic() - gone_s)))
    assert site.status()[0]["step"] > before  # the run does not care
    cluster.up()
    assert site.status()[0]["state"] == "running"

    done = cluster.mimscale("cancel", "run", cwd=site.folder)
    assert done.returncode == 0, done.stderr
    cluster.wait_for("the job to save and stop", site.is_settled)
    (status,) = site.status()
    assert status["state"] == "cancelled"
    assert status["last_checkpoint"] == site.newest_step()
    cluster.wait_for("an empty queue", lambda: not cluster.command("squeue", "--noheader", "--format=%i"), timeout_s=60)


def test_an_administrator_requeues_a_run_without_loss_and_scancel_ends_it_for_good(
    cluster: DevCluster, site: Site
) -> None:
    site.profile(processes_per_node=1)
    meter = "meter={record_samples: true, tensorboard: true}"
    job_id = site.submit("run", "checkpoint.every_steps=1000000", meter, steps=1_000_000)
    site.wait_for_step(job_id, 5)
    cluster.command("scontrol", "requeue", job_id)

    def goes_on() -> bool:
        attempts = site.attempts()
        return len(attempts) == 2 and site.newest_step() > attempts[1].first_step + 5

    cluster.wait_for("the run to go on", goes_on)
    assert site.status()[0]["restarts"] == 1
    cluster.command("scancel", job_id)
    cluster.wait_for("the job to save and stop", site.is_settled)
    first, second = site.attempts()
    assert (first.cause, second.first_step, second.cause) == ("requeued from outside", first.last_step, "stopped")
    assert second.first_step >= 5  # only a save at the requeue itself can hold them
    assert second.last_step == site.newest_step()
    assert site.logged_steps() == list(range(1, site.newest_step() + 1))
    (status,) = site.status()
    assert (status["state"], status["last_checkpoint"]) == ("interrupted", second.last_step)
    assert "cancelled with scancel" in status["reason"]
    name = f"--name={site.job_name()}"
    cluster.wait_for("an empty queue", lambda: not cluster.command("squeue", "--noheader", name), timeout_s=60)
    assert len(site.attempts()) == 2
    curves = EventAccumulator(str(site.run().tensorboard), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in curves.Scalars("loss")] == site.logged_steps()


def logs(cluster: DevCluster, site: Site) -> str:
    done = cluster.mimscale("logs", "run", cwd=site.folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def occupy(cluster: DevCluster) -> None:
    """Take all nodes, so that what is submitted next waits."""
    blocker = cluster.command(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--wrap=sleep 600",
        "--output=/dev/null",
    )
    cluster.wait_for_state(blocker, "RUNNING")


def test_the_status_of_two_hundred_runs_takes_under_two_seconds(cluster: DevCluster, site: Site) -> None:
    occupy(cluster)
    site.submit("runs/0", steps=10)
    for number in range(1, 200):
        shutil.copytree(site.run("runs/0").path, site.run(f"runs/{number}").path)
    before = os.times()
    start_s = time.monotonic()
    statuses = site.status("runs")
    wall_s = time.monotonic() - start_s
    after = os.times()
    assert len(statuses) == 200
    assert {status["state"] for status in statuses} == {"queued"}
    # Time of the processor, so that a busy machine is no failure. Two hundred calls of squeue would show in it.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2.0
    print(f"wall {wall_s:.2f} s")


def submissions_at_once(site: Site, each: int) -> dict[str, str]:
    """Run directory -> job id of submissions that two shells make at the same time."""
    shells = []
    for shell in range(2):
        lines = [
            f"{sys.executable} -m mimscale.cli submit pretrain recipe.yaml steps=2 run_dir=shell{shell}_{number} "
            f"--profile profile.yaml --json >shell{shell}_{number}.json &"
            for number in range(each)
        ]
        script = "\n".join([*lines, "wait"])
        shells.append(
            subprocess.Popen(
                ["bash", "-c", script], cwd=site.folder, env=site.cluster.environment(), stderr=subprocess.DEVNULL
            )
        )
    for process in shells:
        process.wait(timeout=300)
    return {
        path.stem: re.findall(r'"job_id": "(\d+)"', path.read_text())[0] for path in site.folder.glob("shell*.json")
    }


def check_nothing_is_mixed_up(site: Site, jobs: dict[str, str]) -> None:
    """Each job has its own id, name, run directory and port, and Slurm knows all of them and no other."""
    assert len(set(jobs.values())) == len(jobs)
    queued = site.cluster.command("squeue", "--noheader", "--partition=main", "--states=all", "--format=%i %j")
    names = dict(line.split() for line in queued.splitlines())
    for run_dir, job_id in jobs.items():
        (folder,) = job_folders(site.run(run_dir).logs)
        record = folder.read()
        assert record.job_id == job_id
        assert names[job_id] == record.job_name
        assert run_dir in record.job_name
        assert len(site.run(run_dir).jobs.read_text().splitlines()) == 1
        assert f"/{run_dir}/" in folder.script.read_text()


def test_submissions_of_two_shells_at_once_do_not_get_mixed_up(cluster: DevCluster, site: Site) -> None:
    site.profile(processes_per_node=1)
    occupy(cluster)
    jobs = submissions_at_once(site, each=4)
    assert len(jobs) == 8
    check_nothing_is_mixed_up(site, jobs)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_runs_submitted_at_once_all_finish_each_on_its_own_port(cluster: DevCluster, site: Site) -> None:
    site.profile(processes_per_node=1, slurm={"cpus_per_task": 4})  # four at a time on the two nodes
    jobs = submissions_at_once(site, each=10)
    assert len(jobs) == 20
    check_nothing_is_mixed_up(site, jobs)  # now: the controller forgets jobs five minutes after their end
    for run_dir in jobs:
        cluster.runs.append(site.run(run_dir))
        site.wait_until_finished(run_dir, timeout_s=1200)
        assert site.logged_steps(run_dir) == [1, 2]
    assert len({port_of(site.run(run_dir).path) for run_dir in jobs}) == 20


def port_of(run_dir: Path) -> str:
    """The rendezvous port that a run's ranks had, as env.json records it."""
    return re.findall(r'"MASTER_PORT": "(\d+)"', (run_dir / "env.json").read_text())[0]
