"""`mimscale ingest`: volumes -> store, restartable, with the same bytes whatever the number of workers."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mimscale import console, durable
from mimscale.config import config_tree, config_yaml, differing_keys, load_verb_config, tree_hash, verb_parser
from mimscale.errors import ConfigError, DataError
from mimscale.ingest import merge, sources
from mimscale.ingest.config import OUTSIDE_HASH, IngestConfig
from mimscale.ingest.convert import convert_part, read_receipt
from mimscale.ingest.pool import process_pool
from mimscale.ingest.sources import Source
from mimscale.ingest.sources.planned import PlannedSource, plan_parts, plan_source
from mimscale.lock import sole_writer
from mimscale.store import layout

Lines = list[dict[str, Any]]


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
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["reasons"].items())
    console.say(
        f"{config.out}: {summary['stored']} stored, {summary['duplicates']} duplicate(s), "
        f"{summary['quarantined']} quarantined{f' ({reasons})' if reasons else ''}; "
        f"{summary['seconds']:.1f} s, {summary['mb_per_s']:.1f} MB of source files/s"
    )
    limit, journal = config.max_quarantined, merge.journal_path(Path(config.out))
    if summary["stored"] == 0:
        raise DataError(f"{config.out}: not one source could be stored; see the reason of each in {journal}")
    if limit is not None and summary["quarantined"] > limit:
        raise DataError(
            f"{config.out}: {summary['quarantined']} quarantined, max_quarantined={limit}: the store got no manifest; "
            f"see {journal}, then run the same command with a higher max_quarantined to keep what is good"
        )
    return 0


def ingest(config: IngestConfig) -> dict[str, Any]:
    """Convert all sources and write the manifest.

    Returns:
        {"stored", "quarantined", "duplicates", "reasons", "seconds", "mb_per_s"}. Without a stored volume, and above
        `max_quarantined`, no manifest is written.

    Raises:
        ConfigError: the store was made with another config, other sources or another key, or is being written.
        DataError: sources that match nothing, or a store that cannot be written.
    """
    start = time.monotonic()
    found = sources.find(config.sources, config)
    class_names = config.class_names or found.class_names
    if not class_names and any(source.label for source in found.sources):
        raise ConfigError(
            "class_names: there are label files, and neither the recipe nor a dataset.json names their values; "
            "set class_names=[background, ...]"
        )
    store = Path(config.out)
    with durable.explained(DataError, store, "choose another out"):
        store.mkdir(parents=True, exist_ok=True)
    with sole_writer(store / _LOCK_NAME, "another ingest"), process_pool(config.workers, len(found.sources)) as pool:
        planned = list(_hash_all(pool, found.sources))
        parts = plan_parts(planned, config)
        key = merge.subject_key(store, config.subject_key)
        _write_or_compare_info(store, config, class_names, parts, merge.fingerprint(key))
        _remove_leftovers(store)
        receipts: dict[int, Lines] = {}
        for part in range(len(parts)):
            lines = read_receipt(store, part)
            if lines is not None:
                receipts[part] = lines
        if receipts:
            console.say(f"{store}: {len(receipts)} of {len(parts)} parts are finished already")
        todo = [part for part in range(len(parts)) if part not in receipts]
        done_bytes = sum(source.size_bytes for part in todo for source in parts[part])
        work = _convert_all(pool, store, parts, todo, config, class_names, receipts)
        for _ in console.track(work, "ingest", sum(len(parts[part]) for part in todo)):
            pass
        summary = merge.merge(store, parts, receipts, config, key)
    seconds = time.monotonic() - start
    return {**summary, "seconds": round(seconds, 3), "mb_per_s": round(done_bytes / 1e6 / seconds, 3)}


def _hash_all(pool: ProcessPoolExecutor | None, found: Sequence[Source]) -> Iterator[PlannedSource]:
    results = map(plan_source, found) if pool is None else pool.map(plan_source, found, chunksize=8)
    yield from console.track(results, "hash sources", len(found))


def _convert_all(
    pool: ProcessPoolExecutor | None,
    store: Path,
    parts: list[list[PlannedSource]],
    todo: list[int],
    config: IngestConfig,
    class_names: tuple[str, ...],
    receipts: dict[int, Lines],
) -> Iterator[dict[str, Any]]:
    """Fill `receipts`; yields one line a source as its part is finished."""
    if pool is None:
        for part in todo:
            receipts[part] = convert_part(store, part, parts[part], config, class_names)
            yield from receipts[part]
        return
    # The largest first, so that no worker starts a long part when the others have nothing left.
    todo = sorted(todo, key=lambda part: -sum(source.size_bytes for source in parts[part]))
    jobs = {pool.submit(convert_part, store, part, parts[part], config, class_names): part for part in todo}
    for job in as_completed(jobs):
        receipts[jobs[job]] = job.result()
        yield from receipts[jobs[job]]


def _write_or_compare_info(
    store: Path,
    config: IngestConfig,
    class_names: tuple[str, ...],
    parts: list[list[PlannedSource]],
    key_fingerprint: str,
) -> None:
    tree = {**config_tree(config), "class_names": list(class_names)}
    tree = {name: value for name, value in tree.items() if name not in OUTSIDE_HASH}
    planned = [(source.sha256, source.label_sha256, source.problem) for part in parts for source in part]
    overlays = {}
    if any(source.label for part in parts for source in part):
        overlays[config.overlay] = layout.OverlayInfo(class_names=class_names)
    info = layout.StoreInfo(
        chunk_voxels=config.chunk_voxels,
        codec=config.codec,
        intensity=config.intensity,
        modality=config.modality,
        num_parts=len(parts),
        ingest=tree,
        ingest_hash=tree_hash(tree),
        sources_hash=tree_hash(planned),
        subject_key_fingerprint=key_fingerprint,
        overlays=overlays,
    )
    if not layout.info_path(store).exists():
        strangers = [entry.name for entry in sorted(store.iterdir()) if not _is_ours(entry.name)]
        if strangers:
            raise ConfigError(f"{store}: not a store, and not empty (it holds {strangers[0]}); choose another out")
        with durable.explained(DataError, store, "choose another out"):
            layout.write_info(store, info)
        return
    old = layout.read_info(store)
    if old.ingest_hash != info.ingest_hash:
        raise ConfigError(
            f"{store}: was made with another config:\n  "
            + "\n  ".join(differing_keys(old.ingest, info.ingest))
            + "\nchoose another out, or go back to these values"
        )
    if old.sources_hash != info.sources_hash:
        raise ConfigError(
            f"{store}: was made from other sources than the {len(planned)} that are there now (a file was added, "
            "removed or changed); choose another out, or restore the sources"
        )
    if old.subject_key_fingerprint != key_fingerprint:
        raise ConfigError(
            f"{store}: was made with the subject key {old.subject_key_fingerprint}, this one is {key_fingerprint}; "
            "give the right one with subject_key=FILE"
        )


_LOCK_NAME = "ingest.lock"
_OURS = {"packs", "overlays", "receipts"}


def _is_ours(name: str) -> bool:
    return name in _OURS or _LOCK_NAME in name  # the lock, its holder's sign of life, and drafts of both


def _remove_leftovers(store: Path) -> None:
    """Temporary files of an ingest that was killed. Nobody else writes: the lock is ours."""
    for path in store.rglob(f"{durable.TEMPORARY_PREFIX}*"):
        if _LOCK_NAME not in path.name:  # drafts of others who are about to be refused
            path.unlink(missing_ok=True)
