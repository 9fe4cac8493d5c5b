"""Jobs that are shorter than their run: they save before the limit and go back to the queue, as often as it takes."""

from itertools import pairwise

import pytest
from devcluster import DevCluster, Site

ENDLESS = 1_000_000  # steps
pytestmark = pytest.mark.timeout(900)


def submit_short_jobs(site: Site, steps: int) -> str:
    site.profile(timeout_min=1, signal_lead_s=20)
    return site.submit("run", "checkpoint.every_steps=100000", "optim.warmup_steps=0", steps=steps)


def wait_for_restarts(site: Site, job_id: str, count: int) -> None:
    def restarted() -> bool:
        attempts = site.attempts()
        return len(attempts) > count and site.newest_step() > attempts[count].first_step

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
    job_id = submit_short_jobs(site, ENDLESS)
    wait_for_restarts(site, job_id, 1)
    done = cluster.mimscale("cancel", str(site.run().path))
    assert done.returncode == 0, done.stderr
    cluster.wait_for("the job to leave the queue", lambda: site.is_settled(), timeout_s=120)
    check_no_step_is_lost(site)
    assert site.status()[0]["state"] == "cancelled"
    assert not cluster.command("squeue", "--noheader", f"--name={site.job_name()}")
    common = undisturbed.losses().keys() & site.losses().keys()
    assert len(common) > 10
    assert all(site.losses()[step] == undisturbed.losses()[step] for step in common)


@pytest.mark.soak
def test_a_run_that_meets_its_time_limit_three_times_finishes_in_a_later_job(cluster: DevCluster, site: Site) -> None:
    job_id = submit_short_jobs(site, ENDLESS)
    wait_for_restarts(site, job_id, 3)
    last = site.newest_step() + 20
    cluster.mimscale("cancel", str(site.run().path))
    cluster.wait_for("the job to leave the queue", lambda: site.is_settled(), timeout_s=120)
    check_no_step_is_lost(site)
    done = cluster.mimscale("resume", str(site.run().path), f"steps={max(last, site.newest_step() + 1)}", "--json")
    assert done.returncode == 0, done.stderr
    site.wait_until_finished()
    check_no_step_is_lost(site)
