"""Stand-ins for the engine and the ranks, so that the commit protocol and the loop are tested in milliseconds."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from mimscale import durable
from mimscale.train.checkpoint import Checkpoints
from mimscale.train.config import CheckpointConfig
from mimscale.train.run_dir import RunDir
from mimscale.world import World


class OneRank:
    """A world of one process."""

    world = World()

    def gather(self, item: Any) -> list[Any]:
        return [item]

    gather_to_first = gather

    def first_does(self, action: Callable[[], Any]) -> Any:
        return action()


class FileEngine:
    """Its state is one number in one file; `ballast_bytes` make the file larger, and its writing slower."""

    zero_stage = 1
    precision = "fp32"

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.state = 0
        self.error: OSError | None = None  # of the next write
        self.ballast_bytes = ballast_bytes
        self.may_write = Event()
        self.may_write.set()

    def snapshot(self) -> "FilePart":
        return FilePart(self, self.state)

    def write_index(self, folder: Path, parts: list[Any]) -> Path:
        durable.write_json(folder / "state.json", parts)
        return folder / "state.json"

    def load(self, folder: Path, files: Iterable[str]) -> None:
        (name,) = json.loads((folder / "state.json").read_text())
        self.state = json.loads((folder / name).read_text())


class FilePart:
    """A copy of that number."""

    file_bytes = 1

    def __init__(self, engine: FileEngine, state: int) -> None:
        self._engine = engine
        self.full_weights = {"weight": np.array([state])}

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        assert self._engine.may_write.wait(20)
        if self._engine.error is not None:
            raise self._engine.error
        path = folder / self.index()
        durable.write_text(path, f"{self.full_weights['weight'][0]}{' ' * self._engine.ballast_bytes}")
        return {path.name: {"bytes": path.stat().st_size, "sha256": durable.sha256_of_file(path)}}

    def index(self) -> str:
        return "state-rank00000.json"


def write_weights(folder: Path, step: int, weights: dict[str, Any]) -> list[Path]:
    durable.write_text(folder / "weights.safetensors", f"{weights} of step {step}")
    return [folder / "weights.safetensors"]


def checkpoints_of(run: RunDir, engine: FileEngine, ranks: Any = None, **config: Any) -> Checkpoints:
    config = {"every_steps": 1, "mode": "sync"} | config
    return Checkpoints(run, CheckpointConfig(**config), engine, ranks or OneRank(), write_weights)
