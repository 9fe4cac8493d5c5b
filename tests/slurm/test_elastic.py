"""A run of two nodes goes on with one, in the same order and to the same losses."""

import json

import numpy as np
import pytest
from devcluster import STEPS, DevCluster, Site

pytestmark = pytest.mark.timeout(600)


def test_a_stopped_run_of_two_nodes_is_resumed_on_one(undisturbed: Site, cluster: DevCluster, site: Site) -> None:
    job_id = site.submit("run", "checkpoint.every_steps=1000", steps=STEPS)
    site.wait_for_step(job_id, 30)
    cancelled = cluster.mimscale("cancel", str(site.run().path))
    assert cancelled.returncode == 0, cancelled.stderr
    cluster.wait_for("the run to stop", site.is_settled)
    refused = cluster.mimscale("resume", "run", "--nodes", "3", cwd=site.folder)
    assert refused.returncode == 2
    assert "legal numbers of nodes are 1, 2" in refused.stderr
    assert not cluster.command("squeue", "--noheader", "--format=%i")
    resumed = cluster.mimscale("resume", str(site.run().path), "--nodes", "1", "--json", cwd=site.folder)
    assert resumed.returncode == 0, resumed.stderr
    site.wait_until_finished()
    log = site.newest().rank_log(json.loads(resumed.stdout)["job_id"], 0).read_text()
    assert "ranks 4 -> 2" in log
    assert site.logged_steps() == list(range(1, STEPS + 1))
    assert site.sample_ids() == undisturbed.sample_ids()
    # Two ranks add up the gradients in another order than four: one rounding of fp32 a step, which training carries on.
    ours, theirs = site.losses(), undisturbed.losses()
    np.testing.assert_allclose(
        [ours[step] for step in sorted(ours)], [theirs[step] for step in sorted(theirs)], rtol=1e-4
    )
