"""Before a run claims its directory: do all ranks agree on what they are about to do, and can each of them do it?

A rank with another config or another library trains something else in silence; a node without the store or without
its GPUs fails later and worse. All that is wrong is named at once, on every rank.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimscale.config import config_tree, tree_hash
from mimscale.errors import LaunchError, MimscaleError
from mimscale.store.layout import read_info
from mimscale.train.config import RunConfig
from mimscale.train.environment import installed_versions
from mimscale.train.ranks import Ranks
from mimscale.train.size import checkpoint_bytes
from mimscale.train.trackers import require_wandb

SEEN_WITHIN_S = 15.0  # a file made on one node is visible on the others; NFS caches for some seconds


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank says about itself."""

    rank: int
    node: str
    local_size: int
    config_hash: str
    versions: dict[str, str | None]
    accelerator: str
    devices: int  # that this rank's torch sees
    store_problem: str | None
    sees_run_dir: bool
    free_bytes: int  # where run_dir lies


def preflight(config: RunConfig, ranks: Ranks) -> None:
    """Compare the ranks, and let them add a number together. A collective.

    Raises:
        LaunchError: on every rank, naming each problem, its node and the way out.
    """
    if config.meter.wandb is not None:
        require_wandb()
    mark = config.run_dir / f".preflight-{os.environ.get('MIMSCALE_JOB_ID', os.getpid())}"
    try:
        seen = ranks.first_does(lambda: _touch(mark))  # its name holds a number of rank 0's process
        everyone = ranks.gather_to_first(_facts(config, ranks, seen))  # rank 0 alone judges what grows with the ranks
        counted = round(ranks.sum({"ranks": 1.0}).wait()["ranks"])
        ranks.first_does(lambda: judge(everyone, counted, config, checkpoint_bytes(config)))
    finally:
        if ranks.is_first:
            mark.unlink(missing_ok=True)
            with suppress(OSError):  # a folder that we made is nobody's run yet
                mark.parent.rmdir()


def judge(everyone: list[RankFacts], counted: int, config: RunConfig, needed_bytes: int) -> None:
    """Raise LaunchError when these ranks cannot train together.

    Args:
        everyone: the facts of all ranks, in rank order.
        counted: the sum of one 1 a rank, over the network that training uses.
        config: of rank 0.
        needed_bytes: of one checkpoint.
    """
    first, problems = everyone[0], []
    if counted != len(everyone):
        problems.append(f"{len(everyone)} ranks add up to {counted}: the collective library is broken on this network")
    for facts in everyone:
        who = f"rank {facts.rank} on {facts.node}"
        if facts.config_hash != first.config_hash:
            problems.append(f"{who}: another config than rank 0's; start all ranks with the same command line")
        for package, version in facts.versions.items():
            if version != first.versions[package]:
                problems.append(
                    f"{who}: {package} {version}, rank 0 has {first.versions[package]}; use one environment everywhere"
                )
        if facts.accelerator != first.accelerator:
            problems.append(
                f"{who}: computes on {facts.accelerator}, rank 0 on {first.accelerator}; set DS_ACCELERATOR"
            )
    somebody_reads_the_store = any(not facts.store_problem for facts in everyone)
    for node, facts in {facts.node: facts for facts in reversed(everyone)}.items():  # the lowest rank of each node
        if facts.accelerator == "cuda" and facts.devices < facts.local_size:
            problems.append(
                f"{node}: {facts.local_size} ranks, but each sees {facts.devices} GPU(s); ask for GPUs by node "
                "(slurm.gpus_per_node or slurm.gres) and as many as processes_per_node"
            )
        # A store that no node can read is no fault of a node: opening it says so, and the run's outcome does.
        if facts.store_problem and somebody_reads_the_store:
            problems.append(f"{node}: store={config.store} cannot be read there ({facts.store_problem}); mount it")
        if not facts.sees_run_dir:
            problems.append(
                f"{node}: run_dir={config.run_dir} is not the folder that {first.node} sees; name one on a shared disk"
            )
        if facts.free_bytes < needed_bytes:
            problems.append(
                f"{node}: the disk is full: {_size(facts.free_bytes)} free at run_dir={config.run_dir}, a checkpoint "
                f"takes about {_size(needed_bytes)}; free space or choose another run_dir"
            )
    if problems:
        raise LaunchError("not started:\n  " + "\n  ".join(dict.fromkeys(problems)))


def _size(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.2f} GB" if count_bytes >= 1e8 else f"{count_bytes / 1e6:.3f} MB"


def _touch(mark: Path) -> Path:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise LaunchError(f"run_dir={mark.parent}: {error.strerror}; choose another run_dir or free space") from None
    return mark


def _facts(config: RunConfig, ranks: Ranks, mark: Path) -> RankFacts:
    tree: dict[str, Any] = config_tree(config)
    return RankFacts(
        rank=ranks.world.rank,
        node=ranks.world.node,
        local_size=ranks.world.local_size,
        config_hash=tree_hash(tree),
        versions=installed_versions(),
        accelerator=ranks.device.type,
        devices=torch.cuda.device_count() if ranks.device.type == "cuda" else 0,
        store_problem=_store_problem(config.store),
        sees_run_dir=_appears(mark),
        free_bytes=shutil.disk_usage(mark.parent).free if mark.parent.exists() else 0,
    )


def _store_problem(store: Path) -> str | None:
    try:
        read_info(store)
    except (OSError, MimscaleError) as error:
        return str(error).splitlines()[0]
    return None


def _appears(mark: Path) -> bool:
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while not mark.exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True
