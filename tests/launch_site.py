"""A place to submit jobs from, with commands that only pretend to be Slurm."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import FakeSlurm, run_verb
from launch_fake_verb import Place

from mimscale import cli
from mimscale.train.run_dir import Outcome

PROFILE = {
    "executor": "slurm",
    "processes_per_node": 2,
    "accelerator": "cpu",
    "timeout_min": 30,
    "environment": {"FAKE": "finish"},
    "slurm": {"partition": "main", "cpus_per_task": 3, "network_interface": "eth0"},
}
FINISHED = Outcome(outcome="finished", exit_code=0, step=20)
FAILED = Outcome(outcome="failed", exit_code=6, step=3, message="rank 1 on node1: Killed")


class Site:
    """A place to submit from, a Slurm that pretends, and the words that most tests need."""

    def __init__(self, folder: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
        self.place = Place(folder)
        self.folder, self.slurm, self.run, self._capsys = folder, slurm, self.place.run, capsys
        self.profile()

    def profile(self, *, slurm: dict[str, Any] | None = None, **changes: Any) -> None:
        tree = {**PROFILE, **changes, "slurm": {**PROFILE["slurm"], **(slurm or {})}}  # type: ignore[dict-item]
        (self.folder / "profile.yaml").write_text(yaml.safe_dump(tree))

    def verb(self, *words: str) -> tuple[int, Any, str]:
        return run_verb(self._capsys, *words)

    def submit(self, *words: str) -> tuple[int, Any, str]:
        return self.verb("submit", "pretrain", "recipe.yaml", "--profile", "profile.yaml", "--json", *words)

    def status(self, *words: str) -> dict[str, Any]:
        code, answer, said = self.verb("status", "run", "--json", *words)
        assert code == 0, said
        assert isinstance(answer[-1], dict)
        return answer[-1]


def site_in(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    """A site in a folder, which becomes the working directory."""
    slurm = FakeSlurm(folder / "slurm", monkeypatch)
    monkeypatch.setitem(cli.VERBS, "pretrain", ("launch_fake_verb:main", "a fake"))
    place = folder / "site"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("WATCHED", str(place))
    for name in ("SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return Site(place, slurm, capsys)
