"""Results of benchmarks as files: read, checked, and searched for the rates in them. No torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.bench.measure import SCHEMA_VERSION
from mimscale.errors import ConfigError

RESULT_FILE = "bench.json"  # in a run directory
RATES = ("samples_per_s", "crops_per_s", "mb_per_s")


@dataclass(frozen=True)
class Windows:
    """How long a mode of training is measured."""

    warmup_steps: int
    steps: int  # of a window
    count: int

    def __post_init__(self) -> None:
        if min(self.steps, self.count) < 1 or self.warmup_steps < 0:
            raise ConfigError(
                f"--steps {self.steps} --windows {self.count} --warmup {self.warmup_steps}: 1, 1, 0 or more"
            )


@dataclass(frozen=True)
class Rate:
    """One measured throughput with the spread of its repeats."""

    name: str
    per_s: float
    spread_percent: float


def rates(tree: Any, name: str = "") -> Iterator[Rate]:
    """Every rate in a result that has a spread beside it, named by the way to it.

    A row of a table is named by what it says about itself, not by its place: tables are sorted by speed.
    """
    if isinstance(tree, list):
        for place, item in enumerate(tree):
            own = [str(item[key]) for key in NAMING if key in item] if isinstance(item, dict) else []
            yield from rates(item, " / ".join(filter(None, (name, ", ".join(own) or str(place)))))
    elif isinstance(tree, dict):
        for key in RATES:
            if key in tree and "spread_percent" in tree:
                yield Rate(f"{name}: {key}", float(tree[key]), float(tree["spread_percent"]))
        for key, value in tree.items():
            if key not in ("surroundings", "config"):
                yield from rates(value, " / ".join(filter(None, (name, str(key)))))


NAMING = ("name", "mode", "setting", "kind", "ranks", "workers", "volumes", "condition", "crop_voxels", "zero_stage")


def read_result(path: Path) -> dict[str, Any]:
    """The JSON of a benchmark: a file, or a run directory that holds one.

    Raises:
        ConfigError: there is none, or it is no result of a benchmark.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: no result of a benchmark: {error}") from None
    if not isinstance(tree, dict) or "benchmark" not in tree or tree.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"{file}: no result of a benchmark with schema_version {SCHEMA_VERSION}; run the benchmark again"
        )
    return tree
