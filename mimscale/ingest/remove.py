"""A subject withdraws: every pack that holds it is written again without it, and the store never takes it back.

A pack is never changed in place. Its other volumes are copied, byte by byte, into a new part; then the manifest is
built from the new receipts; then the old pack goes. Killed anywhere, the store stays readable, and the same command
finishes.
"""

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimscale import console, durable
from mimscale.errors import DataError
from mimscale.ingest import merge, planning
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.plan import Plan, Round, write_plan
from mimscale.ingest.receipts import Lines, live_parts, read_receipt, write_receipt
from mimscale.ingest.subjects import hidden
from mimscale.store import layout
from mimscale.store.chunk_maps import remove_other_chunk_maps
from mimscale.store.manifest import load_manifest
from mimscale.store.rows import row_of_receipt, row_tree
from mimscale.store.verify import verify
from mimscale.store.writer import PackWriter

_WAY_OUT = "free some space and run the same command again"


def remove_subject(config: IngestConfig) -> dict[str, Any]:
    """Withdraw `config.remove` from the store of `config`, and check that it is gone.

    Returns:
        the summary of the merge, and {"removed_volumes"}.

    Raises:
        DataError: no such subject, an ingest that has not ended, or a store that is damaged or cannot be written.
    """
    assert config.remove is not None, "called for a subject"
    store = Path(config.out)
    work = planning.planned(config)
    info, key = work.info, work.key
    hashes = {hidden(config.remove, key), config.remove}
    receipts: dict[int, Lines] = {}
    for part in live_parts(store, info):
        lines = read_receipt(store, part)
        if lines is None:
            raise DataError(f"{store}: part {part} has not been converted; let the ingest end, then remove the subject")
        receipts[part] = lines
    named = {hidden(source.subject, key) for source in work.plan.sources} | set(info.withdrawn)
    known = sorted(hashes & named)
    if not known:
        raise DataError(
            f"remove={config.remove}: {store} holds no such subject; give its name as the sources have it, or the "
            "hidden name that the manifest shows"
        )
    subject = known[0]
    gone = [source for source in work.plan.sources if hidden(source.subject, key) == subject]
    gone_keys = {source.receipt_key(key) for source in gone}
    gone_ids = {
        line["id"]
        for lines in receipts.values()
        for line in lines
        if line["source"] in gone_keys and line["outcome"] in ("stored", "overlay")
    }
    affected = [part for part, lines in receipts.items() if any(line["source"] in gone_keys for line in lines)]
    info = _remember(store, info, subject, affected)
    for part in affected:
        kept = [line for line in receipts[part] if line["source"] not in gone_keys]
        _rewrite(store, info, part, kept)
    plan = Plan(tuple(_without(one, subject, key) for one in work.plan.rounds))
    write_plan(store, plan)
    summary = merge.merge(store, plan, dataclasses.replace(config, max_quarantined=None), key)
    if summary["stored"] == 0:
        layout.manifest_path(store).unlink(missing_ok=True)  # nobody is left
        remove_other_chunk_maps(store, kept={})
    _forget_old_parts(store, info)
    _prove(store, subject, gone_ids)
    console.say(f"{store}: subject {subject} is gone, with {len(gone_ids)} volume(s) out of {len(affected)} part(s)")
    return {**summary, "removed_volumes": len(gone_ids)}


def _without(one: Round, subject: str, key: bytes) -> Round:
    kept = tuple(source for source in one.sources if hidden(source.subject, key) != subject)
    return dataclasses.replace(one, sources=kept)


def _remember(store: Path, info: layout.StoreInfo, subject: str, affected: Sequence[int]) -> layout.StoreInfo:
    """Write into `store.json` who must not come back, and which parts are about to be written again."""
    successors = dict(info.rewritten_parts)
    next_part = info.num_parts
    for part in affected:
        if part not in successors:
            successors[part] = next_part
            next_part += 1
    info = dataclasses.replace(
        info,
        num_parts=next_part,
        withdrawn=tuple(sorted({*info.withdrawn, subject})),
        rewritten_parts=successors,
    )
    with durable.explained(DataError, store, _WAY_OUT):
        layout.write_info(store, info)
    return info


def _forget_old_parts(store: Path, info: layout.StoreInfo) -> None:
    """Remove the files of all parts that have a successor, once the manifest points to the successors."""
    removed = tuple(sorted({*info.removed_parts, *info.rewritten_parts}))
    with durable.explained(DataError, store, _WAY_OUT):
        layout.write_info(store, dataclasses.replace(info, rewritten_parts={}, removed_parts=removed))
        for part in removed:
            layout.receipt_path(store, part).unlink(missing_ok=True)
            layout.pack_path(store, part).unlink(missing_ok=True)
            for name in info.overlays:
                layout.overlay_path(store, name, part).unlink(missing_ok=True)


def _rewrite(store: Path, info: layout.StoreInfo, part: int, kept: Lines) -> None:
    """Copy what stays of a part into its successor."""
    new = info.rewritten_parts[part]
    lines = [dict(line) for line in kept]
    stored = [line for line in lines if line["outcome"] == "stored"]
    moved = _copy(info, layout.pack_path(store, part), layout.pack_path(store, new), [line["id"] for line in stored])
    for line in stored:
        row = dataclasses.replace(row_of_receipt(line["row"]), part=new, **moved[line["id"]])
        line["row"] = row_tree(row)
    for name in info.overlays:
        inside = [line for line in stored if name in line["row"]["overlays"]]
        alone = [line for line in lines if line["outcome"] == "overlay" and name in line["overlays"]]
        paths = (layout.overlay_path(store, name, part), layout.overlay_path(store, name, new))
        moved = _copy(info, *paths, [line["id"] for line in (*inside, *alone)])
        for line in inside:
            line["row"]["overlays"][name] |= {"part": new, **moved[line["id"]]}
        for line in alone:
            line["overlays"][name] |= {"part": new, **moved[line["id"]]}
    write_receipt(store, new, lines)


def _copy(info: layout.StoreInfo, old: Path, new: Path, volume_ids: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """Copy volumes from pack to pack; returns where each lies now."""
    places: dict[str, dict[str, Any]] = {}
    if not volume_ids:
        return places
    with (
        durable.explained(DataError, old, "see what is damaged with `mimscale inspect STORE --verify`"),
        zipfile.ZipFile(old) as source,
        PackWriter(new, chunk_voxels=info.chunk_voxels, codec=info.codec) as target,
    ):
        for volume_id in volume_ids:
            place = target.copy(source, volume_id)
            places[volume_id] = {"offset_bytes": place.offset_bytes, "length_bytes": place.length_bytes}
    return places


def _prove(store: Path, subject: str, gone_ids: set[str]) -> None:
    """Look at every byte of the store again.

    Raises:
        DataError: something of the subject is still there, or the store is damaged.
    """
    if layout.manifest_path(store).exists():
        left = load_manifest(store).column("subject").tolist().count(subject)
        damaged = verify(store)
        if left or damaged:
            raise DataError(
                f"{store}: {left} volume(s) of subject {subject} are left and {len(damaged)} place(s) are damaged; "
                "see `mimscale inspect STORE --verify`, restore what is damaged, and run the same command again"
            )
    for pack in sorted((*store.glob("packs/*.zip"), *store.glob("overlays/*/*.zip"))):
        with zipfile.ZipFile(pack) as archive:
            inside = {name.partition("/")[0] for name in archive.namelist()} & gone_ids
        if inside:
            raise DataError(
                f"{pack}: still holds the image of {', '.join(sorted(inside))}, because another subject has the very "
                "same one; remove that subject too if it is the same person"
            )
