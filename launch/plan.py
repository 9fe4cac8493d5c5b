"""A submission that has been checked: what runs, where, on how many processes, and about how large it is."""

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.folder import BESIDE
from launch.profile import Accelerator, Profile, resolve_accelerator, resolve_processes, resolve_threads, slurm_config
from mimscale import cli
from mimscale.config import build_config, config_tree, parse_yaml, tree_yaml
from mimscale.errors import ConfigError
from mimscale.train.config import FinetuneConfig, PretrainConfig, RunConfig, accumulation, legal_nodes
from mimscale.train.memory import estimate_memory
from mimscale.train.run_dir import RunDir
from mimscale.train.size import checkpoint_bytes, count_parameters, save_seconds


@dataclass(frozen=True, kw_only=True)
class JobVerb:
    """What submission must know about a verb."""

    folder_key: str  # config key of the folder that the job's files go to
    suffix: str = ""  # added to that folder's name, where the folder itself has a fixed layout
    config: type[RunConfig] | None = None  # of a verb that runs on many processes; the others run on one
    trains: bool = True  # of those: it makes a run that saves and continues
    kinds: tuple[str, ...] = ()  # words of which one stands between the verb and its RECIPE; the first by default
    # Key of a folder for results of a run; where one is given, the job's files go beside it and not into the run
    result_key: str | None = None
    has_tasks: bool = False  # takes task=I/N and merge=true, so it can be a job array

    def place(self, tree: dict[str, Any]) -> Path:
        """The folder of the job's files, by the verb's resolved config."""
        if self.result_key is not None and tree.get(self.result_key) is not None:
            results = Path(tree[self.result_key])
            return results.with_name(results.name + BESIDE)
        folder = Path(tree[self.folder_key])
        return folder.with_name(folder.name + self.suffix)


# The benchmarks that are jobs. That of ingest is no run of many ranks: `submit ingest` tells its own speed. That of
# scaling starts ranks itself on one machine; over nodes it is the table of one job of `train` for each number of them.
BENCHMARKS = ("train", "step", "stream", "checkpoint")

JOB_VERBS = {
    "pretrain": JobVerb(folder_key="run_dir", config=PretrainConfig),
    "finetune": JobVerb(folder_key="run_dir", config=FinetuneConfig),
    "evaluate": JobVerb(folder_key="run_dir", result_key="out"),
    "bench": JobVerb(folder_key="run_dir", config=PretrainConfig, trains=False, kinds=BENCHMARKS),
    "ingest": JobVerb(folder_key="out", suffix=BESIDE, has_tasks=True),
    "extract": JobVerb(folder_key="out", suffix=BESIDE, has_tasks=True),
    "cohort": JobVerb(folder_key="out", suffix=BESIDE),
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """About how large a run is, from its config alone and for one channel."""

    parameters: int
    memory_gb_per_process: float
    checkpoint_gb: float
    save_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked submission: everything is known, nothing is started."""

    verb: str
    tree: dict[str, Any]  # the resolved config, plain
    run: RunDir  # holds logs/ and jobs.jsonl; for verbs without a run directory, a folder beside their output
    shares: RunConfig | None  # of a verb on many processes, which share its global batch
    profile: Profile
    nodes: int
    processes: int  # on each node
    threads: int
    accelerator: Accelerator
    array: int | None = None  # tasks of a job array, each a part of the work
    kind: str | None = None  # of a verb with kinds
    words: tuple[str, ...] = ()  # further words of the verb

    @property
    def text(self) -> str:
        """The resolved config as YAML."""
        return tree_yaml(self.tree)

    @property
    def command(self) -> tuple[str, ...]:
        """The verb, with its kind."""
        return (self.verb,) if self.kind is None else (self.verb, self.kind)

    @property
    def trains(self) -> RunConfig | None:
        """The config of a verb that makes a run, which saves and continues."""
        return self.shares if JOB_VERBS[self.verb].trains else None

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self.nodes * self.processes

    def topology(self) -> dict[str, int | str]:
        """Processes, and for training how the global batch is made of them."""
        tree: dict[str, int | str] = {
            "executor": self.profile.executor,
            "accelerator": self.accelerator,
            "nodes": self.nodes,
            "processes": self.world_size,
            "threads_per_process": self.threads,
        }
        if self.array:
            tree["tasks"] = self.array
        if self.shares:
            tree["micro_batch"] = self.shares.micro_batch
            tree["accumulation"] = accumulation(self.shares, self.world_size)
            tree["global_batch"] = self.shares.global_batch
        return tree

    def estimate(self) -> Estimate | None:
        """About how large the run is; None for what does not train."""
        config = self.trains
        if config is None:
            return None
        automatic = self.accelerator == "cuda" and config.engine.zero_stage > 0
        bf16 = config.engine.precision == "bf16" or (config.engine.precision == "auto" and automatic)
        write_mb_per_s = slurm_config(self.profile).write_mb_per_s
        accumulates = accumulation(config, self.world_size) > 1
        memory = estimate_memory(config, self.world_size, bf16=bf16, accumulates=accumulates)
        return Estimate(
            parameters=count_parameters(config),
            memory_gb_per_process=memory.peak / 1e9,
            checkpoint_gb=checkpoint_bytes(config) / 1e9,
            save_s=save_seconds(config, self.nodes, write_mb_per_s),
        )

    def describe(self) -> list[str]:
        """Topology and estimates, one line each."""
        lines = [f"{name}: {value}" for name, value in self.topology().items()]
        estimate = self.estimate()
        if self.trains and estimate:
            steps = accumulation(self.trains, self.world_size)
            nodes = f"{self.nodes} nodes x {self.processes}" if self.nodes > 1 else f"{self.world_size}"
            lines += [
                f"{nodes} processes x micro_batch {self.trains.micro_batch} x accumulation {steps} "
                f"= global batch {self.trains.global_batch}",
                f"about {estimate.parameters / 1e6:.1f} M weights, {estimate.memory_gb_per_process:.2f} GB of device "
                "memory a process",
                f"about {estimate.checkpoint_gb:.2f} GB a checkpoint, saved in {estimate.save_s:.1f} s; a stop is "
                f"announced {self.profile.signal_lead_s:.0f} s ahead (signal_lead_s)",
            ]
        return lines


def split_kind(verb: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The kind of a verb that has several, and the words behind it; None for the others."""
    kinds = JOB_VERBS[verb].kinds
    if not kinds:
        return None, list(words)
    return (words[0], list(words[1:])) if words and words[0] in kinds else (kinds[0], list(words))


def check_verb(verb: str, kind: str | None, words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Let the verb itself resolve and check its command line.

    Returns:
        The resolved config and 0; or an empty tree and the verb's exit code, its complaint having been printed.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main([verb, *([] if kind is None else [kind]), *words, "--check"])
    return (parse_yaml(printed.getvalue(), f"{verb} --check"), 0) if code == 0 else ({}, code)


def make_plan(
    verb: str,
    tree: dict[str, Any],
    profile: Profile,
    *,
    nodes: int,
    processes: int | None,
    array: int | None = None,
    kind: str | None = None,
) -> Plan:
    """Settle where a checked config runs, and on how many processes.

    Raises:
        ConfigError: a number of nodes, processes or tasks that the profile, the verb or the global batch does not
            allow; the legal ones are listed.
    """
    job = JOB_VERBS[verb]
    if nodes != 1 and profile.executor != "slurm":
        raise ConfigError(f"--nodes {nodes}: the {profile.executor} executor runs on this machine alone; say --nodes 1")
    if nodes < 1 or (nodes > 1 and not job.config):
        raise ConfigError(f"--nodes {nodes}: {verb} runs on 1 node" + (" or more" if job.config else ""))
    if array is not None and (not job.has_tasks or profile.executor != "slurm" or array < 1):
        verbs = " and ".join(name for name, one in JOB_VERBS.items() if one.has_tasks)
        raise ConfigError(f"--array {array}: for {verbs} on Slurm, and at least 1")
    if processes is not None:
        if processes < 1 or (profile.executor == "debug" and processes != 1):
            raise ConfigError(f"--processes {processes}: at least 1, and exactly 1 for the debug executor")
        profile = replace(profile, processes_per_node=processes)
    accelerator = resolve_accelerator(profile, os.environ)
    count = resolve_processes(profile, accelerator, os.environ) if job.config else 1
    config = build_config(job.config, _staged(tree, profile), f"{verb} --check") if job.config else None
    if str(tree[job.folder_key]) == "none":
        raise ConfigError(f"submit {verb}: {job.folder_key}=DIR is missing; the job's files go there")
    plan = Plan(
        verb=verb,
        tree=config_tree(config) if config else tree,
        run=RunDir(job.place(tree).absolute()),
        shares=config,
        profile=profile,
        nodes=nodes,
        processes=count,
        threads=resolve_threads(profile, count),
        accelerator=accelerator,
        array=array,
        kind=kind,
    )
    _refuse_impossible(plan)
    return plan


def _staged(tree: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """The config with the site's folder for copies of packs, where it names none."""
    stage_dir, stream = slurm_config(profile).stage_dir, tree.get("stream", {})
    if stage_dir is None or stream.get("stage_dir") is not None:
        return tree
    return {**tree, "stream": {**stream, "stage_dir": stage_dir}}


def _refuse_impossible(plan: Plan) -> None:
    try:
        plan.topology()
    except ConfigError as error:
        assert plan.shares is not None
        nodes = legal_nodes(plan.shares, plan.processes)
        if plan.profile.executor != "slurm" or not nodes:
            raise
        raise ConfigError(
            f"--nodes {plan.nodes}: {error}; with {plan.processes} process(es) on a node, legal numbers of nodes are "
            f"{', '.join(map(str, nodes))}"
        ) from None
