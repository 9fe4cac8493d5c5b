"""The sentences of a study's report: what was asked, and what the differences say, no more than their seeds carry."""

from collections.abc import Sequence

from mimscale.study.config import ExperimentConfig
from mimscale.study.results import Comparison
from mimscale.study.statistics import Interval, RatioInterval
from mimscale.study.tables import interval_text, seeds_text, signed, with_interval


def question(recipe: ExperimentConfig) -> str:
    """What an experiment asks, and what the paper says about it."""
    if not recipe.claim:
        return recipe.question
    value = "" if recipe.paper_value is None else f" ({recipe.paper_value:g})"
    return f"{recipe.question} The paper: {recipe.claim}{value}."


def answers(found: Sequence[Comparison]) -> list[str]:
    """A sentence for each comparison that is measured, and how many are not."""
    if not found:
        return ["One arm under one setting: there is nothing to compare."]
    measured = [answer(one) for one in found if one.dice.difference is not None]
    missing = len(found) - len(measured)
    if missing:
        measured.append(f"{missing} of {len(found)} comparisons are not measured yet.")
    return measured


def answer(one: Comparison) -> str:
    """How much higher one group ends than another, and how much sooner it reaches the target."""
    interval = one.dice
    said = {
        "higher": "higher",
        "lower": "lower",
        "nothing": "not shown to differ: the interval holds 0" if interval.low is not None else "of unknown certainty",
    }[interval.shows]
    difference = f"Dice {signed(interval.difference)} {interval_text(interval)}"
    text = f"{one.ours.name} against {one.theirs.name}: {difference}, {said}{_of_few_seeds(interval)}"
    if one.steps.ratio.value is not None:
        text += f"; the target is reached {with_interval(one.steps)} times as fast in steps, {_sooner(one.steps)}"
        if one.seconds.ratio.value is not None:
            text += f", and {with_interval(one.seconds)} with the time of pretraining, {_sooner(one.seconds)}"
    elif one.target is not None:
        text += "; neither reaches the target"
    return text + "."


def _sooner(ratio: RatioInterval) -> str:
    if ratio.low is None:
        return "of unknown certainty"
    said = {"sooner": "sooner", "later": "later", "nothing": "not shown to differ"}[ratio.shows]
    return said + _of_few_seeds(ratio)


def _of_few_seeds(interval: Interval | RatioInterval) -> str:
    """Resampling one seed gives that seed again: the interval is one of other things, and seeds differ by more."""
    if interval.shows == "nothing" or 1 not in (interval.pretrain_seeds, interval.finetune_seeds):
        return ""
    seeds = f"{seeds_text(interval)} seeds" if interval.pretrain_seeds else "one fine-tuning seed"
    return f" for {seeds}, too few to speak of others"
