"""Runs on two nodes: they finish, and whoever preempts them, they go on to the same losses."""

import json
from pathlib import Path

import numpy as np
import pytest
from devcluster import STEPS, DevCluster, Setup, Site

pytestmark = pytest.mark.timeout(900)
PREEMPTED_AT = 30  # steps; a save every 1000 steps, so that only the save of the signal can hold them


def status_of(site: Site, name: str = "run") -> dict[str, object]:
    (status,) = site.status(name)
    return status


def test_a_run_on_two_nodes_finishes_and_slurm_says_so(undisturbed: Site) -> None:
    job_id = undisturbed.job_id
    assert undisturbed.logged_steps() == list(range(1, STEPS + 1))
    assert len(list(undisturbed.run().samples.iterdir())) == 4
    assert f"{job_id}|COMPLETED|0:0" in undisturbed.accounts
    assert f"{job_id}.0|COMPLETED|0:0" in undisturbed.accounts
    status = status_of(undisturbed)
    assert (status["state"], status["step"], status["last_checkpoint"]) == ("finished", STEPS, STEPS)
    run = undisturbed.run()
    assert Path(json.loads(run.environment.read_text())["code"]).parent == run.code  # and not the checkout
    start = json.loads((run.path / "startup.json").read_text())
    total_s = start.pop("total_s")
    assert {"unpack_s", "launch_s", "import_s", "init_s", "preflight_s", "first_step_s"} <= start.keys()
    assert total_s == pytest.approx(sum(start.values()), abs=0.1)


def test_two_nodes_give_the_losses_of_one_with_as_many_processes(undisturbed: Site, site: Site) -> None:
    site.profile(processes_per_node=4)
    site.submit(steps=STEPS, nodes=1)
    site.wait_until_finished()
    one, two = site.losses(), undisturbed.losses()
    assert site.sample_ids() == undisturbed.sample_ids()
    # gloo adds up the four ranks' gradients in another order: one rounding of fp32 a step, which training carries on.
    np.testing.assert_allclose([one[step] for step in sorted(one)], [two[step] for step in sorted(two)], rtol=1e-4)


@pytest.mark.parametrize(
    "cluster",
    [Setup(preempt="requeue-usr2"), Setup(preempt="requeue-term"), Setup(preempt="cancel")],
    ids=["usr2", "term-only", "cancelled"],
    indirect=True,
)
def test_a_preempted_run_goes_on_by_itself_to_the_same_losses(
    undisturbed: Site, cluster: DevCluster, site: Site
) -> None:
    job_id = site.submit("run", "checkpoint.every_steps=1000", steps=STEPS)
    site.wait_for_step(job_id, PREEMPTED_AT)
    urgent = cluster.command(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2", "--output=/dev/null"
    )
    cluster.wait_for_state(urgent, "COMPLETED")
    site.wait_until_finished()
    assert site.logged_steps() == list(range(1, STEPS + 1))
    first, second = site.attempts()
    assert (first.cause, second.first_step) == ("preempted", first.last_step)
    assert PREEMPTED_AT <= second.first_step < STEPS  # no step was lost, and there were steps to do
    assert (second.job_id == job_id) == (cluster.setup != Setup(preempt="cancel"))
    assert site.losses() == undisturbed.losses()
    assert site.sample_ids() == undisturbed.sample_ids()
