"""Jobs that are shorter than their run: they save before the limit and go back to the queue, as often as it takes."""

from collections import Counter
from itertools import pairwise

import pytest
from devcluster import DevCluster, Site

ENDLESS = 1_000_000  # steps
pytestmark = pytest.mark.timeout(900)


def submit_short_jobs(site: Site, steps: int, name: str = "run") -> str:
    site.profile(timeout_min=1, signal_lead_s=20)
    return site.submit(name, "checkpoint.every_steps=100000", "optim.warmup_steps=0", steps=steps)


def wait_for_restarts(site: Site, count: int, name: str = "run") -> None:
    def restarted() -> bool:
        attempts = site.attempts(name)
        return len(attempts) > count and site.newest_step(name) > attempts[count].first_step

    site.cluster.wait_for(f"start {count + 1} to make a step", restarted, timeout_s=180 * count + 180)


def check_no_step_is_lost(site: Site) -> None:
    steps = site.logged_steps()
    assert steps == list(range(1, len(steps) + 1))
    attempts = site.attempts()
    for before, after in pairwise(attempts):
        assert (before.cause, after.first_step) == ("time limit", before.last_step)
        assert after.first_step > before.first_step


def test_a_time_limit_costs_no_step_and_cancel_ends_such_a_run_for_good(
    undisturbed: Site, cluster: DevCluster, site: Site
) -> None:
    submit_short_jobs(site, ENDLESS)
    wait_for_restarts(site, 1)
    done = cluster.mimscale("cancel", str(site.run().path))
    assert done.returncode == 0, done.stderr
    cluster.wait_for("the job to leave the queue", lambda: site.is_settled(), timeout_s=120)
    check_no_step_is_lost(site)
    assert site.status()[0]["state"] == "cancelled"
    assert not cluster.command("squeue", "--noheader", f"--name={site.job_name()}")
    common = undisturbed.losses().keys() & site.losses().keys()
    assert common
    assert all(site.losses()[step] == undisturbed.losses()[step] for step in common)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_run_that_meets_its_time_limit_three_times_in_a_row_finishes(
    cluster: DevCluster, site: Site, survived: Counter[str]
) -> None:
    submit_short_jobs(site, ENDLESS, name="measured")
    wait_for_restarts(site, 1, name="measured")
    steps_a_job = site.attempts("measured")[0].last_step
    assert steps_a_job
    assert cluster.mimscale("cancel", "measured", "--now", cwd=site.folder).returncode == 0

    submit_short_jobs(site, round(3.7 * steps_a_job))
    site.wait_until_finished(timeout_s=900)
    check_no_step_is_lost(site)
    assert len(site.attempts()) >= 4
    survived["Slurm: time limit"] += 3
