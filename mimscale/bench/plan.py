"""`mimscale plan RECIPE --nodes N --gpu NAME`: what a run needs and how fast it goes, before any job; without torch."""

import argparse
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mimscale import console
from mimscale.bench import measure
from mimscale.bench.contender import Job, Runner
from mimscale.bench.estimate import Assumptions, Cluster, Reading, estimate, uses_bf16
from mimscale.bench.gpus import GPUS, find_gpu
from mimscale.bench.network import ScalingFit, fit_scaling, traffic, weak_steps
from mimscale.bench.verbs import bench_config
from mimscale.config import build_config, load_config, parse_yaml, recipe_text, split_arguments, verb_parser
from mimscale.errors import ConfigError, DataError
from mimscale.store.manifest import Manifest, load_manifest
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig
from mimscale.train.size import count_parameters

_VOLUMES_READ = 4
_READ_S = 0.5
# What a loader's worker gives of the reader alone: 0.64 to 1.05 in benchmarks/results/stream_epyc_2core_202611.json.
WORKER_OF_READER = 0.6
_NOWHERE = "none"  # store or run_dir that nobody needs for arithmetic


def main(argv: list[str]) -> int:
    """`mimscale plan RECIPE --nodes N --gpu NAME [store=STORE] [key=value ...] [--json]`."""
    arguments = _parser().parse_intermixed_args(argv)
    config = _config(arguments.words)
    gpu = find_gpu(arguments.gpu)
    gpus_per_node = arguments.gpus_per_node or gpu.gpus_per_node
    if arguments.nodes < 1 or gpus_per_node < 1:
        raise ConfigError(f"--nodes {arguments.nodes} --gpus-per-node {gpus_per_node}: both must be at least 1")
    cluster = Cluster(gpu_name=arguments.gpu, gpu=gpu, nodes=arguments.nodes, gpus_per_node=gpus_per_node)
    given = {
        field.name: getattr(arguments, field.name) for field in fields(Assumptions) if hasattr(arguments, field.name)
    }
    wrong = {name: value for name, value in given.items() if not value > 0}
    if wrong or given["of_peak"] > 1:
        raise ConfigError(f"{wrong or {'of_peak': given['of_peak']}}: must be above 0, and a share at most 1")
    channels, reading = 1, None
    if str(config.store) != _NOWHERE:
        manifest = load_manifest(config.store)
        channels = _channels(manifest, config.store)
        if arguments.stream_result is None:
            reading = read_quickly(config, manifest)
    if arguments.stream_result is not None:
        reading = recorded_reading(arguments.stream_result, config)
    fit = None if arguments.scaling is None else _fit(arguments.scaling, config)
    result = estimate(config, cluster, Assumptions(**given), channels=channels, reading=reading, fit=fit)
    if arguments.json:
        console.print_json(result)
    else:
        print(as_text(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser("plan", "What a run needs and how fast it goes, before any job.")
    usual = Assumptions()
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="of the cluster")
    add("--gpu", required=True, help=", ".join(GPUS))
    add("--gpus-per-node", type=int, help="default: as such nodes usually have")
    add("--stream-result", type=Path, help="JSON of `mimscale bench stream`, instead of a quick read of store=")
    add("--scaling", type=Path, help="JSON of `mimscale bench scaling`: its network, instead of the GPU's data sheet")
    add("--of-peak", type=float, default=usual.of_peak, help="share of the GPU's peak that products reach")
    add("--write-mb-per-s", type=float, default=usual.write_mb_per_s, help="of a node, to the file system of run_dir")
    add("--signal-lead-s", type=float, default=usual.signal_lead_s, help="between the signal and the end of a job")
    add("--node-mtbf-days", type=float, default=usual.node_mtbf_days, help="of one node between failures")
    add("--json", action="store_true", help="the estimate as JSON on stdout")
    return parser


def _config(words: list[str]) -> RunConfig:
    """The recipe, of fine-tuning where it has a `unetr` or a `head`; store and run_dir may be missing."""
    positional, overrides = split_arguments(words)
    if len(positional) != 1:
        raise ConfigError(f"expected one RECIPE and key=value overrides, got {positional}; see `mimscale recipes`")
    tree = parse_yaml(recipe_text(positional[0]), positional[0])
    finetunes = {"unetr", "head"} & tree.keys() or any(re.match(r"(unetr|head)[.=]", word) for word in overrides)
    for key in ("store", "run_dir"):
        if key not in tree and not any(word.startswith(f"{key}=") for word in overrides):
            overrides.append(f"{key}={_NOWHERE}")
    kind: type[RunConfig] = FinetuneConfig if finetunes else PretrainConfig
    return load_config(kind, positional[0], overrides)


def _channels(manifest: Manifest, store: Path) -> int:
    channels = np.unique(manifest.column("shape")[:, 0])
    if len(channels) != 1:
        raise DataError(f"{store}: volumes of {channels.tolist()} channels; a run reads volumes of one number")
    return int(channels[0])


def read_quickly(config: RunConfig, manifest: Manifest) -> Reading:
    """What a loader's worker on this machine would give, from about half a second of reading, page cache as it is.

    Raises:
        DataError: no training volume has room for a crop.
    """
    train = manifest.select(split="train", **({} if config.modality is None else {"modality": config.modality}))
    fits = train[(manifest.column("shape")[train, 1:] >= config.crop_voxels).all(axis=1)]
    if not len(fits):
        raise DataError(f"{config.store}: no training volume has room for crop_voxels={list(config.crop_voxels)}")
    rows = fits[np.linspace(0, len(fits) - 1, min(_VOLUMES_READ, len(fits))).astype(int)]
    core = max(os.sched_getaffinity(0))
    job = Job(
        contender="mimscale.bench.readers:OwnReader",
        mode="region_4"
        if config.stream.region_voxels
        else "aligned_16"
        if config.stream.align_voxels > 1
        else "random",
        store=str(config.store),
        rows=tuple(rows.tolist()),
        crop_voxels=config.crop_voxels,
        core=core,
    )
    with Runner(job) as runner:
        runner.round(1)
        first = runner.round(2)
        timed = runner.round(max(1, round(2 * _READ_S / first.seconds)))
    return Reading(
        crops_per_s=WORKER_OF_READER * timed.crops / timed.cpu_s,
        file_bytes_per_crop=timed.file_bytes / timed.crops,
        source=f"measured now: {timed.crops} crops ({job.mode}) on one core here by processor time, times "
        f"{WORKER_OF_READER} for what a loader's worker gives of its reader alone",
    )


def recorded_reading(path: Path, config: RunConfig) -> Reading:
    """One worker of the whole loader, from the JSON of an earlier `mimscale bench stream`.

    Raises:
        ConfigError: no such result, or one of other crops.
    """
    result = _read_json(path, "stream")
    if "contenders" not in result:
        raise ConfigError(f"{path}: of benchmarks/, not of one store; expected the JSON of `mimscale bench stream`")
    crop = tuple(result["config"]["crop_voxels"])
    if crop != config.crop_voxels:
        raise ConfigError(
            f"{path}: measured with crop_voxels={list(crop)}, the run has {list(config.crop_voxels)}; measure again"
        )
    row = next(row for row in result["loader"] if row["workers"] == 1)
    own = next(row for row in result["contenders"] if row["name"] == "mimscale")
    return Reading(
        crops_per_s=row["crops_per_s"],
        file_bytes_per_crop=own["file_bytes"],
        source=f"recorded in {path}: the loader with one worker on {result['surroundings']['cpu']}",
    )


def _fit(path: Path, config: RunConfig) -> ScalingFit:
    result = _read_json(path, "scaling")
    steps, nodes = weak_steps(result, path)
    measured, tree = config, result.get("config")
    if tree is not None:  # the recipe that was measured may have other gradients than this one
        measured = (
            bench_config(tree["words"], needs_store=False)  # as benchmarks/ has told it
            if "words" in tree
            else build_config(PretrainConfig, tree, str(path))
        )
    ranks = min(step.ranks for step in steps)
    micro_batches = max(1, measured.global_batch // (measured.micro_batch * ranks))
    sent = traffic(measured, count_parameters(measured), micro_batches, bf16=uses_bf16(measured))
    return fit_scaling(steps, sent.behind_backward + sent.alone, nodes)


def _read_json(path: Path, benchmark: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); expected the JSON of `mimscale bench {benchmark}`"
        ) from None
    if not isinstance(tree, dict) or tree.get("benchmark") != benchmark:
        raise ConfigError(f"{path}: expected the JSON of `mimscale bench {benchmark}`")
    if (version := tree.get("schema_version")) != measure.SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: schema_version {version}, and this mimscale reads {measure.SCHEMA_VERSION}; run "
            f"`mimscale bench {benchmark}` again"
        )
    return tree


def as_text(result: dict[str, Any]) -> str:
    """The estimate for a person."""
    gpu, step, loader, checkpoint = (result[key] for key in ("gpu", "step", "loader", "checkpoint"))
    flops, whole = result["flops_per_sample"], result["whole_run"]
    parts = ", ".join(f"{part} {one['training'] / 1e9:.1f}" for part, one in flops.items() if part != "total")
    wait = {
        "compute": "the products of the model",
        "loader": f"the loader: {loader['workers']} worker(s) a GPU",
        "network": "the exchange of gradients and weights",
    }[step["limit"]]
    lines = [
        f"{result['nodes']} node(s) x {result['gpus'] // result['nodes']} {gpu['name']}: {result['gpus']} GPUs x "
        f"micro_batch {result['micro_batch']} x accumulation {result['accumulation']} = global batch "
        f"{result['global_batch']}, ZeRO-{result['zero_stage']}, {result['precision']}",
        f"parameters      {result['parameters'] / 1e6:.1f} M",
        f"FLOPs a sample  {flops['total']['training'] / 1e9:.1f} GFLOP, forward and backward ({parts})",
        "",
        _memory_table(result),
        f"loader          {loader['crops_per_s_per_gpu']:.0f} crops/s a GPU wanted = "
        f"{loader['gb_per_s_per_gpu']:.2f} GB/s of voxels, {loader['gb_per_s_per_node']:.2f} GB/s a node",
        *_reading_lines(loader),
        f"step            {step['seconds']:.3f} s: compute {step['compute_s']:.3f}, network {step['network_s']:.3f}"
        + ("" if step["loader_s"] is None else f", loader {step['loader_s']:.3f} (beside them)"),
        f"speed           {step['steps_per_s']:.2f} steps/s, {step['samples_per_s']:.0f} samples/s, MFU "
        f"{100 * step['mfu']:.1f} %; limited by {step['limit']}: {wait}",
        f"whole run       {whole['steps']} steps: {whole['days']:.2f} days, {whole['gpu_hours']:.0f} GPU-hours",
        f"checkpoint      {checkpoint['bytes'] / 1e9:.2f} GB, saved in {checkpoint['save_s']:.1f} s; a stop is "
        f"announced {checkpoint['signal_lead_s']:.0f} s ahead"
        + ("" if checkpoint["saved_in_time"] else ": TOO LATE, raise the signal lead or write faster"),
        f"interval        best every {checkpoint['best_interval_s'] / 60:.1f} min = {checkpoint['best_every_steps']} "
        f"steps (Young/Daly: sqrt(2 x save x mean time between failures of {checkpoint['mtbf_h']:.0f} h)); "
        f"the recipe's {checkpoint['every_steps']} steps cost {checkpoint['overhead_percent']:.2f} %",
        "",
        _scaling_table(result),
        *_assumption_lines(result),
    ]
    return "\n".join(lines)


def _memory_table(result: dict[str, Any]) -> str:
    gigabytes = (
        "weights",
        "gradients",
        "optimizer",
        "communication",
        "activations",
        "activations_checkpointed",
        "peak",
    )
    cells = [
        [
            f"{row['zero_stage']} {row['precision']}" + (" *" if row["zero_stage"] == result["zero_stage"] else ""),
            *(f"{row[name] / 1e9:.2f}" for name in gigabytes),
            "yes" if row["fits"] else f"no, {(row['peak'] - result['memory']['usable_bytes']) / 1e9:.1f} over",
            row["largest_micro_batch"],
        ]
        for row in result["memory"]["stages"]
    ]
    columns = ["ZeRO", "weights", "gradients", "optimizer", "buckets", "activations", "checkpointed", "peak"]
    fits = f"fits {result['memory']['usable_bytes'] / 1e9:.1f} GB"
    return "GB a GPU; * is the recipe's stage\n" + measure.table([*columns, fits, "largest micro_batch"], cells)


def _reading_lines(loader: dict[str, Any]) -> list[str]:
    if loader["source"] is None:
        return ["                what the store gives is not known: say store=STORE or --stream-result FILE"]
    return [
        f"                a core gives {loader['crops_per_s_per_core']:.0f} crops/s = "
        f"{loader['gb_per_s_per_core']:.2f} GB/s, so {loader['cores_per_gpu']} core(s) a GPU; the file system gives "
        f"{loader['storage_gb_per_s_per_node']:.2f} GB/s a node",
        f"                {loader['source']}",
    ]


def _scaling_table(result: dict[str, Any]) -> str:
    cells = [
        [row["nodes"], f"{row['steps_per_s']:.2f}", f"{100 * row['efficiency']:.0f} %", row["limit"]]
        for row in result["scaling"]
    ]
    columns = ["nodes", "steps/s", "efficiency", "limited by"]
    return "The same global batch on other numbers of nodes\n" + measure.table(columns, cells)


def _assumption_lines(result: dict[str, Any]) -> list[str]:
    gpu, assumed, fit = result["gpu"], result["assumptions"], result["scaling_fit"]
    peak = gpu["bf16_tflops"] if result["precision"] == "bf16" else gpu["fp32_tflops"]
    if fit is None:
        network = (
            f"{gpu['peer_gb_per_s']:.0f} GB/s between the GPUs of a node, {gpu['network_gb_per_s']:.0f} GB/s from a "
            f"node to others; reductions travel behind {100 * assumed['behind_backward']:.0f} % of the computation"
        )
    else:
        speed = "no wait at all" if fit["gb_per_s"] is None else f"{fit['gb_per_s']:.2f} GB/s after overlap"
        network = (
            f"{speed}, fitted to runs on {', '.join(map(str, fit['ranks']))} ranks on {fit['nodes']} node(s); the fit "
            f"misses a measured step by at most {fit['worst_miss_percent']:.1f} %"
        )
    return [
        "Assumptions",
        f"- products reach {100 * assumed['of_peak']:.0f} % (--of-peak) of {peak:g} TFLOP/s ({gpu['source']})",
        f"- network: {network}; a ring, as slow as its slowest link",
        f"- tensors may take {100 * assumed['usable_memory']:.0f} % of {gpu['memory_gib']} GiB",
        f"- a node writes {assumed['write_mb_per_s']:.0f} MB/s (--write-mb-per-s) and fails every "
        f"{assumed['node_mtbf_days']:.0f} days (--node-mtbf-days); a job fails with its first node",
        "- the loader gives the same per core on the cluster's processors, and the file system as much as it is asked",
    ]
