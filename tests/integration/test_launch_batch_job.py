"""Jobs of Slurm as a person submits them, with commands that only pretend to be Slurm."""

import json
import pickle
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import only_folder
from launch_fake_verb import wait_until
from launch_site import FAILED, FINISHED, Site, site_in

from launch import follow
from launch.folder import JobFolder, job_folders
from mimscale.train.run_dir import Outcome, RunDir


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    return site_in(tmp_path, monkeypatch, capsys)


def test_a_submission_returns_the_job_its_log_and_the_commands_to_steer_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPU_BIND", "SBATCH_PARTITION", "RANK"):
        monkeypatch.setenv(name, "from the shell")
    code, answer, said = site.submit("--nodes", "2")
    assert code == 0, said
    folder = only_folder(site.run)
    assert answer == {"job_id": "100", "run_dir": str(site.run.path), "log": str(folder.rank_log("100", 0))}
    for command in ("mimscale status", "mimscale logs", "mimscale cancel"):
        assert f"{command} {site.run.path}" in said
    record = folder.read()
    assert (record.job_id, record.nodes, record.processes, record.master_port) == ("100", 2, 4, None)
    task = pickle.loads(folder.task_file().read_bytes()).function
    assert task.arguments == ("pretrain", str(folder.config))
    assert task.environment["DS_ACCELERATOR"] == "cpu"
    assert task.environment["OMP_NUM_THREADS"] == "3"
    script = site.slurm.script("100")
    assert script == folder.script.read_text()
    assert f"#SBATCH --job-name={record.job_name}\n" in script
    assert "export GLOO_SOCKET_IFNAME=eth0\n" in script
    assert f"export PYTHONPATH={site.run.code}/" in script
    inherited = (site.slurm.folder / "environment.100").read_text()
    assert "from the shell" not in inherited
    (line,) = map(json.loads, site.run.jobs.read_text().splitlines())
    assert (line["job_id"], line["executor"], line["folder"]) == ("100", "slurm", "logs/001")


@pytest.mark.parametrize("end", [FINISHED, FAILED])
def test_a_waited_for_job_shows_rank_0_and_returns_the_exit_code_of_its_outcome(site: Site, end: Outcome) -> None:
    def run_job() -> None:
        folder = wait_until(lambda: next(iter(job_folders(site.run.logs)), None))
        wait_until(lambda: folder.read().job_id)
        folder.rank_log("100", 0).write_text("rank 0 at work\n")
        folder.settle(end)

    job = threading.Thread(target=run_job)
    job.start()
    code, _, said = site.submit("--wait")
    job.join()
    assert code == end.exit_code
    assert "rank 0 at work" in said
    assert f"{end.outcome} (exit code {end.exit_code}): {end.message or 'all done'}" in said


def test_a_waited_for_job_that_is_gone_may_show_its_outcome_late(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def is_alive(folder: JobFolder) -> bool:
        asked.append(folder)
        if len(asked) == 3:  # by now the file that another node wrote is seen here
            folder.settle(FINISHED)
        return False

    monkeypatch.setattr(follow, "_is_alive", is_alive)
    monkeypatch.setattr(follow, "QUEUE_EVERY_S", 0.1)
    code, _, said = site.submit("--wait")
    assert code == 0, said


def test_a_waited_for_job_that_vanishes_is_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "QUEUE_EVERY_S", 0.1)
    monkeypatch.setattr(follow, "LOST_S", 0.3)
    code, _, said = site.submit("--wait")
    assert code == 6
    assert "has left the queue without an outcome; see `mimscale status`" in said


def test_inside_an_allocation_nothing_is_submitted_unless_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    code, _, said = site.submit()
    assert code == 5
    assert "inside job 7" in said
    assert site.submit("--dry-run")[0] == 0
    assert site.submit("--inside-allocation")[0] == 0
    assert site.verb("resume", "run")[0] == 5
    assert site.verb("resume", "run", "--inside-allocation")[0] == 0


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"slurm": {"partition": "mian"}}, 5, "slurm.partition=mian: no such partition; this cluster has main, urgent"),
        ({"timeout_min": 90}, 5, "profile.timeout_min=90: partition main allows 60 min"),
        ({"timeout_min": None}, 2, "profile.timeout_min: a Slurm job needs a time limit"),
        ({"slurm": {"write_mb_per_s": 1.0}}, 2, "profile.signal_lead_s=120: a checkpoint of about"),
        ({"slurm": {"partitoin": "main"}}, 2, "slurm.partitoin"),
        ({"timeout_min": 2.01, "signal_lead_s": 120}, 2, "shorter than signal_lead_s=120 and a save together"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_queued(
    site: Site, changes: dict[str, Any], code: int, text: str
) -> None:
    site.profile(**changes)
    got, _, said = site.submit()
    assert got == code
    assert text in said
    assert site.slurm.calls("sbatch") == []
    assert not site.run.path.exists()


@pytest.mark.parametrize(
    ("shown", "warned"),
    [
        ("PartitionName=main Default=YES GraceTime=0 PreemptMode=REQUEUE", True),
        ("PartitionName=main Default=YES GraceTime=3000 PreemptMode=REQUEUE", False),
        ("PartitionName=main Default=YES GraceTime=0 PreemptMode=OFF", False),
        ("PartitionName=other Default=NO GraceTime=0 PreemptMode=CANCEL", False),
    ],
)
def test_a_preemption_that_leaves_less_time_than_a_save_takes_is_announced(
    site: Site, shown: str, warned: bool
) -> None:
    site.profile(slurm={"partition": None})
    site.slurm.answer("shown", f"{shown}\n")
    code, _, said = site.submit()
    assert code == 0, said
    assert ("partition main leaves a preempted job GraceTime=0 s, and a save takes about" in said) == warned


def test_too_little_disk_is_refused_with_the_numbers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(site.folder)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, said = site.submit()
    assert code == 5
    assert "0.00 GB free, 4 more checkpoint(s) take about" in said
    assert site.slurm.calls("sbatch") == []


def test_without_sbatch_nothing_is_submitted_and_a_dry_run_works(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(site.folder))
    code, _, said = site.submit()
    assert code == 5
    assert "no sbatch on PATH" in said
    code, answer, _ = site.submit("--dry-run", "--nodes", "2")
    assert code == 0
    assert answer["topology"]["processes"] == 4
    assert answer["estimate"]["parameters"] > 1e6
    assert "#SBATCH --nodes=2" in answer["sbatch"]
    assert not site.run.path.exists()


def test_an_impossible_number_of_nodes_is_answered_with_the_legal_ones(site: Site) -> None:
    code, _, said = site.submit("--dry-run", "--nodes", "3")
    assert code == 2
    assert "--nodes 3: " in said
    assert "with 2 process(es) on a node, legal numbers of nodes are 1, 2" in said


def test_a_refusal_of_sbatch_is_one_message_and_leaves_nothing(site: Site) -> None:
    site.slurm.answer("refuse", "sbatch: error: Batch job submission failed: Invalid qos specification\n")
    code, _, said = site.submit()
    assert code == 5
    assert "Invalid qos specification; set slurm.account, slurm.qos" in said
    assert job_folders(site.run.logs) == []


def test_a_run_directory_takes_one_job_while_that_is_in_the_queue(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "PENDING")
    code, _, said = site.submit()
    assert code == 5
    assert f"job 100 (pretrain, {site.run.logs / '001'}) is pending" in said
    assert f"mimscale cancel {site.run.path}" in said
    site.slurm.answer("silent")
    code, _, said = site.submit()
    assert code == 5
    assert "nobody says whether job 100 is alive" in said
    (site.slurm.folder / "silent").unlink()
    site.slurm.forget()
    assert site.submit()[0] == 0
    assert len(job_folders(site.run.logs)) == 2


def test_a_job_waits_for_the_run_that_after_names(site: Site) -> None:
    assert site.submit()[0] == 0
    parent = only_folder(site.run)
    site.slurm.hold(parent, "RUNNING")
    assert site.submit("run_dir=second", "--after", "run")[0] == 0
    assert "#SBATCH --dependency=afterok:100\n" in site.slurm.script("101")
    assert parent.dependents.read_text().split() == [str(site.folder / "second" / "logs" / "001")]
    parent.settle(FINISHED)
    assert site.submit("run_dir=third", "--after", "run")[0] == 0
    assert "--dependency" not in site.slurm.script("102")
    parent.settle(FAILED)
    code, _, said = site.submit("run_dir=fourth", "--after", "run")
    assert code == 5
    assert "job 100 failed (rank 1 on node1: Killed); let it finish first, with `mimscale resume run`" in said
    code, _, said = site.submit("run_dir=fourth", "--after", "nowhere")
    assert code == 5
    assert "--after nowhere: nothing was submitted there" in said


@pytest.mark.parametrize("end", [FAILED, None])  # None: it is gone and nobody could say how it ended
def test_what_waits_for_a_failed_run_waits_for_the_job_that_resumes_it(site: Site, end: Outcome | None) -> None:
    assert site.submit()[0] == 0
    parent = only_folder(site.run)
    site.slurm.hold(parent, "RUNNING")
    assert site.submit("run_dir=second", "--after", "run")[0] == 0
    words = ["submit", "evaluate", "run_dir=run", "store=store", "--after", "run", "--profile", "profile.yaml"]
    assert site.verb(*words)[0] == 0
    site.slurm.forget()
    children = [only_folder(RunDir(site.folder / "second")), job_folders(site.run.logs)[-1]]
    for child in children:
        site.slurm.hold(child, "PENDING", "DependencyNeverSatisfied")
    if end is not None:
        parent.settle(end)
    code, _, said = site.verb("resume", "run")
    assert code == 0, said
    newest = job_folders(site.run.logs)[-1]
    updates = [call for call in site.slurm.calls("scontrol") if call.startswith("update")]
    assert updates == ["update JobId=101 Dependency=afterok:103", "update JobId=102 Dependency=afterok:103"]
    assert [child.read().after for child in children] == [str(newest.path)] * 2
    assert newest.waiting() == children

    # Now they wait for that one, and an evaluation of the half-trained run is no cause to let them start.
    site.slurm.forget()
    site.slurm.hold(newest, "RUNNING")
    for child in children[:1]:
        site.slurm.hold(child, "PENDING", "Dependency")
    words = ["submit", "evaluate", "run_dir=run", "store=store", "out=scores", "--profile", "profile.yaml"]
    assert site.verb(*words)[0] == 0
    assert [call for call in site.slurm.calls("scontrol") if call.startswith("update")] == updates


def test_what_has_started_is_not_taken_for_what_waits_for_a_run_that_is_gone(site: Site) -> None:
    assert site.submit()[0] == 0
    site.slurm.hold(only_folder(site.run), "RUNNING")
    words = ["submit", "evaluate", "run_dir=run", "store=store", "--after", "run", "--profile", "profile.yaml"]
    assert site.verb(*words)[0] == 0
    site.slurm.forget()
    site.slurm.hold(job_folders(site.run.logs)[-1], "RUNNING")
    code, _, said = site.verb("resume", "run")
    assert code == 5
    assert "job 101 (evaluate" in said
    assert "is running" in said


@pytest.mark.parametrize("merge_waits", [True, False])
def test_an_ingest_in_parts_is_an_array_and_a_merge_that_waits_for_it(site: Site, merge_waits: bool) -> None:
    (site.folder / "a.nii").write_bytes(b"")
    words = ["ingest", "demo/ingest", "sources=*.nii", "out=data/store", "--array", "3", "--profile", "profile.yaml"]
    code, _, said = site.verb("submit", *words)
    assert code == 0, said
    array, merge = job_folders(RunDir(site.folder / "data" / "store.job").logs)
    assert "#SBATCH --array=0-2%3\n" in site.slurm.script("100")
    assert "#SBATCH --dependency=afterok:100\n" in site.slurm.script("101")
    tasks = [pickle.loads(array.task_file(task).read_bytes()).function for task in range(3)]
    assert [task.arguments[2:] for task in tasks] == [("task=0/3",), ("task=1/3",), ("task=2/3",)]
    merging = pickle.loads(merge.task_file().read_bytes()).function
    assert merging.arguments[2:] == ("merge=true",)
    assert merge.read().after == str(array.path)
    array.rank_log("100_0", 0).write_text("part 0\n")
    array.rank_log("100_2", 0).write_text("part 2\n")
    assert site.verb("logs", "data/store")[1] == "part 0\n"
    assert site.verb("logs", "data/store", "--task", "2")[1] == "part 2\n"
    assert "has tasks 0 to 2" in site.verb("logs", "data/store", "--task", "3")[2]
    merge.rank_log("101", 0).write_text("merged\n")
    assert site.verb("logs", "data/store")[1] == "merged\n"
    array.settle(FAILED)
    if merge_waits:
        site.slurm.hold(merge, "PENDING", "DependencyNeverSatisfied")
    code, _, said = site.verb("resume", "data/store")
    assert code == 0, said
    assert site.slurm.calls("scancel") == (["101"] if merge_waits else [])  # what is gone cannot be cancelled
    assert "#SBATCH --array=0-2%3\n" in site.slurm.script("102")
    assert "#SBATCH --dependency=afterok:102\n" in site.slurm.script("103")
    code, _, said = site.submit("--array", "3")
    assert code == 2
    assert "--array 3: for ingest and extract on Slurm" in said


def test_features_are_extracted_by_an_array_and_merged_by_a_job_that_waits_for_it(site: Site) -> None:
    words = ["extract", "run_dir=run", "store=store", "out=features", "--array", "2", "--profile", "profile.yaml"]
    code, _, said = site.verb("submit", *words)
    assert code == 0, said
    array, merge = job_folders(RunDir(site.folder / "features.job").logs)
    tasks = [pickle.loads(array.task_file(task).read_bytes()).function for task in range(2)]
    assert [task.arguments for task in tasks] == [
        ("extract", str(array.config), "task=0/2"),
        ("extract", str(array.config), "task=1/2"),
    ]
    assert pickle.loads(merge.task_file().read_bytes()).function.arguments[2:] == ("merge=true",)
    assert "#SBATCH --dependency=afterok:100\n" in site.slurm.script("101")


def test_a_container_is_given_the_folder_in_which_a_job_makes_its_store(site: Site) -> None:
    (site.folder / "a.nii").write_bytes(b"")
    site.profile(slurm={"container": {"image": "/x.sif", "runtime": "apptainer"}})
    words = ["ingest", "demo/ingest", "sources=*.nii", "out=data/store", "--profile", "profile.yaml"]
    code, _, said = site.verb("submit", *words)
    assert code == 0, said
    binds = re.findall(r"--bind (\S+)", site.slurm.script("100"))
    folders = [site.folder / "data" / "store.job", site.folder, site.folder / "data"]  # the store itself is not there
    assert binds == [f"{folder}:{folder}" for folder in folders]


def test_an_array_whose_merge_is_refused_does_not_stay_in_the_queue(site: Site) -> None:
    (site.folder / "a.nii").write_bytes(b"")
    sbatch = site.slurm.folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("test ! -e refuse", 'test "$count" = 100'))
    site.slurm.answer("refuse", "sbatch: error: Job dependency problem\n")
    words = ["ingest", "demo/ingest", "sources=*.nii", "out=store2", "--array", "3", "--profile", "profile.yaml"]
    code, _, said = site.verb("submit", *words)
    assert code == 5
    assert "Job dependency problem" in said
    assert site.slurm.calls("scancel") == ["100"]
