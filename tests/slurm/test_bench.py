"""`submit bench` on one and two nodes of a Slurm cluster, and the table of efficiency that their results make."""

import json

import pytest
from devcluster import DevCluster, Site

pytestmark = [pytest.mark.timeout(600), pytest.mark.soak]  # its short form runs on the local executor


def test_jobs_on_one_and_two_nodes_make_a_table_of_efficiency(cluster: DevCluster, site: Site) -> None:
    done = site.try_submit("bench", "recipe.yaml", "run_dir=scaling", "steps=1", nodes="1,2")
    assert done.returncode == 0, done.stderr
    jobs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(jobs) == 2
    for number in (1, 2):
        cluster.runs.append(site.run(f"scaling/nodes_{number:04d}"))
    for job in jobs:
        assert cluster.wait_for_state(job["job_id"], "COMPLETED", "FAILED") == "COMPLETED", cluster.describe()
    done = cluster.mimscale("bench", "scaling", "--from", *(job["run_dir"] for job in jobs), "--json", cwd=site.folder)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout)["scaling"]["weak"]
    assert (one["nodes"], two["nodes"]) == (1, 2)
    assert two["ranks"] == 2 * one["ranks"]
    assert two["global_batch"] == 2 * one["global_batch"]
    assert one["modes"]["end_to_end"]["efficiency"] == 1
    assert two["modes"]["end_to_end"]["efficiency"] > 0
