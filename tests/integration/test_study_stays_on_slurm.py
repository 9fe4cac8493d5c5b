"""`study --wait`: one command from data to tables, on commands that only pretend to be Slurm, and jobs played here."""

import os
import signal
from pathlib import Path

import pytest
import study_fake_verbs
import yaml
from fake_slurm import SLURM_PROFILE, FakeSlurm, run_verb
from small_study import study_tree
from store_samples import make_store

from launch import study, study_slurm
from launch.folder import JobFolder
from mimscale import durable
from mimscale.errors import MimscaleError
from mimscale.train.run_dir import Outcome

ARMS = {"scratch": {}, "mae": {"pretrain": {}}, "diverges": {"pretrain": {"optim": {"lr": 9.0}}}}
FAILED = "pretrain diverges, seed 0"


class Cluster:
    """Stands in for the wait between two looks at Slurm: all jobs that may start do so, and end."""

    def __init__(self, folder, slurm):
        self.folder = folder
        self.slurm = slurm
        self.interludes = []  # what happens in the first waits instead

    def __call__(self, study, asked):
        if self.interludes:
            self.interludes.pop(0)(study)
            return
        for node in study.graph.nodes.values():
            if study.states[node.id].name == "queued":
                self.work(study, node)
        for node in study.graph.nodes.values():
            stopped = [p for p in node.parents if p in study.jobs and ended_badly(study.jobs[p])]
            if stopped and study.states[node.id].name == "queued":
                self.rewrite(study.jobs[node.id], "Dependency|", "DependencyNeverSatisfied|")

    def work(self, study, node):
        folder = study.jobs[node.id]
        if any(p in study.jobs and study.jobs[p].read_outcome() is None for p in node.parents):
            return  # its parent was ended
        if any(p in study.jobs and ended_badly(study.jobs[p]) for p in node.parents):
            return
        try:
            if node.verb == "ingest":
                make_store(self.folder / "data").rename(study.graph.folder(study.folder, node))
            else:
                getattr(study_fake_verbs, node.verb)([str(folder.config)])
            folder.settle(folder.run.read_outcome() or Outcome(outcome="finished", exit_code=0, step=-1))
        except MimscaleError as error:
            folder.settle(Outcome(outcome="failed", exit_code=error.exit_code, step=-1, message=str(error)))

    def rewrite(self, folder, old, new):
        """Let squeue say something else of a job."""
        queue, start = self.slurm.folder / "queue", f"{folder.read().job_id}|"
        lines = queue.read_text().splitlines(keepends=True)
        queue.write_text("".join(line.replace(old, new) if line.startswith(start) else line for line in lines))


def ended_badly(folder):
    outcome = folder.read_outcome()
    return outcome is not None and outcome.exit_code != 0


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts.txt"))
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(SLURM_PROFILE))
    return FakeSlurm(tmp_path / "slurm", monkeypatch, queues=True)


@pytest.fixture
def cluster(tmp_path, slurm, monkeypatch):
    cluster = Cluster(tmp_path, slurm)
    monkeypatch.setattr(study_slurm, "_pause", cluster)
    return cluster


@pytest.fixture
def no_page(monkeypatch):
    """Reports take seconds; most tests are not about them."""
    monkeypatch.setattr(study, "write_study_report", lambda view, folder: folder / "report" / "index.html")


def write_recipe(folder, *arms):
    data = {"store": {"verb": "ingest", "config": {"sources": "images/*.nii.gz", "modality": "mr"}}}
    experiments = {"main": {"question": "Which?", "arms": list(arms)}}
    tree = study_tree(folder, data=data, arms={arm: ARMS[arm] for arm in arms}, experiments=experiments)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))


def stay(capsys, *words):
    code, result, said = run_verb(
        capsys, "study", "recipe.yaml", "--profile", "profile.yaml", "--wait", "--json", *words
    )
    return code, {node["label"]: node for node in result["nodes"]} if result else {}, said


def states(nodes):
    return {label: node["state"] for label, node in nodes.items()}


def job_of(study, label):
    return next(study.jobs[node.id] for node in study.graph.nodes.values() if node.label == label)


def test_one_command_goes_from_data_to_tables_and_leaves_out_what_follows_a_failure(tmp_path, slurm, cluster, capsys):
    write_recipe(tmp_path, *ARMS)
    reports = []
    cluster.interludes.append(lambda study: None)
    cluster.interludes.append(lambda study: cluster.work(study, study.graph.nodes[study.graph.data["store"]]))
    cluster.interludes.append(lambda study: reports.append((study.folder / "report" / "index.html").read_text()))
    code, nodes, said = stay(capsys)
    assert code == 3  # of the node that failed, as of a study on this machine
    assert len(slurm.calls("sbatch")) == 9
    found = states(nodes)
    assert found.pop(FAILED) == "failed"
    of_failed = {f"{verb} diverges, seeds 0, 0" for verb in ("finetune", "evaluate")}
    assert {label for label, state in found.items() if state == "left out"} == of_failed
    assert {state for label, state in found.items() if label not in of_failed} == {"done"}
    for label in of_failed:  # of the child and of the grandchild
        assert nodes[label]["reason"].startswith(f"{FAILED} has no result: loss is not finite at step 3")
        assert "stays in the queue for --retry" in nodes[label]["reason"]
    assert "ingest store: done" in said
    assert f"{FAILED}: failed: loss is not finite at step 3" in said
    assert "1 done, 8 queued" in reports[0]  # it is written while others are under way
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    assert "6 done, 1 failed, 2 left out" in page
    assert "0.750" in page

    # What waits in the queue waits for the new job of its parent.
    code, nodes, said = stay(capsys, "--retry")
    assert code == 3
    assert len(slurm.calls("sbatch")) == 10
    (call,) = slurm.calls("scontrol")[-1:]
    assert call.endswith("Dependency=afterok:109")
    assert states(nodes)["evaluate diverges, seeds 0, 0"] == "left out"


def test_a_study_that_is_over_ends_at_once(tmp_path, slurm, cluster, no_page, capsys):
    write_recipe(tmp_path, "scratch")
    code, nodes, _ = stay(capsys)
    assert (code, set(states(nodes).values())) == (0, {"done"})
    cluster.interludes.append(lambda study: pytest.fail("it waits"))
    code, _, said = stay(capsys)
    assert code == 0
    assert len(slurm.calls("sbatch")) == 3
    assert "job 1" not in said


def test_a_slurm_that_does_not_answer_is_waited_for(tmp_path, slurm, cluster, no_page, capsys):
    write_recipe(tmp_path, "scratch")
    slurm.answer("refuse", "sbatch: error: Unable to contact slurm controller (connect failure)")
    cluster.interludes += [
        lambda study: None,
        lambda study: (slurm.folder / "refuse").unlink(),
        lambda study: slurm.answer("silent"),
        lambda study: None,
        lambda study: (slurm.folder / "silent").unlink(),
    ]
    code, nodes, said = stay(capsys)
    assert (code, set(states(nodes).values())) == (0, {"done"})
    assert said.count("waiting for it, jobs go on") == 2
    assert said.count("Slurm answers again") == 2
    assert "ingest store: running" not in said  # nobody knows
    assert len(slurm.calls("sbatch")) == 3 + 2


def test_without_wait_a_slurm_that_does_not_answer_is_an_error_and_no_failure_of_a_run(
    tmp_path, slurm, cluster, no_page, capsys
):
    write_recipe(tmp_path, "scratch")
    slurm.answer("refuse", "sbatch: error: Unable to contact slurm controller (connect failure)")
    words = ("study", "recipe.yaml", "--profile", "profile.yaml", "--json")
    code, result, said = run_verb(capsys, *words)
    assert code == 5
    assert "give the same command again when it does" in said
    assert {node["state"] for node in result["nodes"]} == {"to do"}


def test_a_person_who_leaves_leaves_the_jobs_and_hears_how_to_go_on(tmp_path, slurm, cluster, no_page, capsys):
    write_recipe(tmp_path, "scratch")
    before = signal.getsignal(signal.SIGINT)
    cluster.interludes.append(lambda study: os.kill(os.getpid(), signal.SIGINT))
    code, _, said = stay(capsys)
    assert code == 130
    assert "the jobs go on, and the same command goes on" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert slurm.calls("scancel") == []
    code, nodes, _ = stay(capsys)
    assert (code, set(states(nodes).values())) == (0, {"done"})
    assert len(slurm.calls("sbatch")) == 3


def test_what_a_person_cancels_is_not_submitted_again_and_nobody_waits_for_what_follows_it(
    tmp_path, slurm, cluster, no_page, capsys
):
    write_recipe(tmp_path, "scratch", "mae")

    def cancel(study):
        folder = job_of(study, "pretrain mae, seed 0")
        durable.write_json(folder.cancelled, {"by": "somebody"})
        cluster.rewrite(folder, "PENDING", "CANCELLED")

    cluster.interludes += [lambda study: cluster.work(study, study.graph.nodes[study.graph.data["store"]]), cancel]
    code, nodes, _ = stay(capsys)
    assert code == 75
    assert states(nodes) == {
        "ingest store": "done",
        "pretrain mae, seed 0": "to do",
        "finetune mae, seeds 0, 0": "queued",
        "evaluate mae, seeds 0, 0": "queued",
        "finetune scratch, seed 0": "done",
        "evaluate scratch, seed 0": "done",
    }
    assert len(slurm.calls("sbatch")) == 6

    # The next command does it again, and what waits for it goes on.
    child = JobFolder(Path(nodes["finetune mae, seeds 0, 0"]["folder"]) / "logs" / "001")
    cluster.rewrite(child, "|Dependency|", "|DependencyNeverSatisfied|")
    cluster.interludes.append(lambda study: cluster.rewrite(child, "|DependencyNeverSatisfied|", "|Dependency|"))
    code, nodes, _ = stay(capsys)
    assert (code, set(states(nodes).values())) == (0, {"done"})
    assert len(slurm.calls("sbatch")) == 7
    assert slurm.calls("scontrol")[-1] == f"update JobId={child.read().job_id} Dependency=afterok:106"


def test_nobody_waits_for_a_job_that_never_starts(tmp_path, slurm, cluster, no_page, capsys):
    write_recipe(tmp_path, "scratch", "mae")

    def finish_without_letting_the_child_start(study):
        for node in study.graph.nodes.values():
            if node.verb == "pretrain" or node.label.endswith("scratch, seed 0"):
                cluster.work(study, node)
        folder = job_of(study, "finetune mae, seeds 0, 0")
        cluster.rewrite(folder, "|Dependency|", "|DependencyNeverSatisfied|")

    cluster.interludes += [
        lambda study: cluster.work(study, study.graph.nodes[study.graph.data["store"]]),
        finish_without_letting_the_child_start,
        lambda study: pytest.fail("it waits"),
    ]
    code, nodes, _ = stay(capsys)
    assert code == 75
    assert states(nodes)["pretrain mae, seed 0"] == "done"
    assert states(nodes)["finetune mae, seeds 0, 0"] == "queued"
    assert "never starts" in nodes["finetune mae, seeds 0, 0"]["reason"]


@pytest.mark.parametrize(("patience_s", "code"), [(60.0, 0), (0.0, 75)])
def test_a_job_that_is_gone_may_show_its_outcome_late(
    tmp_path, slurm, cluster, no_page, capsys, monkeypatch, patience_s, code
):
    write_recipe(tmp_path, "scratch")
    monkeypatch.setattr(study_slurm, "LOST_S", patience_s)
    cluster.interludes += [
        lambda study: slurm.forget(),
        lambda study: None,
        lambda study: cluster.work(study, study.graph.nodes[study.graph.data["store"]]),
    ]
    ended, nodes, _ = stay(capsys)
    assert ended == code
    assert states(nodes)["ingest store"] == ("to do" if code else "done")
    assert len(slurm.calls("sbatch")) == (1 if code else 3)


def test_a_child_whose_parent_ends_while_it_is_submitted_is_submitted_once_the_outcome_shows(
    tmp_path, slurm, cluster, no_page, capsys, monkeypatch
):
    write_recipe(tmp_path, "scratch", "mae")
    submit, refused = study_slurm.submit_batch, []

    def submit_while_the_parent_ends(plan, argv, *, after, **words):
        if argv[0] == "finetune" and after is not None and not refused:
            refused.append(argv)
            cluster.rewrite(JobFolder(after / "logs" / "001"), "|PENDING|", "|COMPLETED|")
        return submit(plan, argv, after=after, **words)

    monkeypatch.setattr(study_slurm, "submit_batch", submit_while_the_parent_ends)
    cluster.interludes += [
        lambda study: cluster.work(study, study.graph.nodes[study.graph.data["store"]]),
        lambda study: cluster.work(study, next(n for n in study.graph.nodes.values() if n.verb == "pretrain")),
    ]
    code, nodes, said = stay(capsys)
    assert refused
    assert "finetune mae, seeds 0, 0: not yet: " in said
    assert (code, set(states(nodes).values())) == (0, {"done"})


def test_a_second_command_does_not_stay_with_the_same_study(tmp_path, slurm, cluster, no_page, capsys):
    write_recipe(tmp_path, "scratch")
    seen = []

    def another(study):
        seen.append(run_verb(capsys, "study", "recipe.yaml", "--profile", "profile.yaml", "--wait"))

    cluster.interludes.append(another)
    assert stay(capsys)[0] == 0
    ((code, _, said),) = seen
    assert code == 5
    assert "mimscale study --wait" in said
