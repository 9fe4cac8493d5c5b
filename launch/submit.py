"""`mimscale submit VERB ...`: check everything here, then start the job somewhere else.

The job runs the resolved config that stands in its folder, so a recipe that is edited later changes nothing. How it
ended stands in `outcome.json`, which `launch.supervise` has the last word on.
"""

import argparse
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.local.debug import DebugExecutor
from submitit.local.local import LocalJob

from launch.folder import JobFolder, JobRecord, append_job, claim_folder, job_folders, now_utc, refuse_while_alive
from launch.follow import follow
from launch.jobs import JOB_SIGNALS, RunVerb, free_port, job_environment
from launch.profile import Accelerator, Profile, load_profile, resolve_accelerator, resolve_processes, resolve_threads
from launch.snapshot import snapshot_code
from mimscale import cli, console, durable
from mimscale.config import build_config, config_tree, config_yaml, parse_yaml, tree_hash
from mimscale.errors import ConfigError, LaunchError
from mimscale.store.layout import read_info
from mimscale.train.config import FREE_KEYS, FinetuneConfig, PretrainConfig, RunConfig, accumulation
from mimscale.train.environment import COMMIT_VARIABLE, this_commit
from mimscale.train.run_dir import RunDir
from mimscale.world import Process


@dataclass(frozen=True, kw_only=True)
class JobVerb:
    """What submission must know about a verb."""

    folder_key: str  # config key of the folder that the job's files go to
    suffix: str = ""  # added to that folder's name, where the folder itself has a fixed layout
    config: type[RunConfig] | None = None  # of a verb that trains, on many processes; the others run on one


JOB_VERBS = {
    "pretrain": JobVerb(folder_key="run_dir", config=PretrainConfig),
    "finetune": JobVerb(folder_key="run_dir", config=FinetuneConfig),
    "evaluate": JobVerb(folder_key="run_dir"),
    "ingest": JobVerb(folder_key="out", suffix=".job"),
    "cohort": JobVerb(folder_key="out", suffix=".job"),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked submission: everything is known, nothing is started."""

    verb: str
    tree: dict[str, Any]  # the resolved config, plain
    text: str  # the same as YAML
    run: RunDir  # holds logs/ and jobs.jsonl; for verbs without a run directory, a folder beside their output
    trains: RunConfig | None
    profile: Profile
    nodes: int
    processes: int  # on each node
    threads: int
    accelerator: Accelerator

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
        if self.trains:
            tree["micro_batch"] = self.trains.micro_batch
            tree["accumulation"] = accumulation(self.trains, self.world_size)
            tree["global_batch"] = self.trains.global_batch
        return tree


class SupervisedExecutor(submitit.LocalExecutor):
    """Submitit's local executor with our supervisor in place of its controller.

    The job has its own session, so it survives the shell, and holds none of the shell's pipes, so `submit | cat` ends.
    """

    def __init__(self, folder: JobFolder, *, processes: int, environment: dict[str, str]) -> None:
        super().__init__(folder.path, python=shlex.quote(sys.executable))
        self._job_folder = folder
        self._environment = environment
        self.update_parameters(tasks_per_node=processes)

    def _submit_command(self, command: str) -> LocalJob[Any]:
        with self._job_folder.supervisor_log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.supervise", str(self.folder), command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalJob(self.folder, str(process.pid), tasks=range(self._num_tasks()), process=process)


def check_verb(verb: str, words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Let the verb itself resolve and check its command line.

    Returns:
        The resolved config and 0; or an empty tree and the verb's exit code, its complaint having been printed.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main([verb, *words, "--check"])
    return (parse_yaml(printed.getvalue(), f"{verb} --check"), 0) if code == 0 else ({}, code)


def make_plan(verb: str, tree: dict[str, Any], profile: Profile, *, nodes: int, processes: int | None) -> Plan:
    """Settle where a checked config runs, and on how many processes.

    Raises:
        ConfigError: a number of nodes or processes that the profile or the global batch does not allow.
    """
    job = JOB_VERBS[verb]
    if nodes != 1:
        raise ConfigError(f"--nodes {nodes}: the {profile.executor} executor runs on this machine alone; say --nodes 1")
    if processes is not None:
        if processes < 1 or (profile.executor == "debug" and processes != 1):
            raise ConfigError(f"--processes {processes}: at least 1, and exactly 1 for the debug executor")
        profile = replace(profile, processes_per_node=processes)
    accelerator = resolve_accelerator(profile, os.environ)
    count = resolve_processes(profile, accelerator, os.environ) if job.config else 1
    config = build_config(job.config, tree, f"{verb} --check") if job.config else None
    text = config_yaml(config) if config else _yaml_of(tree)
    place = Path(tree[job.folder_key])
    plan = Plan(
        verb=verb,
        tree=config_tree(config) if config else tree,
        text=text,
        run=RunDir(place.with_name(place.name + job.suffix).absolute()),
        trains=config,
        profile=profile,
        nodes=nodes,
        processes=count,
        threads=resolve_threads(profile, count),
        accelerator=accelerator,
    )
    plan.topology()  # refuses a global batch that does not divide
    return plan


def _yaml_of(tree: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)


def prepare(plan: Plan, *, fresh: bool) -> JobFolder:
    """Make the run directory and the job's folder in it.

    Raises:
        LaunchError: a job is alive there.
        ConfigError: the run in it has another config, or there is no run to evaluate.
        DataError: no store where the config says.
    """
    root = plan.run.path
    refuse_while_alive(root, job_folders(plan.run.logs))
    writers = plan.run.living_ranks()
    if writers:
        raise LaunchError(
            f"{root}: a run that was not submitted is alive here ({_ranks_text(writers)}); wait for it, or let it save "
            f"and stop with `kill -USR2 {' '.join(str(pid) for pid in writers.values())}`"
        )
    ports = [folder.read().master_port for folder in job_folders(plan.run.logs)[-1:]]
    if plan.trains:
        read_info(plan.trains.store)  # refuses what is no store, before anything waits in a queue
        if fresh:  # here and once: a job that is started again must not move its own progress aside
            plan.run.move_aside()
        with durable.explained(LaunchError, plan.run.path, "choose another run_dir or free space"):
            plan.run.open(plan.tree, plan.text, free_keys=FREE_KEYS)
    elif JOB_VERBS[plan.verb].folder_key == "run_dir":
        plan.run.read_config_tree()  # refuses a folder that is no run directory
    record = JobRecord(
        verb=plan.verb,
        executor=plan.profile.executor,
        processes=plan.world_size,
        master_port=free_port(avoid=ports[0] if ports else None),
        config_hash=tree_hash(plan.tree),
        timeout_min=plan.profile.timeout_min,
        signal_lead_s=plan.profile.signal_lead_s,
        lost_rank_grace_s=plan.profile.lost_rank_grace_s,
        trains=plan.trains is not None,
        submitted_utc=now_utc(),
        submitter=Process.of(os.getpid()),
    )
    folder = claim_folder(plan.run.logs, record, plan.text)
    if plan.trains:
        plan.run.outcome.unlink(missing_ok=True)  # how the job before ended
    return folder


def _ranks_text(ranks: dict[int, int]) -> str:
    return ", ".join(f"rank {rank} is process {pid}" for rank, pid in ranks.items())


def start(plan: Plan, folder: JobFolder, argv: Sequence[str]) -> submitit.Job[int]:
    """Hand the job to its executor and record it."""
    record = folder.read()
    environment = job_environment(
        os.environ, chosen=plan.profile.environment, threads=plan.threads, accelerator=plan.accelerator
    )
    settings = {name: environment[name] for name in (*plan.profile.environment, "OMP_NUM_THREADS", "DS_ACCELERATOR")}
    task = RunVerb(
        arguments=(plan.verb, str(folder.config)),
        folder=Path.cwd(),
        environment=settings,
        master_port=record.master_port,
    )
    job: submitit.Job[int]
    code = None
    if plan.profile.executor == "debug":  # runs in this process, by the code that is loaded already
        job = DebugExecutor(folder.path).submit(task)
    else:
        code = snapshot_code(plan.run.code)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(code.resolve()), environment.get("PYTHONPATH"))))
        # `python -m` would look into the current folder first, and find the checkout that a user submits from.
        environment["PYTHONSAFEPATH"] = "1"
        environment[COMMIT_VARIABLE] = this_commit()
        job = SupervisedExecutor(folder, processes=plan.processes, environment=environment).submit(task)
        record = replace(record, supervisor=Process.of(int(job.job_id)))
    folder.write(replace(record, job_id=job.job_id))
    append_job(
        plan.run.jobs,
        {
            "job_id": job.job_id,
            "verb": plan.verb,
            "executor": record.executor,
            "host": record.submitter.host,
            "submitted_utc": record.submitted_utc,
            "processes": record.processes,
            "config_hash": record.config_hash,
            "folder": str(folder.path.relative_to(plan.run.path)),
            "code": None if code is None else str(code.relative_to(plan.run.path)),
            "command": shlex.join(["mimscale", "submit", *argv]),
        },
    )
    return job


def parser() -> argparse.ArgumentParser:
    """The command line of `mimscale submit`."""
    parser = argparse.ArgumentParser(
        prog="mimscale submit", description="Run a verb as a job: on this machine, without keeping the shell."
    )
    parser.add_argument("verb", choices=JOB_VERBS, help="what to run")
    parser.add_argument("words", nargs="*", metavar="WORD", help="the verb's RECIPE and key=value overrides")
    parser.add_argument("--profile", default="local", metavar="NAME_OR_FILE", help="where to run (default: local)")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (default: 1)")
    parser.add_argument("--processes", type=int, help="processes on each node, in place of the profile's")
    parser.add_argument("--wait", action="store_true", help="show rank 0's log and leave with the job's exit code")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and topology, start nothing")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start over")
    parser.add_argument("--json", action="store_true", help="print {job_id, run_dir, log} on stdout")
    return parser


def main(argv: list[str]) -> int:
    """`mimscale submit VERB RECIPE key=value ... [--profile P] [--wait] [--dry-run]`; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    profile = load_profile(arguments.profile)
    tree, code = check_verb(arguments.verb, arguments.words)
    if code:
        return code
    plan = make_plan(arguments.verb, tree, profile, nodes=arguments.nodes, processes=arguments.processes)
    if arguments.dry_run:
        _print_plan(plan, as_json=arguments.json)
        return 0
    folder = prepare(plan, fresh=arguments.fresh)
    if profile.executor == "debug":
        job = start(plan, folder, argv)
        if arguments.json:
            console.print_json({"job_id": job.job_id, "run_dir": str(plan.run.path), "log": str(folder.path)})
        return int(job.result())
    # A Ctrl-C while the job is being started waits until the job is recorded, and then stops it or us in the usual way.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        job = start(plan, folder, argv)
        log = folder.rank_log(job.job_id, 0)
        if arguments.json:
            console.print_json({"job_id": job.job_id, "run_dir": str(plan.run.path), "log": str(log)})
        _say_what_next(plan, job.job_id, log)
        return follow(folder, job.job_id) if arguments.wait else 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        console.print_json({"config": plan.tree, "topology": plan.topology(), "run_dir": str(plan.run.path)})
        return
    lines = [f"# {name}: {value}" for name, value in plan.topology().items()]
    if plan.trains:
        steps = accumulation(plan.trains, plan.world_size)
        lines.append(
            f"# {plan.world_size} processes x micro_batch {plan.trains.micro_batch} x accumulation {steps} "
            f"= global batch {plan.trains.global_batch}"
        )
    print("\n".join([f"# mimscale {plan.verb}, job files in {plan.run.logs}", *lines]))
    print(plan.text, end="")


def _say_what_next(plan: Plan, job_id: str, log: Path) -> None:
    console.say(
        f"job {job_id}: {plan.verb} on {plan.world_size} process(es) x {plan.threads} thread(s), {plan.accelerator}\n"
        f"  files            {plan.run.path}\n"
        f"  follow it        tail -F {shlex.quote(str(log))}\n"
        f"  save and stop    kill -USR2 {job_id}\n"
        f"  how it ended     cat {shlex.quote(str(log.parent / 'outcome.json'))}"
    )
