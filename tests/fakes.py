"""Stand-ins for the engine and the ranks, so that the commit protocol and the loop are tested in milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimscale.train.checkpoint import Checkpoints
from mimscale.train.config import CheckpointConfig
from mimscale.train.run_dir import RunDir
from mimscale.world import World


class OneRank:
    """A world of one process."""

    world = World()

    def gather(self, item: Any) -> list[Any]:
        return [item]

    def first_does(self, action: Callable[[], Any]) -> Any:
        return action()


class FileEngine:
    """Its state is one number in one file; `ballast_bytes` make the file larger, and its writing slower."""

    zero_stage = 1

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.state = 0
        self.errors: list[OSError] = []
        self._ballast = " " * ballast_bytes

    def save(self, folder: Path, step: int) -> list[OSError]:
        try:
            (folder / "engine").mkdir()
            (folder / "engine" / "zero_pp_rank_0_state.json").write_text(json.dumps(self.state) + self._ballast)
        except OSError as error:
            return [*self.errors, error]
        return self.errors

    def load(self, folder: Path) -> None:
        self.state = json.loads((folder / "engine" / "zero_pp_rank_0_state.json").read_text())


def write_weights(folder: Path, step: int) -> None:
    (folder / "weights.safetensors").write_text(f"weights of step {step}")


def checkpoints_of(run: RunDir, engine: FileEngine, **options: Any) -> Checkpoints:
    """Checkpoints of a run; `options` are those of `CheckpointConfig`."""
    return Checkpoints(run, CheckpointConfig(**{"every_steps": 1, **options}), engine, OneRank(), write_weights)
