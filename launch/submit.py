"""`mimscale submit VERB ...`: check everything here, then start the job somewhere else."""

import argparse
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch.folder import JobFolder
from launch.follow import follow, follow_batch_job
from launch.jobs import JOB_SIGNALS
from launch.plan import JOB_VERBS, Plan, check_verb, make_plan, split_kind
from launch.preflight import refuse_inside_allocation
from launch.profile import load_profile
from launch.submission import prepare, script_of, start, start_here, submit_batch
from mimscale import console
from mimscale.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line of `mimscale submit`."""
    parser = argparse.ArgumentParser(
        prog="mimscale submit",
        description="Run a verb as a job, on this machine or on a Slurm cluster, without keeping the shell.",
    )
    parser.add_argument("verb", choices=JOB_VERBS, help="what to run")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="the verb's RECIPE and key=value overrides; bench: step, stream or checkpoint before them (else train)",
    )
    parser.add_argument("--profile", default="local", metavar="NAME_OR_FILE", help="where to run (default: local)")
    parser.add_argument(
        "--nodes",
        type=_node_counts,
        default=(1,),
        help="number of nodes (default: 1); bench: 1,2,4 makes a job of each",
    )
    parser.add_argument("--strong", action="store_true", help="bench: the same global batch on every number of nodes")
    parser.add_argument("--processes", type=int, help="processes on each node, in place of the profile's")
    parser.add_argument("--after", type=Path, metavar="RUN_DIR", help="start when the job of this run has finished")
    parser.add_argument(
        "--array", type=int, metavar="N", help="ingest, extract: N jobs that each do a share, and one that merges"
    )
    parser.add_argument("--wait", action="store_true", help="show rank 0's log and leave with the job's exit code")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, start nothing")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start over")
    parser.add_argument("--fresh-data", action="store_true", help="continue although the data or their order changed")
    parser.add_argument("--inside-allocation", action="store_true", help="submit although this shell is itself a job")
    parser.add_argument("--json", action="store_true", help="print {job_id, run_dir, log} on stdout")
    return parser


def main(argv: list[str]) -> int:
    """`mimscale submit VERB RECIPE key=value ... [--profile P] [--wait] [--dry-run]`; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    profile = load_profile(arguments.profile)
    batch = profile.executor == "slurm"
    if batch and not (arguments.inside_allocation or arguments.dry_run):
        refuse_inside_allocation(os.environ)
    if arguments.after is not None and not batch:
        raise ConfigError(f"--after {arguments.after}: Slurm waits for jobs, the {profile.executor} executor does not")
    kind, words = split_kind(arguments.verb, arguments.words)
    tree, code = check_verb(arguments.verb, kind, words)
    if code:
        return code
    if arguments.verb != "bench" and (len(arguments.nodes) > 1 or arguments.strong):
        raise ConfigError(f"{arguments.verb}: several numbers of nodes, and --strong, are for bench")
    plans = [
        make_plan(
            arguments.verb,
            each,
            profile,
            nodes=nodes,
            processes=arguments.processes,
            array=arguments.array,
            kind=kind,
        )
        for nodes, each in _trees(tree, arguments.nodes, strong=arguments.strong)
    ]
    codes = [_submit(plan, arguments, argv) for plan in plans]
    if len(plans) > 1 and kind == "train" and not arguments.dry_run:
        folders = " ".join(shlex.quote(str(plan.run.path)) for plan in plans)
        console.say(f"when all have finished: mimscale bench scaling --from {folders}")
    return max(codes)


def _node_counts(text: str) -> tuple[int, ...]:
    """`4` or `1,2,4,8`."""
    return tuple(sorted({int(number) for number in text.split(",")}))


def _trees(tree: dict[str, Any], counts: Sequence[int], *, strong: bool) -> list[tuple[int, dict[str, Any]]]:
    """The config on each number of nodes, each in a folder of its own where there are several.

    The recipe's global batch is that of the fewest nodes; with more of them it grows, unless scaling is to be strong.
    """
    if len(counts) == 1:
        return [(counts[0], tree)]
    if min(counts) < 1:
        raise ConfigError(f"--nodes {','.join(map(str, counts))}: each at least 1")
    if tree["run_dir"] == "none":
        raise ConfigError("submit bench: run_dir=DIR is missing; each job's files go to a folder in it")
    return [
        (
            nodes,
            {
                **tree,
                "run_dir": str(Path(tree["run_dir"]) / f"nodes_{nodes:04d}"),
                "global_batch": tree["global_batch"] if strong else tree["global_batch"] * nodes // min(counts),
            },
        )
        for nodes in counts
    ]


def _submit(plan: Plan, arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Submit one plan, or print it; returns the exit code."""
    batch = plan.profile.executor == "slurm"
    if arguments.fresh_data:
        if arguments.verb not in ("pretrain", "finetune"):
            raise ConfigError(f"--fresh-data: {arguments.verb} has no order of data; only pretrain and finetune do")
        plan = replace(plan, words=(*plan.words, "--fresh-data"))
    if arguments.dry_run:
        _print_plan(plan, arguments.after, as_json=arguments.json)
        return 0
    if plan.profile.executor == "debug":
        return _run_here(plan, prepare(plan, fresh=arguments.fresh), argv, as_json=arguments.json)
    # A Ctrl-C while the job is being started waits until the job is recorded, and then stops it or us in the usual way.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        if batch:
            folder, job_id = submit_batch(plan, argv, fresh=arguments.fresh, after=arguments.after)
        else:
            folder = prepare(plan, fresh=arguments.fresh)
            job_id = start(plan, folder, argv)
        log = folder.rank_log(job_id, 0)
        if arguments.json:
            console.print_json({"job_id": job_id, "run_dir": str(plan.run.path), "log": str(log)})
        _say_what_next(plan, job_id, log)
        if not arguments.wait:
            return 0
        return follow_batch_job(folder) if batch else follow(folder, job_id)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)


def _run_here(plan: Plan, folder: JobFolder, argv: Sequence[str], *, as_json: bool) -> int:
    """The debug executor: inside this process, by the code that is loaded already."""
    job = start_here(plan, folder, argv)
    if as_json:
        console.print_json({"job_id": job.job_id, "run_dir": str(plan.run.path), "log": str(folder.path)})
    return int(job.result())


def _print_plan(plan: Plan, after: Path | None, *, as_json: bool) -> None:
    script = script_of(plan, waits=after is not None) if plan.profile.executor == "slurm" else None
    if as_json:
        estimate = plan.estimate()
        console.print_json(
            {
                "config": plan.tree,
                "topology": plan.topology(),
                "run_dir": str(plan.run.path),
                "estimate": None if estimate is None else asdict(estimate),
                "sbatch": script,
            }
        )
        return
    print(
        "\n".join(
            f"# {line}"
            for line in (f"mimscale {' '.join(plan.command)}, job files in {plan.run.logs}", *plan.describe())
        )
    )
    print(plan.text, end="")
    if script is not None:
        print(f"# --- batch script\n{script}")
        if plan.array:
            print("# --- then, when every task has finished: the same for one task with merge=true")


def _say_what_next(plan: Plan, job_id: str, log: Path) -> None:
    batch, run_dir = plan.profile.executor == "slurm", shlex.quote(str(plan.run.path))
    head = f"job {job_id}: {plan.verb} on {plan.world_size} process(es) x {plan.threads} thread(s), {plan.accelerator}"
    if batch:
        head += f", {plan.nodes} node(s)" + (f", after {plan.array} tasks" if plan.array else "")
    console.say(
        f"{head}\n"
        f"  files            {plan.run.path}\n"
        f"  log              {log}\n"
        f"  how it is        mimscale status {run_dir}\n"
        f"  follow it        mimscale logs {run_dir} -f\n"
        f"  save and stop    {f'mimscale cancel {run_dir}' if batch else f'kill -USR2 {job_id}'}"
    )
