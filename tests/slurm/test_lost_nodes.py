"""A rank is killed, a node dies, a link is cut: the job ends in bounded time, goes back to the queue and continues."""

import time
from collections import Counter

import pytest
from devcluster import STEPS, DevCluster, Site

SAVE_EVERY = 20  # steps
ENDS_WITHIN_S = 120.0  # from the fault to the end of the job's allocation; the cluster misses a silent node after 20 s
pytestmark = pytest.mark.timeout(900)


def train_to_step(site: Site, step: int) -> str:
    job_id = site.submit("run", f"checkpoint.every_steps={SAVE_EVERY}", steps=STEPS)
    site.wait_for_step(job_id, step)
    return job_id


def assert_requeued(site: Site, job_id: str, reached: int) -> None:
    """The job is out of its allocation soon, and goes on without a person, from its newest checkpoint."""
    cluster = site.cluster
    cluster.wait_for(
        "the job to be requeued", lambda: "Restarts=0" not in cluster.show(job_id), timeout_s=ENDS_WITHIN_S
    )
    cluster.up()  # mends what a test has broken
    site.wait_until_finished()
    second = site.attempts()[-1]
    assert second.first_step >= reached - SAVE_EVERY
    assert site.logged_steps() == list(range(1, STEPS + 1))


def test_a_killed_rank_ends_the_job_which_continues_from_its_checkpoint(
    undisturbed: Site, cluster: DevCluster, site: Site, survived: Counter[str]
) -> None:
    job_id = train_to_step(site, SAVE_EVERY + 5)
    reached = site.newest_step()
    site.kill_rank(2)
    assert_requeued(site, job_id, reached)
    assert site.attempts()[0].cause == "lost rank"
    assert site.losses() == undisturbed.losses()
    survived["Slurm: kill of one rank"] += 1


def test_a_node_that_dies_ends_the_job_which_continues_when_there_are_nodes(
    undisturbed: Site, cluster: DevCluster, site: Site, survived: Counter[str]
) -> None:
    job_id = train_to_step(site, SAVE_EVERY + 5)
    reached = site.newest_step()
    cluster.kill_node(2)
    assert_requeued(site, job_id, reached)
    assert site.losses() == undisturbed.losses()
    survived["Slurm: node that dies"] += 1


@pytest.mark.soak
def test_a_killed_slurmd_of_the_first_node_costs_at_most_the_steps_since_the_last_save(
    undisturbed: Site, cluster: DevCluster, site: Site, survived: Counter[str]
) -> None:
    steps = 20 * STEPS  # it must not finish before the cluster misses the node
    job_id = site.submit("run", f"checkpoint.every_steps={SAVE_EVERY}", steps=steps)
    site.wait_for_step(job_id, SAVE_EVERY + 5)
    cluster.kill("node1")  # rank 0 and the batch script live on, and nobody is left to end them
    cluster.wait_for(
        "the job to be requeued", lambda: "Restarts=0" not in cluster.show(job_id), timeout_s=ENDS_WITHIN_S
    )
    reached = site.newest_step()
    cluster.up()
    cluster.wait_for("it to go on", lambda: site.newest_step() > reached + SAVE_EVERY)
    assert site.attempts()[-1].first_step >= reached - SAVE_EVERY
    assert cluster.mimscale("cancel", "run", cwd=site.folder).returncode == 0
    cluster.wait_for("the job to save and stop", site.is_settled)
    assert site.logged_steps() == list(range(1, site.newest_step() + 1))
    assert all(site.losses()[step] == loss for step, loss in undisturbed.losses().items() if step in site.losses())
    survived["Slurm: kill of the first node's slurmd"] += 1


@pytest.mark.soak
def test_a_link_that_is_cut_for_a_minute_costs_at_most_the_steps_since_the_last_save(
    undisturbed: Site, cluster: DevCluster, site: Site, survived: Counter[str]
) -> None:
    job_id = train_to_step(site, SAVE_EVERY + 5)
    reached = site.newest_step()
    cut_s = time.monotonic()
    cluster.set_link(2, "down")
    cluster.wait_for(
        "the job to be requeued", lambda: "Restarts=0" not in cluster.show(job_id), timeout_s=ENDS_WITHIN_S
    )
    time.sleep(max(0.0, 60 - (time.monotonic() - cut_s)))
    assert_requeued(site, job_id, reached)  # mends the link
    assert site.losses() == undisturbed.losses()
    survived["Slurm: link cut for a minute"] += 1


@pytest.mark.soak
def test_a_run_that_dies_again_and_again_without_a_save_is_given_up_and_says_why(
    cluster: DevCluster, site: Site
) -> None:
    site.let_pretrain_be("launch_fake_verb:main")
    site.profile(processes_per_node=1, environment={"FAKE": "bug:1"})
    job_id = site.submit(steps=10)
    cluster.wait_for("the job to be given up", site.is_settled)
    assert [attempt.cause for attempt in site.attempts()] == ["lost rank"] * 4
    (status,) = site.status()
    assert (status["state"], status["restarts"]) == ("failed", 3)
    assert "rank 1 on node2 failed with exit code 1" in status["reason"]
    assert "crash loop: 3 restarts in a row without a new committed step after step 0" in status["reason"]
    cluster.wait_for_state(job_id, "FAILED")
