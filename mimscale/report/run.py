"""`mimscale report RUN_DIR [RUN_DIR ...] [out=DIR]`: one page of one or more runs."""

import dataclasses
import time
from importlib.metadata import version
from pathlib import Path

from mimscale import durable
from mimscale.config import split_arguments, verb_parser
from mimscale.console import print_json, say
from mimscale.errors import ConfigError, DataError
from mimscale.report.data import read_store
from mimscale.report.facts import RunFacts, read_run
from mimscale.report.page import render, write_page


def main(argv: list[str]) -> int:
    """The verb `report`."""
    parser = verb_parser("report", "One HTML page of one or more run directories.")
    parser.add_argument("--json", action="store_true", help="print the page's path as JSON")
    arguments = parser.parse_args(argv)
    folders, overrides = split_arguments(arguments.words)
    unknown = [override for override in overrides if not override.startswith("out=")]
    if unknown or not folders:
        raise ConfigError(f"expected RUN_DIR [RUN_DIR ...] [out=DIR], got {arguments.words}")
    out = Path(overrides[-1].removeprefix("out=")) if overrides else Path(folders[0]) / "report"
    page = write_report([Path(folder) for folder in folders], out)
    say(f"report: {page}")
    if arguments.json:
        print_json({"page": str(page)})
    else:
        print(page)
    return 0


def write_report(folders: list[Path], out: Path) -> Path:
    """Write `index.html` with its pictures into `out`; returns the page's path.

    Raises:
        ConfigError: a folder is no run directory.
        DataError: the disk is full or not writable.
    """
    runs = _with_distinct_names([read_run(folder) for folder in folders])
    stores = [read_store(path) for path in dict.fromkeys(_store_of(run) for run in runs)]
    with durable.explained(DataError, out, "free some space, or give another out=DIR"):
        out.mkdir(parents=True, exist_ok=True)
        made = time.strftime("%Y-%m-%d %H:%M %Z")
        view = write_page(runs, stores, out, f"mimscale {version('mimscale')}, written {made}.")
        durable.write_text(out / "index.html", render(view))
    return out / "index.html"


def _store_of(run: RunFacts) -> Path:
    scored_on = run.scores.get("store") if run.scores else None
    return Path(scored_on or run.config["store"])


def _with_distinct_names(runs: list[RunFacts]) -> list[RunFacts]:
    """Two runs may have the same folder name: then the folder above tells them apart, or a number."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    named = [f"{run.run.path.resolve().parent.name}_{run.name}" for run in runs]
    if len(set(named)) < len(named):
        named = [f"{name}_{index}" for index, name in enumerate(names, start=1)]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, named, strict=True)]
