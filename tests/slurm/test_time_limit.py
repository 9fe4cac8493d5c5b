"""Jobs that are shorter than their run: they save before the limit and go back to the queue, as often as it takes."""

from collections import Counter
from itertools import pairwise

import pytest
from devcluster import DevCluster, Site

ENDLESS = 1_000_000  # steps
PACE = 4  # steps of an allocation, where a test sets it
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
def test_a_run_that_meets_its_time_limit_three_times_in_a_row_finishes_on_the_fourth_allocation(
    undisturbed: Site, cluster: DevCluster, site: Site, survived: Counter[str]
) -> None:
    steps = 4 * PACE
    site.let_pretrain_be("paced_pretrain:main")
    # Slurm looks at limits twice a minute, so its signal may come half a minute early; on a busy machine a start takes
    # as long.
    site.profile(timeout_min=2, signal_lead_s=20, environment={"PACE": str(PACE)})
    job_id = site.submit("run", "checkpoint.every_steps=100000", "optim.warmup_steps=0", steps=steps)
    site.wait_until_finished(timeout_s=800)
    cluster.wait_for_state(job_id, "COMPLETED")  # the batch script has its last word after the ranks
    check_no_step_is_lost(site)
    attempts = site.attempts()
    assert [attempt.cause for attempt in attempts] == ["time limit", "time limit", "time limit", "ended"]
    assert {attempt.job_id for attempt in attempts} == {job_id}
    assert "Restarts=3 " in cluster.show(job_id)
    (status,) = site.status()
    assert (status["state"], status["step"], status["restarts"]) == ("finished", steps, 3)
    assert site.logged_steps() == list(range(1, steps + 1))
    assert site.losses() == {step: loss for step, loss in undisturbed.losses().items() if step <= steps}
    assert site.sample_ids() == {step: ids for step, ids in undisturbed.sample_ids().items() if step <= steps}
    survived["Slurm: time limit"] += 3
