"""Slurm's commands: what they print is read, and what they refuse becomes one clear message."""

import os
from pathlib import Path

import pytest

from launch import slurm_commands
from launch.preflight import refuse_inside_allocation
from launch.profile import Profile
from launch.slurm import check_partition
from launch.slurm_commands import (
    LostSubmissionError,
    SlurmSilentError,
    accounting,
    limit_minutes,
    queue,
    read_accounting,
    read_queue,
    submit,
    without_allocation,
)
from launch.slurm_profile import SlurmConfig
from mimscale.errors import LaunchError

# squeue of Slurm 22.05.
QUEUE = """\
7|7|ana|RUNNING|None|node[1-2]|19:38|mimscale-pretrain-a-1f2e
9_0|10|ana|COMPLETED|None|node1|20:00|mimscale-ingest-s-77aa
9_1|9|ana|PENDING|Resources||20:00|mimscale-ingest-s-77aa
11|11|ben|PENDING|DependencyNeverSatisfied||20:00|odd|name
slurm_load_jobs: something else
"""


def test_the_queue_is_read_with_arrays_reasons_and_odd_names() -> None:
    jobs = read_queue(QUEUE)
    assert sorted(jobs) == ["11", "7", "9_0", "9_1"]
    assert (jobs["9_0"].raw_id, jobs["9_0"].is_active) == ("10", False)
    assert (jobs["9_1"].reason, jobs["9_1"].is_active) == ("Resources", True)
    assert (jobs["7"].nodes, jobs["7"].reason) == ("node[1-2]", "")
    assert jobs["11"].name == "odd|name"


def test_the_accounts_are_read() -> None:
    assert read_accounting("7|COMPLETED\n9_0|CANCELLED by 1000\n9_[1-3]|PENDING\n") == {
        "7": "COMPLETED",
        "9_0": "CANCELLED",
        "9_[1-3]": "PENDING",
    }


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("infinite", None),
        ("n/a", None),
        ("30:00", 30),
        ("1:30:00", 90),
        ("2-00:00:00", 2880),
        ("2-12", 3600),
        ("45", 45),
    ],
)
def test_time_limits_are_read(text: str, minutes: float | None) -> None:
    assert limit_minutes(text) == minutes


def test_no_variable_of_an_allocation_is_handed_on_but_the_way_to_the_cluster_is() -> None:
    shell = {"SLURM_CPU_BIND": "x", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "1", "SLURM_CONF": "/c", "PATH": "/bin"}
    assert without_allocation(shell) == {"SLURM_CONF": "/c", "PATH": "/bin"}


def test_a_shell_inside_an_allocation_is_refused_with_the_way_out() -> None:
    refuse_inside_allocation({"SLURM_CONF": "/c"})
    with pytest.raises(LaunchError, match=r"inside job 77 of Slurm; .* --inside-allocation"):
        refuse_inside_allocation({"SLURM_JOB_ID": "77"})


class Programs:
    """Shell scripts in place of Slurm's commands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", str(folder))  # alone: a cluster may be installed

    def write(self, name: str, body: str) -> None:
        """Let `name` do this."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(slurm_commands, "LOST_ID_S", 0.2)
    return Programs(folder, monkeypatch)


def _submit(tmp_path: Path) -> str:
    return submit(tmp_path / "job.sh", {"PATH": os.environ["PATH"]}, "mimscale-x-1")


def test_without_sbatch_nothing_is_tried(programs: Programs, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no sbatch on PATH.*--profile local"):
        _submit(tmp_path)


@pytest.mark.parametrize("answer", ["123", "123;cluster"])
def test_the_id_of_a_job_is_read(programs: Programs, tmp_path: Path, answer: str) -> None:
    programs.write("sbatch", f"echo '{answer}'")
    assert _submit(tmp_path) == "123"


def test_a_partition_that_sbatch_does_not_know_is_answered_with_those_that_there_are(
    programs: Programs, tmp_path: Path
) -> None:
    refusal = "invalid partition specified: gpuu\nsbatch: error: Batch job submission failed: Invalid partition name"
    programs.write("sbatch", f"printf '{refusal}\n' >&2; exit 1")
    programs.write("sinfo", "echo 'gpu|1-00:00:00'; echo 'cpu|infinite'")
    with pytest.raises(LaunchError, match=r"invalid partition specified: gpuu .*to one of cpu, gpu .*job.sh"):
        _submit(tmp_path)


def test_a_wrong_account_names_the_keys_of_the_profile(programs: Programs, tmp_path: Path) -> None:
    programs.write("sbatch", "echo 'Invalid account or account/partition combination specified' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"set slurm.account, slurm.qos and slurm.partition"):
        _submit(tmp_path)


def test_a_submission_whose_answer_got_lost_is_found_by_its_name(programs: Programs, tmp_path: Path) -> None:
    programs.write(
        "sbatch", "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv' >&2; exit 1"
    )
    programs.write("squeue", 'case "$*" in *--name=mimscale-x-1*) echo 55;; esac')
    assert _submit(tmp_path) == "55"


def test_when_nobody_knows_whether_a_job_was_queued_the_message_says_how_to_find_out(
    programs: Programs, tmp_path: Path
) -> None:
    programs.write("sbatch", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    programs.write("squeue", "exit 1")
    with pytest.raises(LostSubmissionError, match="look with `squeue --name=mimscale-x-1`"):
        _submit(tmp_path)
    programs.write("squeue", "exit 0")
    with pytest.raises(LaunchError, match="not in the queue, submit again"):
        _submit(tmp_path)


def test_a_command_that_hangs_is_an_error_in_bounded_time(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.write("squeue", "exec /bin/sleep 20")
    monkeypatch.setattr(slurm_commands.call, "__defaults__", (0.2,))
    with pytest.raises(SlurmSilentError, match="squeue gave no answer in 0 s"):
        queue(["ana"])


def test_the_queue_is_asked_once_for_everybody(programs: Programs, tmp_path: Path) -> None:
    programs.write("squeue", f'echo "$*" >> {tmp_path}/asked')
    assert queue(["ana", "ben", "ana"]) == {}
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--user=ana,ben" in asked


def test_a_cluster_without_accounts_says_nothing_about_what_it_has_forgotten(programs: Programs) -> None:
    programs.write("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert accounting(["5"], "2026-11-24") == {}


def test_a_partition_is_checked_before_anything_is_queued(programs: Programs) -> None:
    programs.write("sbatch", "exit 1")
    programs.write("sinfo", "echo 'gpu|1:00:00'; echo 'cpu|infinite'")
    check_partition(Profile(executor="slurm", timeout_min=60, slurm=SlurmConfig(partition="gpu,cpu")))
    with pytest.raises(LaunchError, match=r"slurm.partition=gpuu: no such partition; this cluster has cpu, gpu"):
        check_partition(Profile(executor="slurm", timeout_min=60, slurm=SlurmConfig(partition="gpuu")))
    with pytest.raises(LaunchError, match=r"profile.timeout_min=90: partition gpu allows 60 min"):
        check_partition(Profile(executor="slurm", timeout_min=90, slurm=SlurmConfig(partition="gpu")))
