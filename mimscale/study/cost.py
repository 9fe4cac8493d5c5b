"""What the runs of a study took: size of the networks, memory, steps, seconds."""

from collections.abc import Sequence

from mimscale.errors import MimscaleError
from mimscale.models.contract import CONTRACT_FILE, read_contract
from mimscale.report.facts import RunFacts
from mimscale.report.study import Table
from mimscale.study.matched import compute_s
from mimscale.study.results import Group, Result
from mimscale.study.statistics import spread
from mimscale.study.tables import NOTHING, heading
from mimscale.train.committed import tags
from mimscale.train.config import accumulation, load_run_config
from mimscale.train.memory import estimate_memory
from mimscale.train.size import count_parameters, run_flops


def cost_table(groups: Sequence[Group]) -> Table:
    """What training and scoring took. An arm whose runs have their line already has no other one."""
    rows: list[list[str]] = []
    listed: set[str] = set()
    for group in groups:
        runs = {result.trial.evaluate for result in group.results}
        if runs <= listed:
            continue
        listed |= runs
        pretraining = list({r.trial.pretrain: r.pretraining for r in group.results if r.pretraining}.values())
        rows.append(
            [
                heading(group.experiment),
                group.arm,
                group.setting,
                *_network(group.results[0]),
                _peak_gb(pretraining or [result.run for result in group.results]),
                _cost([float(run.last_step) for run in pretraining], 0),
                _cost([float(run.last_step * run.config["global_batch"]) for run in pretraining], 0),
                _cost([run.percentile("samples_per_s", 50) for run in pretraining], 2),
                _cost([compute_s(run) for run in pretraining], 0),
                _cost([run.wall_s for run in pretraining], 0),
                _cost([float(result.run.last_step) for result in group.results], 0),
                _cost([result.finetune_s for result in group.results], 0),
                _cost([result.run.wall_s for result in group.results], 0),
                _cost([r.scores.get("seconds") for r in group.results if r.scores], 0),
            ]
        )
    return Table(
        title="",
        columns=[
            "experiment",
            "arm",
            "setting",
            "weights, M",
            "GFLOP a sample",
            "memory, GB, estimated",
            "peak memory, GB, measured",
            "pretraining steps",
            "samples",
            "samples/s",
            "pretraining, s",
            "pretraining, wall clock, s",
            "fine-tuning steps",
            "fine-tuning, s",
            "fine-tuning, wall clock, s",
            "scoring, s",
        ],
        rows=rows,
        note="Means over the runs; what several experiments share stands where it comes first. Weights, FLOPs of a "
        "forward pass and memory of a rank are of the pretraining, of an arm without one of the fine-tuning. Memory "
        "is estimated for the device, and measured as the most that a rank of any of the runs held: on its GPU, or on "
        "a CPU as a whole process, with its libraries. Seconds of training are the median step times the steps; the "
        "wall clock has start, validation and saves in it too, but no time in a queue. Nodes that ran at the same time "
        "on one machine slowed each other down.",
        text_columns=3,
    )


def _network(result: Result) -> list[str]:
    """Weights in millions, forward GFLOPs of a sample and memory of a rank in GB, of what is trained first."""
    run = result.pretraining or result.run
    saved = tags(run.run)
    try:
        config, contract = load_run_config(run.run.path), read_contract(saved[0] / CONTRACT_FILE) if saved else None
    except MimscaleError:  # of another version, or a method that this machine does not have
        contract = None
    if contract is None:
        return [NOTHING] * 3
    channels = int(contract["channels"])
    ranks = next((int(job["processes"]) for job in reversed(run.jobs) if job["verb"] == config.kind), 1)
    memory = estimate_memory(
        config,
        ranks,
        bf16=contract.get("trained_in") == "bf16",
        accumulates=accumulation(config, ranks) > 1,
        channels=channels,
    )
    flops = sum(part.forward for part in run_flops(config, channels).values())
    return [f"{count_parameters(config, channels) / 1e6:.3g}", f"{flops / 1e9:.3g}", f"{memory.peak / 1e9:.3g}"]


def _peak_gb(runs: Sequence[RunFacts]) -> str:
    peaks = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
    return f"{max(peaks) / 1e9:.3g}" if peaks else NOTHING


def _cost(values: Sequence[float | None], digits: int) -> str:
    mean = spread(values).mean
    return NOTHING if mean is None else f"{mean:.{digits}f}"
