"""`mimscale study RECIPE run_dir=DIR`: run the graph of a study, here or on Slurm, and write its report.

Each node is a submission of its verb, in a folder of its own, by the same path as `mimscale submit`. What a node has
come to is read from there each time, so the same command goes on after any interruption.
"""

import argparse
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from launch.folder import JobFolder, job_folders
from launch.jobs import JOB_SIGNALS
from launch.plan import JOB_VERBS, Plan, make_plan
from launch.preflight import refuse_inside_allocation
from launch.profile import Accelerator, Profile, load_profile, resolve_accelerator
from launch.srun_log import last_message
from launch.status import Cluster, ask_cluster, status_of
from launch.submission import prepare, start
from mimscale import console
from mimscale.config import build_config, config_tree, parse_yaml
from mimscale.errors import INTERRUPTED_EXIT_CODE, DataError, LaunchError, LostRankError, MimscaleError
from mimscale.evaluate.config import EvaluateConfig
from mimscale.lock import sole_writer
from mimscale.report.study import StudyView
from mimscale.study.config import StudyConfig, load_study
from mimscale.study.graph import Graph, Node, expand
from mimscale.study.nodes import absent_data, data_problems, leaks, resolve
from mimscale.study.view import NodeState, study_view, write_study_report
from mimscale.train.run_dir import RunDir

POLL_S = 0.5
# The same command goes on after these: stopped by request, or a process was killed.
GOES_ON = (INTERRUPTED_EXIT_CODE, LostRankError.exit_code)
DATA_VERBS = ("cohort", "ingest")  # that make what is trained, validated and tested on
TRAINING_VERBS = ("pretrain", "finetune")
AHEAD = ("running", "queued")


@dataclass
class Study:
    """A study at work: its graph, and what its nodes have come to."""

    config: StudyConfig
    graph: Graph
    profile: Profile
    nodes: int = 1  # of the cluster, a training node
    retry: bool = False  # try failed nodes again
    states: dict[str, NodeState] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)  # by this command
    refused: dict[str, str] = field(default_factory=dict)  # node -> why this command could not start it
    jobs: dict[str, JobFolder] = field(default_factory=dict)  # node -> its newest submission, of the last look
    lost: set[str] = field(default_factory=set)  # nodes whose job is gone without an outcome
    silent: str | None = None  # why Slurm said nothing
    _causes: dict[str, str] = field(default_factory=dict)  # node that is left out -> why
    # What cannot change while this command works, and would take long to find out again and again.
    _final: dict[str, NodeState] = field(default_factory=dict)
    _wrong: dict[tuple[str, str], MimscaleError | None] = field(default_factory=dict)  # config or plan, node
    _leaks: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of the study."""
        return self.config.run_dir.absolute()

    def look(self) -> dict[str, NodeState]:
        """What every node has come to, stores first and parents before what needs them."""
        newest = {node.id: self._newest(node) for node in self.graph.nodes.values() if node.id not in self._final}
        self.jobs = {node_id: folder for node_id, folder in newest.items() if folder is not None}
        cluster = ask_cluster(self.jobs.values())
        self.states, self.lost, self.silent, self._causes = {}, set(), cluster.silent, {}
        # A pretraining is asked about stores that only what comes after it reads.
        for node in sorted(self.graph.nodes.values(), key=lambda node: node.verb not in DATA_VERBS):
            state = self._final.get(node.id) or self._state(node, newest[node.id], cluster)
            if state.name in ("done", "failed"):
                self._final[node.id] = state
            self.states[node.id] = state
        return self.states

    def _state(self, node: Node, newest: JobFolder | None, cluster: Cluster) -> NodeState:
        if (error := self._error_of("config", node)) is not None:
            return NodeState("failed", str(error), error.exit_code)
        state = self._submitted(node, newest, cluster)
        if state.name == "done" and node.verb == "ingest":
            problems = data_problems(self.config, self.graph, self.folder, node.id)
            return NodeState("failed", "; ".join(problems), DataError.exit_code) if problems else state
        if state.name in ("done", "failed", "running"):
            return state
        needed = [*node.parents, *(self._stores_behind(node) if node.verb == "pretrain" else ())]
        missing = [parent for parent in needed if self.states[parent].name in ("failed", "left out")]
        if missing:
            why = self._causes[node.id] = self._why_without(missing[0])
            if state.name == "queued":  # it waits there for the new job of its parent, when that is tried again
                why += f"; job {self.jobs[node.id].read().job_id} stays in the queue for --retry"
            return NodeState("left out", why)
        if state.name == "queued":
            return state
        if node.id in self.refused:
            return NodeState("failed", self.refused[node.id], 1)
        # What can be computed on no such number of ranks is said before anything is started.
        if node.verb in TRAINING_VERBS and (error := self._error_of("plan", node)) is not None:
            return NodeState("failed", str(error), error.exit_code)
        if node.verb == "pretrain" and self._may_be_checked(node):
            if node.id not in self._leaks:
                self._leaks[node.id] = leaks(self.config, self.graph, self.folder, node)
            if self._leaks[node.id]:
                return NodeState("failed", self._leaks[node.id], DataError.exit_code)
        return state

    def _error_of(self, part: Literal["config", "plan"], node: Node) -> MimscaleError | None:
        """What is wrong with the config or the plan of a node; found out once."""
        key = (part, node.id)
        if key not in self._wrong:
            try:
                (self._resolve if part == "config" else self.plan)(node)
                self._wrong[key] = None
            except MimscaleError as error:
                self._wrong[key] = error
        return self._wrong[key]

    def _resolve(self, node: Node) -> Any:
        return resolve(self.graph, self.folder, node)

    def _submitted(self, node: Node, newest: JobFolder | None, cluster: Cluster) -> NodeState:
        run = self._run_dir(node)
        status = None if newest is None else status_of(run, newest, cluster, time.time())
        if status is not None and status.state == "lost":
            self.lost.add(node.id)
        # A run is finished some seconds before its processes are gone.
        if status is not None and status.state in ("running", "queued", "unknown"):
            return NodeState("queued" if status.state == "queued" else "running", status.reason)
        if node.verb in TRAINING_VERBS:
            trained = run.read_outcome()
            ended = 0 if trained is None or trained.outcome != "finished" else trained.step
            if ended and ended >= self._resolve(node).steps:
                return NodeState("done", "")
        if newest is None or status is None:
            return NodeState("to do", "")
        if node.verb == "evaluate" and not self._is_scored_by(node, newest):
            return NodeState("to do", "")
        outcome = newest.read_outcome()
        if outcome is None or status.state == "cancelled":
            return NodeState("to do", status.reason)
        if outcome.exit_code == 0:
            return NodeState("done", "")
        reason = self._reason(newest, outcome.message)
        if outcome.exit_code in GOES_ON or (self.retry and node.id not in self.started):
            return NodeState("to do", reason)
        return NodeState("failed", reason, outcome.exit_code)

    def _is_scored_by(self, node: Node, newest: JobFolder) -> bool:
        """Whether an evaluation of a run was one by this node's config, and not by that of an earlier recipe."""
        try:
            before = build_config(EvaluateConfig, parse_yaml(newest.config.read_text(), str(newest.config)), node.label)
        except MimscaleError:  # of another version
            return False
        return _as_scored(before) == _as_scored(self._resolve(node))

    def _reason(self, folder: JobFolder, message: str) -> str:
        """Why a node failed: what its first rank printed, where the launcher only knows its exit code."""
        log = folder.rank_log(str(folder.read().job_id), 0)
        printed = last_message(log.read_text(errors="replace")) if log.exists() else ""
        return printed if printed and "its log says why" in message else message

    def _why_without(self, node_id: str) -> str:
        """Why what needs a node is left out: the node that failed, however far above it is."""
        label, state = self.graph.nodes[node_id].label, self.states[node_id]
        return self._causes.get(node_id) or f"{label} has no result: {state.reason}"

    def _newest(self, node: Node) -> JobFolder | None:
        folders = [folder for folder in job_folders(self._run_dir(node).logs) if folder.read().verb == node.verb]
        return folders[-1] if folders else None

    def _run_dir(self, node: Node) -> RunDir:
        return RunDir(JOB_VERBS[node.verb].place(self.graph.config_of(self.folder, node)))

    def _stores_behind(self, node: Node) -> list[str]:
        """Every store, as a node, that the results of a pretraining are trained, validated or tested on."""
        wanted = {node.id}.union(*({t.finetune, t.evaluate} for t in self.graph.trials if t.pretrain == node.id))
        parents = {parent for one in wanted for parent in self.graph.nodes[one].parents}
        return [parent for parent in parents if self.graph.nodes[parent].verb in DATA_VERBS]

    def _may_be_checked(self, node: Node) -> bool:
        """Whether all is there that tells if a pretraining reads what others are tested on."""
        return all(self.states[store].name == "done" for store in self._stores_behind(node))

    @cached_property
    def _accelerator(self) -> Accelerator:
        """Found out once: it may ask the driver, and there are hundreds of nodes."""
        return resolve_accelerator(self.profile, os.environ)

    def plan(self, node: Node) -> Plan:
        """The submission of a node.

        Raises:
            MimscaleError: it cannot be submitted so.
        """
        profile, trains = replace(self.profile, accelerator=self._accelerator), node.verb in TRAINING_VERBS
        tree = config_tree(self._resolve(node))
        if profile.executor != "slurm" and profile.threads_per_process is None:
            at_once = self.config.workers * (self.config.processes if trains else 1)
            profile = replace(profile, threads_per_process=max(1, len(os.sched_getaffinity(0)) // at_once))
            if node.verb == "evaluate" and tree["threads"] is None:
                tree["threads"] = profile.threads_per_process
        return make_plan(
            node.verb,
            tree,
            profile,
            nodes=self.nodes if trains else 1,
            processes=self.config.processes if trains and profile.executor != "slurm" else None,
        )

    def ready(self, *, submitted_parents: bool) -> list[Node]:
        """Nodes that can be started now: with all parents done, or, on Slurm, submitted."""
        return [node for node in self.graph.nodes.values() if self.may_start(node, submitted_parents=submitted_parents)]

    def may_start(self, node: Node, *, submitted_parents: bool) -> bool:
        """Whether a node can be started now: with all parents done, or, on Slurm, submitted."""
        enough = ("done", *AHEAD) if submitted_parents else ("done",)
        return (
            self.states[node.id].name == "to do"
            and node.id not in self.started
            and all(self.states[parent].name in enough for parent in node.parents)
            and (node.verb != "pretrain" or self._may_be_checked(node))
        )


def _as_scored(config: EvaluateConfig) -> tuple[EvaluateConfig, tuple[str, ...]]:
    """What decides the scores: not where the study lies, which may have moved, nor how many threads there were."""
    store = () if config.store is None else config.store.parts[-2:]
    return replace(config, run_dir=Path(), out=None, store=None, threads=None, device="auto"), store


def run_here(study: Study) -> bool:
    """Run all nodes on this machine, several at once; returns whether it was asked to stop before the end.

    Raises:
        LaunchError: another command runs this study.
    """
    asked: list[signal.Signals] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    before = {number: signal.signal(number, remember) for number in JOB_SIGNALS}
    try:
        with sole_writer(study.folder / "lock.json", "mimscale study"):
            passed_on = 0
            while True:
                states = study.look()
                running = [node_id for node_id, state in states.items() if state.name == "running"]
                if len(asked) > passed_on:
                    passed_on = len(asked)
                    # The second request ends at once what the first let save.
                    _signal_nodes(study, running, signal.SIGUSR2 if passed_on == 1 else signal.SIGINT)
                ready = [] if asked else study.ready(submitted_parents=False)[: study.config.workers - len(running)]
                for node in ready:
                    _start_here(study, node)
                if not running and not ready:
                    return bool(asked)
                time.sleep(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_here(study: Study, node: Node) -> None:
    study.started.add(node.id)
    done = sum(state.name == "done" for state in study.states.values())
    console.say(f"[{done} of {len(study.graph.nodes)} done] {node.label} ({node.id})")
    # A signal that comes now waits until the node is recorded; its supervisor starts with these blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        plan = study.plan(node)
        folder = prepare(plan, fresh=False)
        start(plan, folder, [node.verb, str(folder.config)])
    except MimscaleError as error:
        study.refused[node.id] = str(error)
        console.say(f"{node.label}: {error}")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)


def _signal_nodes(study: Study, node_ids: Sequence[str], number: signal.Signals) -> None:
    for node_id in node_ids:
        folder = study._newest(study.graph.nodes[node_id])
        supervisor = folder.read().supervisor if folder else None
        if supervisor is not None and supervisor.is_alive():
            with suppress(ProcessLookupError):
                os.kill(supervisor.pid, number)
    console.say(f"asked {len(node_ids)} node(s) to {'save and stop' if number == signal.SIGUSR2 else 'end at once'}")


def parser() -> argparse.ArgumentParser:
    """The command line of `mimscale study`."""
    parser = argparse.ArgumentParser(
        prog="mimscale study",
        description="Run an experiment: many runs by one plan, and a report. The same command continues it.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="the study's RECIPE, run_dir=DIR, key=value overrides")
    parser.add_argument("--profile", default="local", metavar="NAME_OR_FILE", help="where to run (default: local)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of each training job on Slurm (default: 1)")
    parser.add_argument("--retry", action="store_true", help="try nodes again that have failed")
    parser.add_argument("--inside-allocation", action="store_true", help="submit although this shell is itself a job")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="show the graph and the state of each node, start none")
    how.add_argument("--wait", action="store_true", help="on Slurm: stay, and submit what can start, until all is over")
    parser.add_argument("--json", action="store_true", help="nodes with their state, and the tables, on stdout")
    return parser


def main(argv: list[str]) -> int:
    """`mimscale study RECIPE run_dir=DIR [--profile P] [--dry-run] [--json]`; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    config, profile = load_study(arguments.words), load_profile(arguments.profile)
    study = Study(config, expand(config), profile, nodes=arguments.nodes, retry=arguments.retry)
    if problems := data_problems(config, study.graph, study.folder):
        raise DataError("\n  ".join(["the data are not what the study takes them for:", *problems]))
    stopped, report = False, None
    if arguments.dry_run:
        study.look()
    elif profile.executor == "slurm":
        from launch.study_slurm import stay, submit_all

        if not arguments.inside_allocation:
            refuse_inside_allocation(os.environ)
        if not arguments.wait:
            submit_all(study)
        elif (number := stay(study, lambda: _write_report(study))) is not None:
            return 128 + number
    else:
        stopped = run_here(study)
    if not arguments.dry_run and (profile.executor != "slurm" or arguments.wait):
        stopped = stopped or any(state.name in ("to do", *AHEAD) for state in study.states.values())
    view = study_view(config, study.graph, study.folder, study.states)
    if not arguments.dry_run:
        report = write_study_report(view, study.folder)
    _show(study, view, report, everything=arguments.dry_run)
    for absent in absent_data(study.graph) if arguments.dry_run else []:  # last, where it is seen below a long table
        console.say(f"{absent}; a study that starts here needs it")
    if arguments.json:
        console.print_json(_result(study, view, report))
    if study.silent is not None and not arguments.dry_run:
        return LaunchError.exit_code
    return exit_code(study.states, stopped=stopped)


def _write_report(study: Study) -> None:
    write_study_report(study_view(study.config, study.graph, study.folder, study.states), study.folder)


def exit_code(states: Mapping[str, NodeState], *, stopped: bool) -> int:
    """75 when there is more to do, else the code of the first node that failed, else 0."""
    failed = [state.exit_code for state in states.values() if state.name == "failed"]
    if stopped:
        return INTERRUPTED_EXIT_CODE
    return failed[0] if failed else 0


def _show(study: Study, view: StudyView, report: Path | None, *, everything: bool) -> None:
    counts: dict[str, int] = {}
    for state in study.states.values():
        counts[state.name] = counts.get(state.name, 0) + 1
    place = view.nodes.columns.index("state")
    rows = [row for row in view.nodes.rows if everything or row[place] != "done"]
    if rows:
        console.print_table(study.config.title, view.nodes.columns, rows)
    console.say(", ".join(f"{count} {name}" for name, count in counts.items()))
    for table in view.tables if any(state.name == "done" for state in study.states.values()) else []:
        console.print_table(table.title, table.columns, table.rows)
    if report is not None:
        console.say(f"report: {report}")


def _result(study: Study, view: StudyView, report: Path | None) -> dict[str, Any]:
    return {
        "nodes": [
            {
                "id": node.id,
                "verb": node.verb,
                "label": node.label,
                "parents": list(node.parents),
                "folder": str(study.graph.folder(study.folder, node)),
                "state": study.states[node.id].name,
                "reason": study.states[node.id].reason,
            }
            for node in study.graph.nodes.values()
        ],
        "tables": [asdict(table) for table in view.tables],
        "report": None if report is None else str(report),
    }
