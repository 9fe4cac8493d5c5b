"""Runs after runs: dependent jobs, and the same run on another number of nodes."""

import shutil

import numpy as np
import pytest
from devcluster import STEPS, DevCluster, Site
from store_samples import make_store

pytestmark = pytest.mark.timeout(900)


@pytest.mark.soak  # with fewer processes in all: test_elastic
def test_a_run_continues_on_another_number_of_nodes_with_the_same_samples(
    undisturbed: Site, cluster: DevCluster, site: Site
) -> None:
    job_id = site.submit(steps=STEPS)
    site.wait_for_step(job_id, 20)
    assert cluster.mimscale("cancel", "run", cwd=site.folder).returncode == 0
    cluster.wait_for("the job to save and stop", site.is_settled)
    reached = site.newest_step()
    assert 20 <= reached < STEPS

    site.profile(processes_per_node=4)
    done = cluster.mimscale("resume", "run", "--nodes", "1", "--profile", "profile.yaml", cwd=site.folder)
    assert done.returncode == 0, done.stderr
    site.wait_until_finished()
    assert site.attempts()[0].first_step == reached
    assert site.logged_steps() == list(range(1, STEPS + 1))
    assert site.sample_ids() == undisturbed.sample_ids()
    here, there = site.losses(), undisturbed.losses()
    assert all(here[step] == there[step] for step in range(1, reached + 1))
    # The rest was added up by gloo in another order.
    np.testing.assert_allclose([here[step] for step in here], [there[step] for step in here], rtol=1e-4)


def test_pretraining_fine_tuning_and_evaluation_follow_each_other_and_nothing_follows_a_failure(
    cluster: DevCluster, site: Site
) -> None:
    site.profile(processes_per_node=1)
    store = make_store(site.folder / "labelled", count=4)
    small = ["steps=2", "crop_voxels=[16, 16, 16]", "patch_voxels=[8, 8, 8]", "model={dim: 24, depth: 2, heads: 2}"]
    small += ["global_batch=2", "micro_batch=1", "validation={every_steps: 0}"]

    def submit(verb: str, *words: str, run_dir: str, after: str | None = None) -> None:
        waits = [] if after is None else ["--after", after]
        done = site.try_submit(verb, *words, f"store={store}", f"run_dir={run_dir}", *waits, nodes=1)
        assert done.returncode == 0, done.stderr
        cluster.runs.append(site.run(run_dir))

    decoder = "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}"
    head = ("unetr.feature_size=4", *small)
    submit("pretrain", "demo/pretrain", *small, decoder, run_dir="pretrained")
    submit("finetune", "demo/finetune", *head, "init_from=pretrained", run_dir="tuned", after="pretrained")
    submit("evaluate", run_dir="tuned", after="tuned")
    site.wait_until_finished("pretrained")
    site.wait_until_finished("tuned")
    cluster.wait_for("the scores", (site.run("tuned").evaluation / "scores.json").exists)
    cluster.wait_for("the last job to be over", lambda: site.is_settled("tuned"))

    # The store vanishes between submission and start: a parent that fails, for good.
    store = shutil.copytree(store, site.folder / "vanishing")
    submit("pretrain", "demo/pretrain", *small, decoder, run_dir="failing")
    submit("finetune", "demo/finetune", *head, "init_from=failing", run_dir="orphan", after="failing")
    shutil.rmtree(store)
    cluster.wait_for("the parent to fail", lambda: site.status("failing")[0]["state"] == "failed")

    def told() -> bool:
        (status,) = site.status("orphan")
        return "never starts" in status["reason"]

    cluster.wait_for("status to say that the child never starts", told, timeout_s=60)
    assert not site.run("orphan").metrics.exists()
    assert cluster.mimscale("cancel", "orphan", cwd=site.folder).returncode == 0
    cluster.wait_for("an empty queue", lambda: not cluster.command("squeue", "--noheader", "--format=%i"), timeout_s=60)
