"""Before anything is read: list the sources, compare them with what is planned already, and begin or extend the plan.

A plan that is not finished yet is continued, and its config must be the same. When it is finished, sources that are new
or have changed make a further round of parts; so do label maps for volumes that are stored already.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mimscale import console, durable
from mimscale.config import config_tree, differing_keys, tree_hash
from mimscale.errors import ConfigError, DataError, LaunchError
from mimscale.ingest import sources, subjects
from mimscale.ingest.config import OUTSIDE_HASH, STORE_KEYS, IngestConfig
from mimscale.ingest.plan import Plan, Round, image_stamp, new_sources, plan_path, plan_round, read_plan, write_plan
from mimscale.ingest.receipts import live_parts, read_receipt
from mimscale.ingest.sources import Found, Source
from mimscale.lock import sole_writer
from mimscale.store import layout
from mimscale.store.manifest import load_manifest

PLAN_LOCK = "plan.lock"
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Work:
    """A plan, and what its parts are converted with."""

    plan: Plan
    info: layout.StoreInfo
    key: bytes  # hides subjects and sources
    parts: tuple[int, ...]  # of the plan, without those that another one has taken the place of

    def round_of(self, part: int) -> Round:
        """The round that a part belongs to."""
        return next(one for one in self.plan.rounds if part in one.parts)


def planned(config: IngestConfig) -> Work:
    """The plan as it is.

    Raises:
        ConfigError: another config or key than the plan was made with.
        DataError: nothing is planned, or the plan is gone.
    """
    store = Path(config.out)
    info, plan = layout.read_info(store), _read_plan(store)
    key = _key(store, config, info)
    newest = plan.rounds[-1]
    _refuse_other_config(store, newest.config, _round_config(config, newest.class_names))
    return Work(plan=plan, info=info, key=key, parts=tuple(live_parts(store, info)))


def list_sources(config: IngestConfig) -> Found:
    """Expand `sources`; the class names are the recipe's, or else those of the list.

    Raises:
        ConfigError: there are label files whose values have no names.
        DataError: sources that match nothing or cannot be listed.
    """
    found = sources.find(config.sources, config)
    class_names = config.class_names or found.class_names
    if not class_names and any(source.label for source in found.sources):
        raise ConfigError(
            "class_names: there are label files, and neither the recipe nor a dataset.json names their values; "
            "set class_names=[background, ...]"
        )
    return replace(found, class_names=class_names)


def plan_now(config: IngestConfig, found: Found) -> Work:
    """Begin, continue or extend the plan with what was listed.

    Raises:
        ConfigError: another config or key than the store was made with.
        DataError: the plan is gone, or the store cannot be written.
    """
    store, class_names = Path(config.out), found.class_names
    tree = _round_config(config, class_names)
    if not layout.info_path(store).exists():
        _refuse_strangers(store)
        key = subjects.subject_key(store, config.subject_key)
        return _extend(store, Plan(), found.sources, {}, config, tree, key, None)
    info, plan = layout.read_info(store), _read_plan(store)
    key = _key(store, config, info)
    newest = plan.rounds[-1]
    fresh = new_sources(plan, found.sources, config.overlay)
    if any(read_receipt(store, part) is None for part in set(newest.parts) & set(live_parts(store, info))):
        _refuse_other_config(store, newest.config, tree)
        if fresh:
            console.say(f"{store}: {len(fresh)} source(s) are new or have changed; run this again to add them")
        return planned(config)
    if not fresh:
        _refuse_other_config(store, newest.config, tree)
        return planned(config)
    _refuse_other_config(store, info.ingest, {name: tree[name] for name in STORE_KEYS})
    return _extend(store, plan, fresh, _stored_images(store, plan, fresh, key), config, tree, key, info)


def planned_by_anyone(config: IngestConfig) -> Work:
    """The plan that all tasks of an array share: the first task to come makes it, the others wait for it.

    Raises:
        ConfigError, DataError: as `plan_now`.
    """
    store = Path(config.out)
    told = False
    while True:
        if _is_open(store):
            return planned(config)
        try:
            with sole_writer(store / PLAN_LOCK, "a task that lists the sources"):
                return planned(config) if _is_open(store) else plan_now(config, list_sources(config))
        except LaunchError:  # another task is listing them
            if not told:
                console.say(f"{store}: waiting for another task that lists the sources")
            told = True
            time.sleep(POLL_S)


def _is_open(store: Path) -> bool:
    """True when a plan stands whose newest round has no manifest yet: the tasks of an array are at work on it."""
    if not (layout.info_path(store).exists() and plan_path(store).exists()):
        return False
    if not layout.manifest_path(store).exists():
        return True
    info = layout.read_info(store)
    return not all(layout.receipt_path(store, part).exists() for part in live_parts(store, info))


def _extend(
    store: Path,
    plan: Plan,
    found: Sequence[Source],
    overlay_of: Mapping[int, str],
    config: IngestConfig,
    tree: dict[str, Any],
    key: bytes,
    info: layout.StoreInfo | None,
) -> Work:
    first_part = info.num_parts if info else 0
    class_names = tuple(tree["class_names"])
    one = plan_round(
        found,
        first_part=first_part,
        num_parts=config.parts,
        part_bytes=config.part_bytes,
        config=tree,
        class_names=class_names,
        overlay_of=overlay_of,
    )
    overlays = dict(info.overlays) if info else {}
    if any(source.label for source in found):
        before = overlays.setdefault(config.overlay, layout.OverlayInfo(class_names=class_names))
        if before.class_names != class_names:
            raise ConfigError(
                f"class_names={list(class_names)}: overlay {config.overlay} of {store} has {list(before.class_names)}; "
                "use these, or another overlay=NAME"
            )
        if not config.keeps_grid:
            overlays[layout.source_overlay(config.overlay)] = before
    store_tree = {name: tree[name] for name in STORE_KEYS}
    extended = layout.StoreInfo(
        chunk_voxels=config.chunk_voxels,
        codec=config.codec,
        intensity=config.intensity,
        modality=info.modality if info else config.modality,
        num_parts=one.parts.stop,
        ingest=store_tree,
        ingest_hash=tree_hash(store_tree),
        subject_key_fingerprint=subjects.fingerprint(key),
        overlays=overlays,
        withdrawn=info.withdrawn if info else (),
        rewritten_parts=info.rewritten_parts if info else {},
    )
    longer = Plan((*plan.rounds, one))
    # The plan first: a store whose plan lacks its newest parts could not be continued, parts without a store.json can.
    write_plan(store, longer)
    with durable.explained(DataError, store, "choose another out"):
        layout.write_info(store, extended)
    return Work(plan=longer, info=extended, key=key, parts=tuple(live_parts(store, extended)))


def _read_plan(store: Path) -> Plan:
    plan = read_plan(store)
    info = layout.read_info(store)
    # Killed between plan and store.json: what store.json does not count is planned anew.
    plan = Plan(tuple(one for one in plan.rounds if one.first_part < info.num_parts))
    if not plan.rounds:
        raise DataError(
            f"{plan_path(store)}: gone; it says which source went where, and without it the store cannot be continued. "
            "Put it back, or choose another out"
        )
    return plan


def _key(store: Path, config: IngestConfig, info: layout.StoreInfo) -> bytes:
    key = subjects.subject_key(store, config.subject_key)
    mark = subjects.fingerprint(key)
    if info.subject_key_fingerprint != mark:
        raise ConfigError(
            f"{store}: was made with the subject key {info.subject_key_fingerprint}, this one is {mark}; "
            "give the right one with subject_key=FILE"
        )
    return key


def _round_config(config: IngestConfig, class_names: Sequence[str]) -> dict[str, Any]:
    tree = {**config_tree(config), "class_names": list(class_names)}
    return {name: value for name, value in tree.items() if name not in OUTSIDE_HASH}


def _refuse_other_config(store: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old != new:
        raise ConfigError(
            f"{store}: was made with another config:\n  "
            + "\n  ".join(differing_keys(old, new))
            + "\nchoose another out, or go back to these values"
        )


def _refuse_strangers(store: Path) -> None:
    strangers = [entry.name for entry in sorted(store.iterdir()) if ".lock" not in entry.name]
    if strangers:
        raise ConfigError(f"{store}: not a store, and not empty (it holds {strangers[0]}); choose another out")


def _stored_images(store: Path, plan: Plan, found: Sequence[Source], key: bytes) -> dict[int, str]:
    """Index of a source -> the volume that its image is stored as already, so that only its label is new."""
    wanted = {(source.channels, image_stamp(source)): index for index, source in enumerate(found) if source.label}
    if not wanted or not layout.manifest_path(store).exists():
        return {}
    ids = set(load_manifest(store).column("id").tolist())
    line_of = {
        line["source"]: line
        for part in live_parts(store, layout.read_info(store))
        for line in read_receipt(store, part) or []
    }
    stored: dict[int, str] = {}
    for planned_source in plan.sources:
        index = wanted.get((planned_source.channels, planned_source.image_stamp))
        if index is not None:
            line = line_of.get(planned_source.receipt_key(key), {})
            volume_id = line.get("of") or line.get("id")
            if volume_id is not None and volume_id in ids:
                stored[index] = volume_id
    return stored
