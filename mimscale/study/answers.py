"""The sentences of a study's report: what was asked, and what the differences say, no more than their seeds carry."""

from collections.abc import Sequence

from mimscale.study.comparisons import Comparison
from mimscale.study.config import ExperimentConfig
from mimscale.study.statistics import Interval, RatioInterval
from mimscale.study.tables import interval_text, seeds_text, signed, with_interval

ENOUGH_SEEDS = 3  # of each kind, for a sentence about others than these


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
    elif one.ours_times and one.theirs_times:
        reached = [[not time.censored for time in times] for times in (one.ours_times, one.theirs_times)]
        if any(map(any, reached)):
            said = " and ".join(f"{sum(runs)} of {len(runs)}" for runs in reached)
            text += f"; {said} runs reach the target, too few to say how soon"
        else:
            text += "; neither reaches the target"
    return text + "."


def _sooner(ratio: RatioInterval) -> str:
    if ratio.low is None:
        return "of unknown certainty"
    said = {"sooner": "sooner", "later": "later", "nothing": "not shown to differ"}[ratio.shows]
    return said + _of_few_seeds(ratio)


def _of_few_seeds(interval: Interval | RatioInterval) -> str:
    """Resampling one seed gives that seed again, and of two every other draw is of one: seeds differ by more."""
    counts = [interval.finetune_seeds, *([interval.pretrain_seeds] if interval.pretrain_seeds else [])]
    if interval.shows == "nothing" or min(counts) >= ENOUGH_SEEDS:
        return ""
    plural = "" if counts == [1] else "s"
    seeds = f"{seeds_text(interval)} {'' if interval.pretrain_seeds else 'fine-tuning '}seed{plural}"
    return f" for {seeds}, too few to speak of others"
