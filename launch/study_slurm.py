"""A study on Slurm: submit what can wait in the queue, and with --wait stay until all is over.

Training is not submitted before its data are there: what they are decides whether it may start at all. So a study takes
several submissions, of which --wait makes all and a plain command those that are possible now.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from launch.dependents import NoOutcomeError
from launch.folder import LOST_S
from launch.jobs import JOB_SIGNALS
from launch.slurm_commands import SlurmSilentError, require_sbatch
from launch.status import NEVER_STARTS
from launch.study import AHEAD, DATA_VERBS, Study
from launch.submission import submit_batch
from mimscale import console
from mimscale.errors import MimscaleError
from mimscale.lock import sole_writer
from mimscale.study.graph import Node
from mimscale.study.view import NodeState

POLL_S = 1.0  # how often it is asked whether a job has written its outcome
QUEUE_EVERY_S = 15.0  # how often Slurm is asked; more often annoys a controller that many users ask
SILENT_EVERY_S = 5.0  # how often, while it does not answer
OVER = ("done", "failed", "left out")


def submit_all(study: Study) -> int:
    """Submit every node that can be submitted now, each to wait for its parent; returns how many.

    Training waits until its data are there, because what they are is checked before anything trains on them; a
    pretraining of as long as another one takes waits until that is known.
    """
    study.look()
    count = _submit_ready(study)
    if study.silent is not None:
        console.say(f"Slurm does not answer ({study.silent}); give the same command again when it does")
    later = sum(state.name == "to do" for state in study.states.values())
    if later and any(state.name in AHEAD for state in study.states.values()):
        console.say(
            f"{count} job(s) submitted; the other {later} need what these make: give the same command again after they "
            "have ended, or now with --wait"
        )
    elif count:
        console.say(f"{count} job(s) submitted; the same command, once they have ended, writes the final report")
    return count


def _submit_ready(study: Study) -> int:
    count = 0
    for node in list(study.graph.nodes.values()):
        if study.silent is not None:
            break
        if not study.may_start(node, submitted_parents=True):
            continue
        waiting = [study.graph.nodes[p] for p in node.parents if study.states[p].name != "done"]
        if node.verb not in DATA_VERBS and any(p.verb in DATA_VERBS for p in waiting):
            continue
        # A dependency is one job; what needs several that are not over comes after them.
        if len(waiting) > 1 or (waiting and node.waits_for_results):
            continue
        count += _submit(study, node, waiting[0] if waiting else None)
    return count


def _submit(study: Study, node: Node, parent: Node | None) -> bool:
    after = None if parent is None else study.graph.folder(study.folder, parent)
    verb = None if parent is None else parent.verb
    try:
        plan = study.plan(node)
        with _uninterrupted():
            folder, job_id = submit_batch(plan, [node.verb, node.id], fresh=False, after=after, after_verb=verb)
    except SlurmSilentError as error:
        study.silent = str(error)
        return False
    except NoOutcomeError as error:  # it ended a moment ago: the next look tells how
        console.say(f"{node.label}: not yet: {error}")
        return False
    except MimscaleError as error:
        study.started.add(node.id)
        study.refused[node.id] = str(error)
        study.states[node.id] = NodeState("failed", str(error), error.exit_code)
        console.say(f"{node.label}: {error}")
        return False
    study.started.add(node.id)
    study.jobs[node.id] = folder
    study.states[node.id] = NodeState("queued", f"job {job_id}")
    console.say(f"job {job_id}: {node.label} ({folder.run.path})")
    return True


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a signal wait until a job that Slurm has taken is recorded. sbatch starts with these blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stay(study: Study, write_report: Callable[[], None]) -> signal.Signals | None:
    """Submit whatever can be, and wait, until nothing is under way; returns the signal that ended it before.

    Jobs are left alone by such a signal. A Slurm that does not answer is waited for.

    Args:
        study: what is done.
        write_report: called whenever nodes have come to their end and others have not.

    Raises:
        LaunchError: no sbatch here, or another command stays with this study.
    """
    require_sbatch()
    with ExitStack() as stack:
        asked = stack.enter_context(_remembered_signals())
        stack.enter_context(sole_writer(study.folder / "lock.json", "mimscale study --wait"))
        watch = _Watch(study)
        while not asked:
            study.look()
            # What a person ends from now on stays ended.
            study.started.update(node for node, state in study.states.items() if state.name in AHEAD)
            count = 0 if study.silent is not None else _submit_ready(study)
            if asked:
                break
            news = watch.tell()
            if not count and not watch.expects_more():
                return None
            if news:
                write_report()
            _pause(study, asked)
        console.say(
            "left: the jobs go on, and the same command goes on with the study; `mimscale status "
            f"{study.folder}/nodes` shows them"
        )
        return asked[0]


@contextmanager
def _remembered_signals() -> Iterator[list[signal.Signals]]:
    """Signals that have come: the first is remembered, the second ends what is under way."""
    asked: list[signal.Signals] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number))

    before = {number: signal.signal(number, remember) for number in JOB_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """What a person has been told."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._told: dict[str, str] = {}  # node -> state
        self._silent = False
        self._changed_s = time.monotonic()

    def tell(self) -> bool:
        """Say what has changed since the last call; returns whether a node has come to its end."""
        study, states = self._study, self._study.states
        if study.silent is not None:
            if not self._silent:
                console.say(f"Slurm does not answer ({study.silent}); waiting for it, jobs go on")
        elif self._silent:
            console.say("Slurm answers again")
        self._silent = study.silent is not None
        over = False
        for node in study.graph.nodes.values():
            state, before = states[node.id], self._told.get(node.id)
            # Nobody knows what runs while Slurm is silent.
            if state.name == before or (self._silent and state.name == "running"):
                continue
            self._told[node.id] = state.name
            self._changed_s = time.monotonic()
            over |= state.name in OVER
            if before is not None and state.name != "queued":
                self._say_change(node, state)
        return over

    def _say_change(self, node: Node, state: NodeState) -> None:
        done = sum(state.name == "done" for state in self._study.states.values())
        why = f": {state.reason}" if state.reason and state.name != "running" else ""
        console.say(f"[{done} of {len(self._study.graph.nodes)} done] {node.label}: {state.name}{why}")

    def expects_more(self) -> bool:
        """Whether anything is under way, or may be."""
        study = self._study
        if study.silent is not None or any(_will_end(study)):
            return True
        return bool(study.lost) and time.monotonic() - self._changed_s < LOST_S


def _will_end(study: Study) -> list[str]:
    """Nodes that run, or wait for nothing but such and the queue: not what waits for a job that was ended."""
    found: list[str] = []
    for node in study.graph.nodes.values():
        name = study.states[node.id].name
        starts = not study.states[node.id].reason.startswith(NEVER_STARTS) and all(
            study.states[parent].name == "done" or parent in found for parent in node.parents
        )
        if name == "running" or (name == "queued" and starts):
            found.append(node.id)
    return found


def _pause(study: Study, asked: list[signal.Signals]) -> None:
    """Until a job has ended, as far as its folder says, or it is time to ask Slurm again."""
    ahead = [folder for node, folder in study.jobs.items() if study.states[node].name in AHEAD]
    deadline_s = time.monotonic() + (QUEUE_EVERY_S if study.silent is None else SILENT_EVERY_S)
    while not asked and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        if any(folder.read_outcome() is not None for folder in ahead):
            return
