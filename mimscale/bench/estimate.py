"""What a run needs and how fast it goes, before any job: pure arithmetic on its config, without torch.

Every number has the unit in its name; what cannot be known before a run is an `Assumption` that the report prints.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mimscale.bench.gpus import GPUS, Gpu
from mimscale.bench.network import ScalingFit, Traffic, traffic, transfer_s
from mimscale.errors import ConfigError
from mimscale.models.flops import Flops
from mimscale.train.config import RunConfig, accumulation, legal_nodes
from mimscale.train.memory import Memory, estimate_memory
from mimscale.train.size import checkpoint_bytes, count_parameters, run_flops, save_seconds

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
SCHEMA_VERSION = 1
STORED_BYTES = 2  # a voxel that a loader hands over: int16
_LARGEST_MICRO_BATCH = 1 << 16
_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no arithmetic can tell; each has an argument of `mimscale plan`."""

    # Share of the peak that products reach in a step. ViT g/14 by NVIDIA NeMo, from its published samples/s: 44 % on
    # A100, 29 % on H100; few tokens a sample reach less. `mimscale bench step` on the GPU replaces it.
    of_peak: float = 0.35
    usable_memory: float = 0.92  # of a GPU's memory: the rest is CUDA's context, libraries and fragmentation
    behind_backward: float = 2 / 3  # of the time of a micro-batch, in which reductions may travel: its backward pass
    write_mb_per_s: float = 500.0  # that a node writes to the file system of run_dir
    signal_lead_s: float = 120.0  # between the signal and the end of a job
    # Days that a node runs without stopping its job: 419 unexpected interruptions in 54 days on 2 048 nodes (Llama team
    # 2024, arXiv:2407.21783, sec. 3.3.4). Preemptions come on top.
    node_mtbf_days: float = 260.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one core reads from the store."""

    crops_per_s: float
    file_bytes_per_crop: float
    source: str  # measured now, or the file of an earlier result


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the run would go."""

    gpu_name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        """Over all nodes; one rank each."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of an optimizer step, by what a rank waits for."""

    compute_s: float
    network_s: float  # that is not hidden behind the backward pass
    loader_s: float | None  # to read its crops with its workers; None: the store was not read

    @property
    def seconds(self) -> float:
        """The loader works beside the rest."""
        return max(self.compute_s + self.network_s, self.loader_s or 0.0)

    @property
    def limit(self) -> str:
        """What would have to be faster."""
        if self.loader_s is not None and self.loader_s > self.compute_s + self.network_s:
            return "loader"
        return "network" if self.network_s > self.compute_s else "compute"


def uses_bf16(config: RunConfig) -> bool:
    """Whether the engine computes in bf16 on a GPU."""
    return config.engine.precision == "bf16" or (config.engine.precision == "auto" and config.engine.zero_stage > 0)


def memory_of(config: RunConfig, cluster: Cluster, *, channels: int) -> Memory:
    """Of one GPU of the cluster. Micro-batches that do not divide the global batch are taken as one of several."""
    accumulates = config.global_batch > config.micro_batch * cluster.gpus
    return estimate_memory(config, cluster.gpus, bf16=uses_bf16(config), accumulates=accumulates, channels=channels)


def usable_bytes(gpu: Gpu, assumptions: Assumptions) -> float:
    """That tensors may take."""
    return gpu.memory_gib * 2**30 * assumptions.usable_memory


def largest_micro_batch(config: RunConfig, cluster: Cluster, limit_bytes: float, *, channels: int) -> int:
    """The most crops that one GPU computes at once; 0 where not even one fits."""

    def fits(micro_batch: int) -> bool:
        return _peak(config, micro_batch, cluster, channels) <= limit_bytes

    low, high = 0, 1
    while high <= _LARGEST_MICRO_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _peak(config: RunConfig, micro_batch: int, cluster: Cluster, channels: int) -> int:
    batch = max(config.global_batch, micro_batch * cluster.gpus)
    changed = replace(config, micro_batch=micro_batch, global_batch=batch - batch % micro_batch)
    return memory_of(changed, cluster, channels=channels).peak


def checkpointed(config: RunConfig, on: bool) -> RunConfig:
    """The same run with or without recomputed activations."""
    return replace(config, model=replace(config.model, checkpoint_activations=on))


def refuse_what_fits_nowhere(config: RunConfig, cluster: Cluster, assumptions: Assumptions, channels: int) -> None:
    """Raise ConfigError when not even one crop fits at any ZeRO stage, saying by how much and what would."""
    limit = usable_bytes(cluster.gpu, assumptions)
    needs = {stage: _peak(_staged(config, stage), 1, cluster, channels) for stage in STAGES}
    best = min(needs, key=lambda stage: needs[stage])
    if needs[best] <= limit:
        return
    ways = []
    thrifty = {stage: _peak(checkpointed(_staged(config, stage), True), 1, cluster, channels) for stage in STAGES}
    stage = min(thrifty, key=lambda one: thrifty[one])
    if thrifty[stage] <= limit:
        ways.append(f"model.checkpoint_activations=true with engine.zero_stage={stage} ({thrifty[stage] / 1e9:.1f} GB)")
    larger = [name for name, gpu in GPUS.items() if usable_bytes(gpu, assumptions) >= needs[best]]
    if larger:
        ways.append(f"--gpu {' or '.join(larger)}")
    raise ConfigError(
        f"the model fits on no ZeRO stage: one crop takes {needs[best] / 1e9:.1f} GB at stage {best}, "
        f"{(needs[best] - limit) / 1e9:.1f} GB more than the {limit / 1e9:.1f} GB that {cluster.gpu_name} has for "
        f"tensors; what would: {', or '.join([*ways, 'a smaller crop_voxels, model.dim or model.depth'])}"
    )


def _staged(config: RunConfig, stage: Stage) -> RunConfig:
    """At another stage, and in the precision that the engine takes there."""
    precision: Literal["auto", "fp32"] = "fp32" if stage == 0 or config.engine.precision == "fp32" else "auto"
    return replace(config, engine=replace(config.engine, zero_stage=stage, precision=precision))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step consists of, wherever it runs."""

    flops: Flops  # of a sample
    parameters: int
    reading: Reading | None
    fit: ScalingFit | None


def step_of(config: RunConfig, cluster: Cluster, assumptions: Assumptions, work: Work) -> Step:
    """The seconds of one optimizer step.

    Raises:
        ConfigError: a global batch that does not divide.
    """
    micro_batches = accumulation(config, cluster.gpus)
    bf16 = uses_bf16(config)
    peak = (cluster.gpu.bf16_tflops if bf16 else cluster.gpu.fp32_tflops) * 1e12
    crops = config.global_batch // cluster.gpus
    compute_s = crops * work.flops.hardware / (peak * assumptions.of_peak)
    sent = traffic(config, work.parameters, micro_batches, bf16=bf16)
    loader_s = None
    if work.reading is not None:
        loader_s = crops / (work.reading.crops_per_s * max(config.stream.workers, 1))
    return Step(
        compute_s=compute_s,
        network_s=_network_s(sent, cluster, compute_s, assumptions, work.fit) if cluster.gpus > 1 else 0.0,
        loader_s=loader_s,
    )


def _network_s(
    sent: Traffic, cluster: Cluster, compute_s: float, assumptions: Assumptions, fit: ScalingFit | None
) -> float:
    if fit is not None:  # what was measured is what the overlap left
        return fit.exposed_s(sent.behind_backward + sent.alone, cluster.gpus)
    place = (cluster.nodes, cluster.gpus_per_node, cluster.gpu)
    hidden_s = assumptions.behind_backward * compute_s
    return max(0.0, transfer_s(sent.behind_backward, *place) - hidden_s) + transfer_s(sent.alone, *place)


def best_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds between saves that lose least: the square root of 2 x save x mean time between failures.

    Young 1974, Communications of the ACM 17(9), p. 530; Daly 2006, Future Generation Computer Systems 22(3), eq. 13,
    to first order, which holds while a save is much shorter than the time between failures.
    """
    return math.sqrt(2 * save_s * mtbf_s)


def estimate(
    config: RunConfig,
    cluster: Cluster,
    assumptions: Assumptions,
    *,
    channels: int = 1,
    reading: Reading | None = None,
    fit: ScalingFit | None = None,
) -> dict[str, Any]:
    """Everything that `mimscale plan` says, as its JSON tells it.

    Raises:
        ConfigError: a global batch that does not divide, a number of nodes that it does not allow, or a model that
            fits at no stage.
    """
    _refuse_nodes(config, cluster)
    refuse_what_fits_nowhere(config, cluster, assumptions, channels)
    by_part, parameters = run_flops(config, channels), count_parameters(config, channels)
    flops = sum(by_part.values(), start=Flops(forward=0, backward=0))
    work = Work(flops=flops, parameters=parameters, reading=reading, fit=fit)
    step = step_of(config, cluster, assumptions, work)
    checkpoint = _checkpoint(config, cluster, assumptions, step.seconds)
    seconds = config.steps * step.seconds * (1 + checkpoint["overhead_percent"] / 100)
    return {
        "schema_version": SCHEMA_VERSION,
        "gpu": {"name": cluster.gpu_name, **asdict(cluster.gpu)},
        "nodes": cluster.nodes,
        "gpus": cluster.gpus,
        "micro_batch": config.micro_batch,
        "accumulation": accumulation(config, cluster.gpus),
        "global_batch": config.global_batch,
        "zero_stage": config.engine.zero_stage,
        "precision": "bf16" if uses_bf16(config) else "fp32",
        "parameters": parameters,
        "flops_per_sample": {
            part: {"forward": one.forward, "training": one.training, "hardware": one.hardware}
            for part, one in {**by_part, "total": flops}.items()
        },
        "memory": _memory(config, cluster, assumptions, channels),
        "loader": _loader(config, cluster, step, channels, reading),
        "step": {
            **asdict(step),
            "seconds": step.seconds,
            "steps_per_s": 1 / step.seconds,
            "samples_per_s": config.global_batch / step.seconds,
            "limit": step.limit,
            "mfu": _mfu(config, cluster, flops, step.seconds),
        },
        "scaling": _scaling(config, cluster, assumptions, work),
        "scaling_fit": None if fit is None else asdict(fit),
        "checkpoint": checkpoint,
        "whole_run": {"days": seconds / _DAY_S, "gpu_hours": seconds / 3600 * cluster.gpus, "steps": config.steps},
        "assumptions": asdict(assumptions),
    }


def _refuse_nodes(config: RunConfig, cluster: Cluster) -> None:
    try:
        accumulation(config, cluster.gpus)
    except ConfigError as error:
        nodes = legal_nodes(config, cluster.gpus_per_node)
        legal = ", ".join(map(str, nodes)) or "none: use a smaller micro_batch or --gpus-per-node"
        raise ConfigError(
            f"--nodes {cluster.nodes}: {error}; with {cluster.gpus_per_node} GPU(s) on a node, legal numbers of nodes "
            f"are {legal}"
        ) from None


def _mfu(config: RunConfig, cluster: Cluster, flops: Flops, seconds: float) -> float:
    peak = (cluster.gpu.bf16_tflops if uses_bf16(config) else cluster.gpu.fp32_tflops) * 1e12
    return config.global_batch * flops.training / seconds / (peak * cluster.gpus)


def _memory(config: RunConfig, cluster: Cluster, assumptions: Assumptions, channels: int) -> dict[str, Any]:
    limit = usable_bytes(cluster.gpu, assumptions)
    stages = []
    for stage in STAGES:
        staged = _staged(config, stage)
        memory = memory_of(staged, cluster, channels=channels)
        plain, thrifty = checkpointed(staged, False), checkpointed(staged, True)
        stages.append(
            {
                "zero_stage": stage,
                "precision": "bf16" if uses_bf16(staged) else "fp32",
                **{name: value for name, value in asdict(memory).items() if name != "activations"},
                "activations": memory_of(plain, cluster, channels=channels).activations,
                "activations_checkpointed": memory_of(thrifty, cluster, channels=channels).activations,
                "fits": memory.peak <= limit,
                "largest_micro_batch": largest_micro_batch(staged, cluster, limit, channels=channels),
            }
        )
    return {"usable_bytes": round(limit), "stages": stages}


def _loader(config: RunConfig, cluster: Cluster, step: Step, channels: int, reading: Reading | None) -> dict[str, Any]:
    crop_bytes = math.prod(config.crop_voxels) * channels * STORED_BYTES
    needed = config.global_batch / cluster.gpus / (step.compute_s + step.network_s)
    need = {
        "crops_per_s_per_gpu": needed,
        "gb_per_s_per_gpu": needed * crop_bytes / 1e9,
        "gb_per_s_per_node": needed * crop_bytes * cluster.gpus_per_node / 1e9,
        "workers": config.stream.workers,
    }
    if reading is None:
        return {**need, "source": None}
    return {
        **need,
        "source": reading.source,
        "crops_per_s_per_core": reading.crops_per_s,
        "gb_per_s_per_core": reading.crops_per_s * crop_bytes / 1e9,
        "storage_gb_per_s_per_node": needed * reading.file_bytes_per_crop * cluster.gpus_per_node / 1e9,
        "cores_per_gpu": math.ceil(needed / reading.crops_per_s),
    }


def _scaling(config: RunConfig, cluster: Cluster, assumptions: Assumptions, work: Work) -> list[dict[str, Any]]:
    """The same global batch on each legal number of nodes. Efficiency is the share of a step in which GPUs compute."""
    rows = []
    for nodes in legal_nodes(config, cluster.gpus_per_node):
        step = step_of(config, replace(cluster, nodes=nodes), assumptions, work)
        efficiency = step.compute_s / step.seconds
        rows.append({"nodes": nodes, "steps_per_s": 1 / step.seconds, "efficiency": efficiency, "limit": step.limit})
    return rows


def _checkpoint(config: RunConfig, cluster: Cluster, assumptions: Assumptions, step_s: float) -> dict[str, Any]:
    save_s = save_seconds(config, cluster.nodes, assumptions.write_mb_per_s)
    mtbf_s = assumptions.node_mtbf_days * _DAY_S / cluster.nodes
    best_s, recipe_s = best_interval_s(save_s, mtbf_s), config.checkpoint.every_steps * step_s
    return {
        "bytes": checkpoint_bytes(config),
        "save_s": save_s,
        "signal_lead_s": assumptions.signal_lead_s,
        # A stop comes at the end of a step, and is agreed on one step later.
        "saved_in_time": save_s + 2 * step_s <= assumptions.signal_lead_s,
        "mtbf_h": mtbf_s / 3600,
        "best_interval_s": best_s,
        "best_every_steps": max(1, round(best_s / step_s)),
        "every_steps": config.checkpoint.every_steps,
        "every_s": recipe_s,
        "overhead_percent": 100 * (save_s / recipe_s + recipe_s / (2 * mtbf_s)),
    }
