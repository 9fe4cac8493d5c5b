"""A job of Slurm as its batch script finds it, with a Slurm that pretends."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from launch import requeue, slurm_commands
from launch.folder import JobFolder, JobRecord, claim_folder
from mimscale.train.run_dir import Outcome, RunDir
from mimscale.world import Process

RUNNING = "JobId=100 JobState=RUNNING Restarts=0 PreemptTime=None\n"
PREEMPTED = "JobId=100 JobState=RUNNING Restarts=0 PreemptTime=2026-11-24T22:31:08\n"
INTERRUPTED = Outcome(outcome="interrupted", exit_code=75, step=7, stopped_by="SIGTERM")
LOST = Outcome(outcome="failed", exit_code=6, step=7, message="rank 1 on node1: Killed")


class Job:
    """A submitted training in a folder, on a node that believes to be in job 100."""

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.slurm, self.run = slurm, RunDir(folder / "run")
        self.folder = self.claim()

    def claim(self, **changes: object) -> JobFolder:
        record = JobRecord(
            **{  # type: ignore[arg-type]
                "verb": "pretrain",
                "executor": "slurm",
                "processes": 2,
                "master_port": None,
                "config_hash": "",
                "timeout_min": 30.0,
                "signal_lead_s": 60.0,
                "lost_rank_grace_s": 10.0,
                "trains": True,
                "submitted_utc": "2026-01-01T00:00:00Z",
                "submitter": Process(pid=1, host="login", start_ticks=-1),
                "job_name": "mimscale-x",
                "user": "ana",
                "job_id": "100",
                **changes,
            }
        )
        folder = claim_folder(self.run.logs, record, "")
        folder.script.write_text("#!/bin/bash\n")
        for task in (None, 0, 1):
            folder.task_file(task).write_bytes(b"task")
        return folder

    def commit(self, step: int) -> None:
        (self.run.checkpoints / f"step_{step:08d}").mkdir(parents=True)

    def start(self) -> int:
        return requeue.start(self.folder)

    def end(self, code: int = 0, outcome: Outcome | None = None) -> int:
        if outcome is not None:
            self.run.write_outcome(outcome)
        return requeue.end(self.folder, code)


def away() -> dict[str, str]:
    """What a question to a controller that is away comes to."""
    raise slurm_commands.SlurmSilentError("scontrol gave no answer in 8 s; is the controller up?")


def batch_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job on its node, for a fixture."""
    for name, value in {"SLURM_JOB_ID": "100", "SLURM_JOB_PARTITION": "main", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(requeue, "CONTROLLER_S", 0.3)
    monkeypatch.setattr(requeue, "RETRY_S", 0.1)
    monkeypatch.setattr(slurm_commands, "LOST_ID_S", 0.1)
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    slurm.answer("shown", RUNNING)
    before = signal.getsignal(signal.SIGTERM)
    yield Job(tmp_path, slurm)
    signal.signal(signal.SIGTERM, before)  # the last question ignores it, and what other tests start would inherit that
