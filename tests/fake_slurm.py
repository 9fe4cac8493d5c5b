"""Shell scripts in place of Slurm's commands: they note how they are called and answer what a test tells them."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.folder import JobFolder, job_folders
from mimscale import cli
from mimscale.train.run_dir import RunDir

SCRIPTS = {
    "sbatch": """
for last; do :; done
count=$(($(cat count 2>/dev/null || echo 99) + 1)); echo $count > count
echo "$*" >> sbatch.calls; cp "$last" script.$count; /usr/bin/env > environment.$count
test ! -e refuse || { cat refuse >&2; exit 1; }
echo $count
""",
    "squeue": 'echo "$*" >> squeue.calls; test ! -e silent || exit 1; cat queue 2>/dev/null || true',
    "scancel": 'echo "$*" >> scancel.calls; ls -1 "$WATCHED" > scancel.saw',
    "sinfo": "echo 'main|1:00:00'; echo 'urgent|infinite'",
    "sacct": 'echo "$*" >> sacct.calls; cat accounts 2>/dev/null || exit 1',
    "scontrol": 'echo "$*" >> scontrol.calls; cat shown 2>/dev/null || true',
}


SLURM_PROFILE = {
    "executor": "slurm",
    "processes_per_node": 1,
    "accelerator": "cpu",
    "timeout_min": 30,
    "slurm": {"partition": "main", "cpus_per_task": 1},
}


class FakeSlurm:
    """A folder of commands, first on PATH, and what they were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, queues: bool = False) -> None:
        """With `queues` squeue shows each job from its submission on, waiting for another one."""
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, body in SCRIPTS.items():
            path = folder / "bin" / name
            if queues:
                line = 'echo "$count|$count|somebody|PENDING|Dependency||9:00|a job" >> queue'
                body = body.replace("echo $count\n", f"{line}; echo $count\n")
            path.write_text(f"#!/bin/bash\ncd {folder}\nPATH=/bin:/usr/bin\n{body}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/bin:/usr/bin")

    def calls(self, command: str) -> list[str]:
        """The arguments of each call of a command."""
        file = self.folder / f"{command}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def script(self, job_id: str) -> str:
        """The batch script of a job."""
        return (self.folder / f"script.{job_id}").read_text()

    def answer(self, name: str, text: str = "") -> None:
        """Let a command answer this: queue, accounts, shown, refuse (of sbatch), silent (squeue fails)."""
        (self.folder / name).write_text(text)

    def hold(self, folder: JobFolder, state: str, reason: str = "None", job_id: str | None = None) -> None:
        """Let squeue show the job of a submission."""
        record = folder.read()
        name = job_id or str(record.job_id)
        line = f"{name}|{name}|{record.user}|{state}|{reason}|node1|9:00|{record.job_name}\n"
        with (self.folder / "queue").open("a") as file:
            file.write(line)

    def forget(self) -> None:
        """Let squeue show nothing."""
        (self.folder / "queue").unlink(missing_ok=True)


def run_verb(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    """Run a verb here; returns its exit code, its JSON when it prints some, and what it says."""
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.startswith(("{", "[")) else out, err


def only_folder(run: RunDir) -> JobFolder:
    """The one submission of a run."""
    (folder,) = job_folders(run.logs)
    return folder
