"""An arm that gets as much pretraining time as another one, instead of as many crops.

How many steps that is depends on the machine, so it is derived from what the study itself has measured on it: the time
of the other arm's pretraining, and the step time of the arm's own pretraining with as many crops. Both runs are nodes
of the study, finished before this one starts; so the steps follow from files that do not change any more.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.report.facts import RunFacts, read_run
from mimscale.train.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class MatchedSteps:
    """Steps of a pretraining, and the figures that they follow from."""

    steps: int
    of_steps: int  # with as many crops as the other arm
    time_s: float  # the other arm's computing time: median step x steps
    step_s: float  # median of this arm


def steps_in_time_of(other: str, own: str, steps: int) -> dict[str, Any]:
    """What stands for the number of steps in a node's config, until both runs have been measured.

    Args:
        other: node of the arm whose time is given.
        own: node of the same pretraining with as many crops, which takes `steps`.
        steps: of it.
    """
    return {"in_the_time_of": f"@{other}", "at_the_rate_of": f"@{own}", "instead_of": steps}


def is_matched(config: dict[str, Any]) -> bool:
    """Whether the steps of a node's config follow from what other nodes measure."""
    return isinstance(config.get("steps"), dict)


def measured_steps(config: dict[str, Any]) -> MatchedSteps | None:
    """The steps of a config with real folders in it; None before both runs are finished."""
    rule = config["steps"]
    other, own = _finished(Path(rule["in_the_time_of"])), _finished(Path(rule["at_the_rate_of"]))
    if other is None or own is None:
        return None
    time_s, step_s = compute_s(other), own.percentile("step_s", 50)
    if time_s is None or not step_s:
        return None
    return MatchedSteps(
        steps=max(1, round(time_s / step_s)), of_steps=int(rule["instead_of"]), time_s=time_s, step_s=step_s
    )


def with_steps(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a number of steps, and a warm-up that is the same part of them.

    Before it is measured, the steps are those with as many crops: enough to see whether the config is a right one.
    """
    found, wanted = measured_steps(config), int(config["steps"]["instead_of"])
    if found is None:
        return {**config, "steps": wanted}
    optim = dict(config.get("optim") or {})
    if "warmup_steps" in optim:
        optim["warmup_steps"] = round(optim["warmup_steps"] * found.steps / wanted)
    return {**config, "steps": found.steps, "optim": optim}


def compute_s(run: RunFacts) -> float | None:
    """Computing time of a run: median step time x steps that were done."""
    step_s = run.percentile("step_s", 50)
    return None if step_s is None else step_s * run.last_step


def _finished(folder: Path) -> RunFacts | None:
    outcome = RunDir(folder).read_outcome()
    return read_run(folder) if outcome is not None and outcome.outcome == "finished" else None
