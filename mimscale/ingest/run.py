"""`mimscale ingest`: volumes -> store, restartable, with the same bytes whatever the number of workers or array tasks.

mimscale ingest RECIPE sources=... out=STORE                  plan, convert, build the manifest
mimscale ingest RECIPE sources=... out=STORE task=3/64        plan if nobody has, convert a share of the parts
mimscale ingest RECIPE sources=... out=STORE merge=true       build the manifest once all tasks have ended
mimscale ingest RECIPE sources=... out=STORE remove=SUBJECT   withdraw a subject
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimscale import console, durable
from mimscale.config import config_yaml, load_verb_config, verb_parser
from mimscale.errors import DataError
from mimscale.ingest import merge, planning, remove
from mimscale.ingest.config import IngestConfig, task_share
from mimscale.ingest.convert import Conversion, convert_part
from mimscale.ingest.formats import REASONS
from mimscale.ingest.gates import GATES
from mimscale.ingest.plan import PlannedSource
from mimscale.ingest.pool import process_pool
from mimscale.ingest.receipts import Lines, read_receipt
from mimscale.lock import refuse_if_held, sole_writer
from mimscale.store import layout

MOST_NAMED = 10  # quarantined sources that are shown; the journal holds all


def main(argv: list[str]) -> int:
    """`mimscale ingest RECIPE sources=... out=STORE [key=value ...] [--check] [--json]`."""
    parser = verb_parser(
        "ingest", "Convert volumes into a store. The same command continues an ingest that was stopped."
    )
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    arguments = parser.parse_intermixed_args(argv)  # words may follow a flag
    config = load_verb_config(IngestConfig, arguments.words, needs_recipe=True)
    if arguments.check:
        print(config_yaml(config), end="")
        return 0
    summary = ingest(config)
    if arguments.json:
        console.print_json(summary)
    _say_summary(config, summary)
    limit, journal = config.max_quarantined, merge.journal_path(Path(config.out))
    if config.task is None and summary["stored"] == 0:
        raise DataError(f"{config.out}: not one source could be stored; see the reason of each in {journal}")
    if config.task is None and limit is not None and summary["quarantined"] > limit:
        raise DataError(
            f"{config.out}: {summary['quarantined']} quarantined, max_quarantined={limit}: the store got no manifest; "
            f"see {journal}, then run the same command with a higher max_quarantined to keep what is good"
        )
    return 0


def _say_summary(config: IngestConfig, summary: Mapping[str, Any]) -> None:
    what = f"{config.out}, task {config.task}" if config.task else config.out
    more = "".join(f", {summary[name]} {name}" for name in ("overlays", "superseded", "withdrawn") if summary.get(name))
    console.say(
        f"{what}: {summary['stored']} stored, {summary['duplicates']} duplicate(s), "
        f"{summary['quarantined']} quarantined{more}; "
        f"{summary['seconds']:.1f} s, {summary['mb_per_s']:.1f} MB of source files/s"
    )
    for kind in ("reasons", "warnings"):
        for reason, count in summary.get(kind, {}).items():
            example = summary.get("examples", {}).get(reason)
            first = f"; first {example}" if example else ""
            console.say(f"  {kind.removesuffix('s')} {reason}: {count}{first}")
    journal = merge.journal_path(Path(config.out))
    if not summary.get("examples"):
        return
    if any(name in os.environ for name in _JOB_VARIABLES):
        # A job's log stays, and others may read it; names of files name patients.
        console.say(f"  which file a source is stands in {journal}, under `receipt`")
    else:
        _say_quarantined(journal)


_JOB_VARIABLES = ("MIMSCALE_JOB_ID", "SLURM_JOB_ID")


def _say_quarantined(journal: Path) -> None:
    """Name the first sources that were left out, each with what is wrong."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    left_out = [line for line in lines if line["outcome"] == "quarantined"]
    first_of = {line["reason"]: line["receipt"] for line in reversed(left_out)}
    left_out.sort(key=lambda line: first_of[line["reason"]] != line["receipt"])  # one of each reason before a second
    for line in left_out[:MOST_NAMED]:
        label = f" with label {line['label']}" if line["label"] else ""
        meaning = {**REASONS, **GATES}.get(line["reason"], "warned about by its reader")
        console.say(f"  {line['source']}{label}: {meaning} ({line['reason']}: {line['detail']})")
    if left_out:
        more = f"{len(left_out) - MOST_NAMED} more in {journal}; " if len(left_out) > MOST_NAMED else ""
        console.say(f"  {more}put these right and run the same command again, or leave them out of sources")


def ingest(config: IngestConfig) -> dict[str, Any]:
    """Do what the config asks for: all of an ingest, the share of an array task, the merge, or a removal.

    Returns:
        {"stored", "quarantined", "duplicates", "reasons", "seconds", "mb_per_s", ...}; see `merge.merge`. Of an array
        task the counts are those of its share, before duplicates of other parts are known.

    Raises:
        ConfigError: the store was made with another config or another key, or is being written.
        DataError: sources that match nothing, parts that are missing, or a store that cannot be written.
    """
    start = time.monotonic()
    store = Path(config.out)
    if config.task is not None:
        summary, done_bytes = _run_task(store, config)
    elif config.merge or config.remove is not None:
        layout.read_info(store)  # refuses what is no store
        with _sole_ingest(store):
            if config.remove is not None:
                summary = remove.remove_subject(config)
            else:
                work = planning.planned(config)
                summary = merge.merge(store, work.plan, config, work.key)
        done_bytes = 0
    else:
        found = planning.list_sources(config)  # first: sources that match nothing leave no folder behind
        _make_folder(store)
        with _sole_ingest(store):
            work = planning.plan_now(config, found)
            _, done_bytes = _convert(work, config, work.parts)
            summary = merge.merge(store, work.plan, config, work.key)
    seconds = time.monotonic() - start
    return {**summary, "seconds": round(seconds, 3), "mb_per_s": round(done_bytes / 1e6 / seconds, 3)}


LOCK_NAME = "ingest.lock"


@contextmanager
def _sole_ingest(store: Path) -> Iterator[None]:
    """Nobody else converts, merges or removes, and no array task is at work."""
    with sole_writer(store / LOCK_NAME, "another ingest"):
        for lock in sorted(store.glob("task-*.lock")):
            refuse_if_held(lock)
        _remove_leftovers(store)
        yield


def _run_task(store: Path, config: IngestConfig) -> tuple[dict[str, Any], int]:
    assert config.task is not None, "called for an array task"
    index, count = task_share(config.task)
    _make_folder(store)
    refuse_if_held(store / LOCK_NAME)
    with sole_writer(store / f"task-{index:05d}-of-{count:05d}.lock", f"ingest task {config.task}"):
        work = planning.planned_by_anyone(config)
        return _convert(work, config, [part for part in work.parts if part % count == index])


def _make_folder(store: Path) -> None:
    with durable.explained(DataError, store, "choose another out"):
        store.mkdir(parents=True, exist_ok=True)


def _convert(work: planning.Work, config: IngestConfig, parts: Sequence[int]) -> tuple[dict[str, Any], int]:
    """Convert those of `parts` that are not finished. Returns counts over all of them, and the bytes that were read."""
    store = Path(config.out)
    receipts: dict[int, Lines] = {}
    for part in parts:
        lines = read_receipt(store, part)
        if lines is not None:
            receipts[part] = lines
    if receipts:
        console.say(f"{store}: {len(receipts)} of {len(parts)} parts are finished already")
    todo = [part for part in parts if part not in receipts]
    by_part = {part: sources for one in work.plan.rounds for part, sources in one.by_part().items()}
    done_bytes = sum(source.size_bytes for part in todo for source in by_part[part])
    if config.task is not None:
        _remove_leftovers_of_parts(store, todo)
    so_far = _SoFar()
    with process_pool(config.workers, len(todo)) as pool:
        work_done = _convert_all(pool, work, config, todo, by_part, receipts)
        total = sum(len(by_part[part]) for part in todo)
        for line, source in console.track(work_done, "ingest", total, so_far.text):
            so_far.add(line, source)
    return _counts(receipts.values()), done_bytes


class _SoFar:
    """What the progress bar says beside the number of sources."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._bytes = 0
        self._quarantined = 0

    def add(self, line: dict[str, Any], source: PlannedSource) -> None:
        self._bytes += source.size_bytes
        self._quarantined += line["outcome"] == "quarantined"

    def text(self) -> str:
        rate = self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-3)
        return f"{self._quarantined} quarantined, {rate:.0f} MB/s"


def _convert_all(
    pool: ProcessPoolExecutor | None,
    work: planning.Work,
    config: IngestConfig,
    todo: Sequence[int],
    by_part: Mapping[int, Sequence[PlannedSource]],
    receipts: dict[int, Lines],
) -> Iterator[tuple[dict[str, Any], PlannedSource]]:
    """Fill `receipts`; yields the line of each source as its part is finished."""

    def how(part: int) -> Conversion:
        return Conversion(
            store=Path(config.out),
            config=config,
            class_names=work.round_of(part).class_names,
            key=work.key,
            withdrawn=work.info.withdrawn,
        )

    if pool is None:
        for part in todo:
            receipts[part] = convert_part(part, by_part[part], how(part))
            yield from zip(receipts[part], by_part[part], strict=True)
        return
    # The largest first, so that no worker starts a long part when the others have nothing left.
    todo = sorted(todo, key=lambda part: -sum(source.size_bytes for source in by_part[part]))
    jobs = {pool.submit(convert_part, part, by_part[part], how(part)): part for part in todo}
    for job in as_completed(jobs):
        part = jobs[job]
        receipts[part] = job.result()
        yield from zip(receipts[part], by_part[part], strict=True)


def _counts(receipts: Iterable[Lines]) -> dict[str, Any]:
    lines = [line for receipt in receipts for line in receipt]
    outcomes = Counter(line["outcome"] for line in lines)
    reasons = Counter(line["reason"] for line in lines if line["outcome"] == "quarantined")
    return {
        "stored": outcomes["stored"],
        "quarantined": outcomes["quarantined"],
        "duplicates": outcomes["duplicate"],
        "reasons": dict(sorted(reasons.items())),
    }


def _remove_leftovers(store: Path) -> None:
    """Temporary files of whoever was killed, in the store and beside it; nobody is at work here now."""
    beside = store.parent.glob(f"{durable.TEMPORARY_PREFIX}{store.name}.*")
    for path in [*store.rglob(f"{durable.TEMPORARY_PREFIX}*"), *beside]:
        if ".lock" not in path.name:  # somebody may be asking for one
            path.unlink(missing_ok=True)


def _remove_leftovers_of_parts(store: Path, parts: Iterable[int]) -> None:
    """Temporary files of an array task's own parts: others may be at work in other tasks."""
    for part in parts:
        for path in store.rglob(f"{durable.TEMPORARY_PREFIX}part-{part:05d}.*"):
            path.unlink(missing_ok=True)
