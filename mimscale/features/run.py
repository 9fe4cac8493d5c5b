"""`mimscale extract`: the encoder of a run on every volume of a store -> features, whatever the number of tasks.

mimscale extract run_dir=DIR store=STORE out=DIR                  all of it
mimscale extract run_dir=DIR store=STORE out=DIR task=3/64        a share of the parts
mimscale extract run_dir=DIR store=STORE out=DIR merge=true       the result, once all tasks have ended
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mimscale import durable
from mimscale.config import config_yaml, load_verb_config, verb_parser
from mimscale.console import print_json, say, track
from mimscale.errors import ConfigError, DataError
from mimscale.features.config import ExtractConfig
from mimscale.features.layout import VERSION, FeatureFolder
from mimscale.features.parts import failed_text, failures, merge, read_receipt
from mimscale.features.plan import first_plan, ids_hash, read_plan, refuse_other, settings_of
from mimscale.ingest.config import task_share
from mimscale.lock import refuse_if_held, sole_writer
from mimscale.world import World

if TYPE_CHECKING:
    import torch

    from mimscale.features.extract import Extraction

LOCK_NAME = "extract.lock"
# Of `plan.json` what a program that calls the verb wants to know.
SAID = ("run", "checkpoint", "step", "weights", "encoder_sha256", "store", "dim", "num_volumes", "num_parts")


def main(argv: list[str]) -> int:
    """The verb `extract`."""
    parser = verb_parser(
        "extract", "Features of all volumes of a store. The same command continues an extraction that was stopped."
    )
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    arguments = parser.parse_intermixed_args(argv)
    config = load_verb_config(ExtractConfig, arguments.words, needs_recipe=False)
    if arguments.check:
        sys.stdout.write(config_yaml(config))
        return 0
    summary = extract(config)
    if arguments.json:
        print_json(summary)
    return 0


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Do what the config asks for: all of an extraction, the share of a task, or the merge.

    Returns:
        {"volumes", "failed", "seconds", ...}: of a task, of its own parts.

    Raises:
        ConfigError: a store or settings that do not fit the weights, or those that `out` was begun with.
        CheckpointError: no usable checkpoint.
        DataError: volumes that cannot be read, more than `max_failed`; parts that are missing; a full disk.
        LaunchError: somebody else is at work on the same parts.
    """
    started_s = time.monotonic()
    folder, task = FeatureFolder(config.out), _task(config)
    if config.merge and not folder.plan.exists():
        raise DataError(f"{folder.plan}: no such file, so there is nothing to merge; let the tasks run first")
    with _writing(folder, task):
        plan, receipts = _planned(config, folder) if config.merge else _compute(config, folder, task)
        failed = failures(receipts)
        if task is None:
            done = merge(folder, plan, config.max_failed)
            failed = done["failed"]
            rows = done["files"]["features.parquet"]["rows"]
            say(f"features: {config.out} ({rows} volumes, {plan['dim']} numbers each)")
    volumes = sum(receipt["volumes"] for receipt in receipts) if task else plan["num_volumes"]
    if failed:
        say(f"{len(failed)} of {volumes} volumes have no features:\n{failed_text(failed)}")
    if task is not None and len(failed) > config.max_failed:
        raise DataError(
            f"{config.out}, task {task}: {len(failed)} volumes cannot be read, max_failed={config.max_failed} "
            f"(first {failed[0]['id']}: {failed[0]['reason']}); all others of this task are done"
        )
    if task is not None:
        say(f"{config.out}: task {task} has ended; when all have, the same command with merge=true in place of task=")
    return {
        **{key: plan[key] for key in SAID},
        "out": str(config.out),
        "task": task,
        "volumes": volumes - len(failed),
        "failed": failed,
        "seconds": round(time.monotonic() - started_s, 2),
    }


def _task(config: ExtractConfig) -> str | None:
    """The share that was asked for, or that follows from the place among the ranks of a launcher."""
    world = World.from_environment(os.environ)
    if config.task is not None or world.size == 1:
        return config.task
    if config.merge:
        raise ConfigError(f"merge=true: is for one process, and this is one of {world.size} ranks")
    return f"{world.rank}/{world.size}"


def _planned(config: ExtractConfig, folder: FeatureFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plan, for a merge: it looks at the receipts itself."""
    plan = read_plan(folder)
    assert plan is not None, "the caller has seen it, and nobody removes it"
    refuse_other(config.out, plan, {"settings": settings_of(config)})
    return plan, []


@contextmanager
def _writing(folder: FeatureFolder, task: str | None) -> Iterator[None]:
    """Nobody else is at work on what this process writes; a lock that a killed process left is taken over."""
    owner = os.environ.get("MIMSCALE_LOCK_OWNER")  # a job and its restart share it
    with durable.explained(DataError, folder.path, "choose another out"):
        folder.path.mkdir(parents=True, exist_ok=True)
    if task is not None:
        index, count = task_share(task)
        refuse_if_held(folder.path / LOCK_NAME)
        with sole_writer(folder.path / f"task-{index:05d}-of-{count:05d}.lock", f"extract task {task}", owner):
            yield
        return
    with sole_writer(folder.path / LOCK_NAME, "another extract", owner):
        for lock in sorted(folder.path.glob("task-*.lock")):
            refuse_if_held(lock)
        for path in folder.path.rglob(f"{durable.TEMPORARY_PREFIX}*"):  # of whoever was killed
            if ".lock" not in path.name:  # somebody may be asking for one
                path.unlink(missing_ok=True)
        yield


def _compute(
    config: ExtractConfig, folder: FeatureFolder, task: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Do the parts that are not finished; returns the plan, and the receipts of all parts of this task."""
    from mimscale.evaluate.weights import cpu_threads
    from mimscale.features.extract import extract_part, remove_leftovers

    with cpu_threads(config.threads):
        begun = read_plan(folder)
        extraction, indices, plan = _prepare(config, begun)
        if begun is None:
            begun = first_plan(folder, plan)
            if begun["checkpoint"] != plan["checkpoint"]:  # another task was faster, and the run saved in between
                extraction, indices, plan = _prepare(config, begun)
        refuse_other(config.out, begun, plan)
        plan = begun
        index, count = (0, 1) if task is None else task_share(task)
        parts = [part for part in range(plan["num_parts"]) if part % count == index]
        receipts = {part: read_receipt(folder, part) for part in parts}
        # What failed is tried again: the store may have been repaired since.
        todo = [part for part, receipt in receipts.items() if receipt is None or receipt["failed"]]
        if len(todo) < len(parts):
            say(f"{config.out}: {len(parts) - len(todo)} of {len(parts)} parts are finished already")
        remove_leftovers(folder, todo)
        shares = {part: indices[part * config.part_volumes : (part + 1) * config.part_volumes] for part in todo}
        done = (extract_part(extraction, folder, part, share, plan) for part, share in shares.items())
        work = (volume for volumes in done for volume in volumes)
        for _ in track(work, "extract, volumes", sum(map(len, shares.values()))):
            pass
    finished = [receipts[part] if part not in shares else read_receipt(folder, part) for part in parts]
    assert all(receipt is not None for receipt in finished), "extract_part wrote them"
    return plan, [receipt for receipt in finished if receipt is not None]


def _own_device(device: "torch.device") -> "torch.device":
    """Of several GPUs the one of this rank."""
    import torch

    if device.type != "cuda":
        return device
    return torch.device("cuda", World.from_environment(os.environ).local_rank % torch.cuda.device_count())


def _prepare(config: ExtractConfig, begun: dict[str, Any] | None) -> tuple["Extraction", Sequence[int], dict[str, Any]]:
    """The encoder, the rows of the volumes, and the plan that follows from them.

    A plan that another task has begun decides about the checkpoint: the newest one may be another by now.
    """
    import numpy as np

    from mimscale.evaluate.checkpoints import find_checkpoint
    from mimscale.evaluate.weights import check_contract, choose_device
    from mimscale.evaluate.windowed import Source, one_channel_count, refuse_other_spacing
    from mimscale.features.encoder import frozen_encoder
    from mimscale.features.extract import Extraction
    from mimscale.store import files, layout
    from mimscale.store.manifest import load_manifest
    from mimscale.stream.select import parse_filter
    from mimscale.train.config import load_run_config
    from mimscale.train.run_dir import RunDir

    run_config = load_run_config(config.run_dir)
    store = config.store or run_config.store
    info, manifest = layout.read_info(store), load_manifest(store)
    selected = np.ones(len(manifest), dtype=bool)
    if config.split is not None:
        selected &= manifest.equal(split=config.split)
    if config.filter is not None:
        selected &= parse_filter(config.filter, "filter").select(manifest)
    indices = np.flatnonzero(selected)
    if not len(indices):
        raise DataError(
            f"{store}: no volume with split={config.split} and filter={config.filter}; see `mimscale inspect {store}`"
        )
    checkpoint = config.checkpoint if begun is None or config.checkpoint != "newest" else begun["checkpoint"]
    tag = find_checkpoint(RunDir(config.run_dir), checkpoint)
    device = _own_device(choose_device(config.device))
    channels = one_channel_count(manifest, indices, store)
    encoder = frozen_encoder(run_config, tag, channels, device, weights=config.weights, seed=config.seed)
    check_contract(encoder.contract, info, store, None)
    target_mm = config.target_spacing_mm or run_config.stream.target_spacing_mm
    trained_mm = encoder.contract.get("spacing_mm")
    if target_mm is None:
        max_ratio = config.max_spacing_ratio or run_config.stream.max_spacing_ratio
        refuse_other_spacing(manifest, indices, store, trained_mm, max_ratio)
    ids = manifest.column("id")[indices].tolist()
    plan = {
        "version": VERSION,
        "run": str(config.run_dir),
        "kind": run_config.kind,
        "checkpoint": tag.name,
        "step": encoder.contract["step"],
        "weights": encoder.name,
        "encoder_sha256": encoder.sha256(),
        "store": str(store),
        "store_sha256": hashlib.sha256(files.read_bytes(layout.manifest_path(store))).hexdigest(),
        "trained_spacing_mm": None if trained_mm is None else list(trained_mm),
        "target_spacing_mm": None if target_mm is None else list(target_mm),
        "intensity": encoder.contract["intensity"],
        "channels": channels,
        "crop_voxels": list(run_config.crop_voxels),
        "patch_voxels": list(run_config.patch_voxels),
        "axis_order": "CZYX, RAS+",
        "dim": encoder.dim,
        "settings": settings_of(config),
        "num_volumes": len(ids),
        "num_parts": -(-len(ids) // config.part_volumes),
        "ids_sha256": ids_hash(ids),
    }
    source = Source(
        store=store,
        manifest=manifest,
        intensity=info.intensity,
        crop_voxels=run_config.crop_voxels,
        target_mm=target_mm,
        region=config.region,
    )
    say(f"{encoder.name} encoder of {config.run_dir}, {tag.name}, {len(ids)} volumes of {store} on {device}")
    return Extraction(source=source, encoder=encoder, config=config), indices.tolist(), plan
