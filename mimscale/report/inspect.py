"""`mimscale inspect STORE_OR_RUN_DIR [VOLUME] [--verify] [--png [FILE]]`: what is in it, and whether it is whole."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.config import split_arguments, verb_parser
from mimscale.console import print_json, print_table, say
from mimscale.errors import ConfigError, DataError
from mimscale.report.store_summary import describe_store, list_volumes
from mimscale.store import files, layout, native
from mimscale.store.layout import read_info
from mimscale.store.manifest import load_manifest
from mimscale.store.rows import row_tree

MIB = 2**20
LISTED_VOLUMES = 20
RETENTION_KEYS = ("every_steps", "keep", "keep_every_steps", "keep_best")
WORKERS = min(8, len(os.sched_getaffinity(0)))  # reading a store is bound by its file system before that


def main(argv: list[str]) -> int:
    """The verb `inspect`."""
    parser = verb_parser("inspect", "What a store, one of its volumes, or a run directory holds.")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--verify", action="store_true", help="check every byte; exit 3 when something is damaged")
    parser.add_argument("--workers", type=_positive, default=WORKERS, help="processes that verify, default %(default)s")
    parser.add_argument(
        "--png",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw VOLUME, or the middle slices of many volumes; default VOLUME.png or STORE.png",
    )
    parser.add_argument("--volumes", type=_positive, default=24, help="how many to draw, default %(default)s")
    arguments = parser.parse_args(argv)
    words, overrides = split_arguments(arguments.words)
    if overrides or len(words) not in (1, 2):
        raise ConfigError(f"expected STORE_OR_RUN_DIR [VOLUME], got {arguments.words}")
    folder = Path(words[0])
    if len(words) == 2:
        return _show_volume(folder, words[1], arguments.png, as_json=arguments.json)
    if files.exists(layout.info_path(folder)):
        if arguments.verify:
            return _verify_store(folder, arguments.workers, as_json=arguments.json)
        return _show_store(folder, arguments.png, arguments.volumes, as_json=arguments.json)
    if arguments.png is not None:
        raise ConfigError(f"{folder}: --png draws a store or one of its volumes: mimscale inspect STORE [VOLUME] --png")
    if (folder / "config.yaml").exists():
        return _show_run(folder, as_json=arguments.json, verify=arguments.verify)
    raise DataError(f"{folder}: neither a store (no store.json) nor a run directory (no config.yaml)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def describe_run(folder: Path, *, hashes: bool = False) -> dict[str, Any]:
    """Outcome, step and checkpoints of a run.

    Args:
        folder: the run directory.
        hashes: read every byte of every checkpoint; without it only sizes are compared.

    Raises:
        ConfigError: no run directory.
    """
    from mimscale.train.run_dir import RunDir

    run = RunDir(folder)
    tree = run.read_config_tree()
    outcome, metrics = run.read_outcome(), run.read_metrics()
    return {
        "kind": tree.get("kind"),
        "store": tree.get("store"),
        "steps": tree.get("steps"),
        "last_logged_step": max((line["step"] for line in metrics), default=0),
        "outcome": dataclasses.asdict(outcome) if outcome else None,
        "living_ranks": {str(rank): pid for rank, pid in run.living_ranks().items()},
        "checked": "sha256 of every byte" if hashes else "sizes",
        "checkpoints": describe_checkpoints(folder, tree.get("checkpoint") or {}, hashes=hashes),
    }


def describe_checkpoints(folder: Path, config_tree: dict[str, Any], *, hashes: bool) -> list[dict[str, Any]]:
    """Every checkpoint of a run, newest first: step, size, age, why it is kept, whether it is whole or why not.

    Args:
        folder: the run directory.
        config_tree: `checkpoint.*` of its config.
        hashes: read every byte; without it only sizes are compared, and `verified` stays None for a whole one.
    """
    from mimscale.config import build_config
    from mimscale.train.committed import checkpoints_kept, read_manifest, step_of, tags, why_not_loadable
    from mimscale.train.config import CheckpointConfig
    from mimscale.train.run_dir import RunDir

    run = RunDir(folder)
    found = {tag: why_not_loadable(tag, hashes=hashes) for tag in tags(run)}
    newest_good = next((tag for tag, reason in found.items() if reason is None), None)
    retention = {key: config_tree[key] for key in RETENTION_KEYS if key in config_tree}
    config = build_config(CheckpointConfig, retention, f"{run.config}: checkpoint")
    kept = {} if newest_good is None else checkpoints_kept(run, config, newest_good)
    checkpoints = []
    for tag, reason in found.items():
        whole = reason is None
        if not tag.exists():
            continue  # a run that is alive has deleted it meanwhile
        saved_unix_s = read_manifest(tag).get("saved_unix_s") if whole else None
        if not isinstance(saved_unix_s, int | float):
            saved_unix_s = tag.lstat().st_mtime
        checkpoints.append(
            {
                "name": tag.name,
                "step": step_of(tag),
                "bytes": sum(path.lstat().st_size for path in tag.rglob("*") if path.is_file()),
                "saved_unix_s": saved_unix_s,
                "kept_as": kept.get(step_of(tag), []) if whole else [],
                "usable": whole,
                "verified": whole and hashes,
                "reason": reason,
            }
        )
    return checkpoints


def _show_store(store: Path, png: str | None, num_drawn: int, *, as_json: bool) -> int:
    tree = {**describe_store(store), "chunks_decoded_by": native.description}
    if png is not None:
        from mimscale.report.store_pictures import draw_contact_sheet

        path = Path(png or f"{store.resolve().name}.png")
        drawn = draw_contact_sheet(store, num_drawn, path)
        tree["png"] = str(path)
        say(f"middle slices of {drawn} volumes, which may show faces: {path}")
    if as_json:
        print_json(tree)
        return 0
    rows = [[key.replace("_", " "), _cell(key, value)] for key, value in tree.items() if value not in ({}, None)]
    print_table(f"store {store}", ["", ""], rows)
    listed, volumes = list_volumes(store, LISTED_VOLUMES)
    title = f"volumes (first {len(listed)} of {volumes})"
    print_table(title, ["volume", "split", "Z x Y x X", "mm", "dtype"], listed)
    return 0


def _verify_store(store: Path, workers: int, *, as_json: bool) -> int:
    from mimscale.ingest.pool import process_pool
    from mimscale.store.verify import verify

    info = read_info(store)
    with process_pool(workers, info.num_parts * (1 + len(info.overlays))) as pool:
        bad = [dataclasses.asdict(item) for item in verify(store, pool)]
    return _report_bad(store, bad, as_json=as_json)


def _report_bad(folder: Path, bad: list[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print_json({"ok": not bad, "bad": bad})
    for item in bad:
        say(f"damaged: volume {item['volume'] or '-'}, {item['path']}: {item['reason']}")
    say(f"{folder}: {'every byte is as it was written' if not bad else f'{len(bad)} damaged'}")
    return DataError.exit_code if bad else 0


def _show_volume(store: Path, volume_id: str, png: str | None, *, as_json: bool) -> int:
    manifest = load_manifest(store)
    row = manifest.row(manifest.index_of(volume_id))
    tree = row_tree(row)
    if png is not None:
        from mimscale.report.store_pictures import draw_volume

        path = Path(png or f"{volume_id}.png")
        with durable.explained(DataError, path, "free space, or give another FILE"):
            draw_volume(store, manifest, row, path)
        tree["png"] = str(path)
        say(f"picture: {path}")
    if as_json:
        print_json(tree)
    else:
        print_table(f"volume {volume_id}", ["", ""], [[key, str(value)] for key, value in tree.items()])
    return 0


def _show_run(folder: Path, *, as_json: bool, verify: bool) -> int:
    tree = describe_run(folder, hashes=verify)
    bad = [tag for tag in tree["checkpoints"] if not tag["usable"]]
    if verify and as_json:
        listed = [
            {"volume": "", "path": str(folder / "checkpoints" / tag["name"]), "reason": tag["reason"]} for tag in bad
        ]
        print_json({"ok": not bad, "bad": listed, **tree})
    elif as_json:
        print_json(tree)
    else:
        _print_run(folder, tree)
    if not verify:
        return 0
    for tag in bad:
        say(f"damaged: {folder / 'checkpoints' / tag['name']}: {tag['reason']}")
    say(f"{folder}: {f'{len(bad)} damaged' if bad else 'every byte of every checkpoint is as it was saved'}")
    return DataError.exit_code if bad else 0


def _print_run(folder: Path, tree: dict[str, Any]) -> None:
    outcome = tree["outcome"]
    state = f"{outcome['outcome']} at step {outcome['step']}. {outcome['message']}" if outcome else "no job has ended"
    rows = [["kind", str(tree["kind"])], ["store", str(tree["store"])], ["outcome", state]]
    rows.append(["last logged step", f"{tree['last_logged_step']} of {tree['steps']}"])
    if tree["living_ranks"]:
        rows.append(
            ["alive on this host", ", ".join(f"rank {r}: pid {pid}" for r, pid in tree["living_ranks"].items())]
        )
    print_table(f"run {folder}", ["", ""], rows)
    now_s = time.time()
    checkpoints = [
        [
            str(tag["step"]),
            f"{tag['bytes'] / MIB:.1f} MiB",
            age_text(now_s - tag["saved_unix_s"]),
            ", ".join(tag["kept_as"]) or "goes with the next save",
            ("verified" if tag["verified"] else "sizes are right") if tag["usable"] else f"NOT USABLE: {tag['reason']}",
        ]
        for tag in tree["checkpoints"]
    ]
    print_table("checkpoints, newest first", ["step", "size", "age", "kept as", "state"], checkpoints)
    if checkpoints and tree["checked"] == "sizes":
        say("only sizes were compared; --verify reads and hashes every byte")


def age_text(seconds: float) -> str:
    """An age in the largest unit that it fills twice: 90 s, 5 min, 47 h, 3 d. A clock that went back gives 0 s."""
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _cell(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / MIB:.1f} MiB"
    if isinstance(value, dict):
        return ", ".join(
            f"{name}: {', '.join(item) if isinstance(item, list) else item}" for name, item in value.items()
        )
    return str(value)
