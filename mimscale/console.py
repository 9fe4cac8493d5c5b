"""What a person sees: human text on stderr, results on stdout.

On a terminal a progress bar moves; in a log file (Slurm, CI) a line appears every few seconds instead, because a bar
that redraws itself is unreadable there.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
LOG_LINE_EVERY_S = 5.0


def human() -> Console:
    """The console for human text (stderr). A log file has no width of its own; rich would cut tables at 80 columns."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(stderr=True, highlight=False, soft_wrap=True, width=120)


def say(message: str) -> None:
    """Print one line for a person. Square brackets are printed as they are."""
    human().print(message, markup=False)


def print_json(tree: Any) -> None:
    """Print a result for a program, as one JSON object on stdout."""
    print(json.dumps(tree, sort_keys=True, allow_nan=False), flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table for a person. Square brackets are printed as they are."""
    table = Table(*map(escape, columns), title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    human().print(table)


def track(items: Iterable[T], description: str, total: int, note: Callable[[], str] = lambda: "") -> Iterator[T]:
    """Yield `items` and show how far they are, and what `note` says then."""
    console = human()
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        ) as bar:
            task = bar.add_task(description, total=total, note="")
            for item in items:
                yield item
                bar.update(task, advance=1, note=note())
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_LINE_EVERY_S or done == total:
            last = now
            left_s = (now - start) / done * (total - done)
            parts = [f"{description}: {done}/{total}", f"{now - start:.0f} s", f"{left_s:.0f} s left", note()]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)
