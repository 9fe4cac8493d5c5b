"""Results of benchmarks: told and written as table, JSON and chart; read. No torch."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale import console, durable
from mimscale.bench.measure import SCHEMA_VERSION
from mimscale.errors import ConfigError
from mimscale.world import World

RESULT_FILE = "bench.json"  # in a run directory, or where --out says; the table and the chart lie beside it


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


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The arguments by which every benchmark is told where its result goes; a run directory does that too."""
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout, instead of the table")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write it there too, as bench.json, bench.md and a chart, bench.png"
    )


def make_folder(folder: Path | None) -> None:
    """Make the folder of `--out` before anything is measured.

    Raises:
        ConfigError: it cannot be made.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {folder}: {error.strerror}; give a folder that can be written") from None


def folder_of(out: Path | None, run_dir: Path) -> Path | None:
    """Where the files of a result go: to `--out`, else to the run directory, if one was given."""
    return out or (None if run_dir == Path("none") else run_dir)


def is_for_another_rank(kind: str) -> bool:
    """Whether this process is a further rank of a benchmark that measures one core: rank 0 alone does it then."""
    world = World.from_environment(os.environ)
    if world.size > 1 and world.is_first:
        console.say(
            f"bench {kind} measures one core, so {world.size - 1} rank(s) have nothing to do; `mimscale bench train` "
            "measures what all ranks together read"
        )
    return not world.is_first


def tell(
    result: dict[str, Any],
    as_text: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None],
    *,
    as_json: bool,
    folder: Path | None,
) -> None:
    """Print a result as a table or as JSON; where there is a folder, write table, JSON and chart into it."""
    if folder is not None:
        make_folder(folder)
        file = folder / RESULT_FILE
        durable.write_json(file, result)
        durable.write_text(file.with_suffix(".md"), f"# {result['benchmark']}\n\n{as_text(result)}\n")
        draw(result, file.with_suffix(".png"))
    console.print_json(result) if as_json else print(as_text(result), flush=True)


def shown_name(row: dict[str, Any]) -> str:
    """A contender's name; what should have been compiled and was not must not pass for compiled."""
    if not (count := row.get("plain_functions")):
        return str(row["name"])
    reason = row.get("plain_reason")
    return f"{row['name']} ({count} function(s) fell back to plain{'' if reason is None else f': {reason}'})"


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
