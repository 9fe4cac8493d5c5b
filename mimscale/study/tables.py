"""The tables of a study's report: all formatting of its numbers happens here."""

from collections.abc import Sequence
from pathlib import Path

from mimscale.report.study import Table
from mimscale.study.comparisons import Comparison
from mimscale.study.config import StudyConfig
from mimscale.study.results import Group, Targets
from mimscale.study.statistics import Interval, Ratio, RatioInterval, Spread, Time, median_time, spread

NOTHING = "n/a"
_TIMES_SOONER = (
    " Times sooner: steps (or seconds of computing) of the other arm over those of this one until validation Dice "
    "reaches the target, medians over the runs with fine-tuning seeds that both have; at least or at most where half "
    "of an arm's runs or more never reach it. In brackets the interval, from the same draws of seeds; an end of it is "
    "at least or at most a number, or unknown, where that is so of the draws that decide it. The target is held fixed, "
    "and a time is that of the validation at which it was reached. Where an arm has runs of one seed alone there is no "
    "interval. There is no ratio where the two are validated on other crops or volumes, whose Dice is another quantity."
)
_OF_WHICH_VOLUMES = ("split", "store")
_SAID_OF_SCORING = ("crop_voxels", "overlap", "blending", "flips", "nsd_tolerance_mm")


def heading(experiment: str) -> str:
    """The name of an experiment, for people."""
    return experiment.replace("_", " ").capitalize()


def score_table(groups: Sequence[Group], folds: int | None = None) -> Table:
    """Scores of every arm and setting.

    Args:
        groups: of an experiment.
        folds: how many of them are in each group; None where its settings are no folds.
    """
    rows, has_best = [], any(group.best().count for group in groups)
    for group in groups:
        best = [result.best_validation for result in group.results if result.best_validation is not None]
        rows.append(
            [
                group.arm,
                group.setting,
                f"{sum(result.scores is not None for result in group.results)} of {group.planned}",
                _spread(group.spread("dice")),
                *([_spread(group.best())] if has_best else []),
                _spread(group.spread("dice", background=True)),
                *([_spread(group.best(background=True))] if has_best else []),
                _spread(group.spread("hd95_mm"), 2),
                _spread(group.spread("nsd")),
                _spread(group.last_validation),
                _spread(spread([value for _, value in best])),
            ]
        )
    return Table(
        title="Scores of the last checkpoint",
        columns=[
            "arm",
            "setting",
            "runs",
            "Dice",
            *(["Dice, best on validation"] if has_best else []),
            "Dice with background",
            *(["Dice with background, best on validation"] if has_best else []),
            "HD95, mm",
            "NSD",
            "validation Dice, last",
            "validation Dice, best",
        ],
        rows=rows,
        note=f"Mean +/- standard deviation over runs, {_runs_differ(folds)} Each run is scored on whole volumes, on "
        "the grid and against the labels of the source files; a mean over classes leaves out the background unless it "
        "says otherwise. A class that a run misses or invents has Dice and NSD 0 there and no HD95, which is then a "
        f"mean over fewer. NSD counts surface voxels, not area.{_scoring(groups)} "
        "Validation Dice is that of fixed crops; the best of it chose nothing"
        + (" but the checkpoint of the columns that name it, which looks better than it is." if has_best else "."),
        text_columns=2,
    )


def _runs_differ(folds: int | None) -> str:
    """By what the runs of a group do, and so what their deviation is one of."""
    if folds is None:
        return "which differ by their seeds."
    return (
        f"which differ by their fold, of {folds}, and within a fold by their seeds. A run is trained without the "
        "volumes of its fold and scored on these alone: most of the deviation is how much harder one fold is than "
        "another. It is none of seeds, and does not say how sure the mean is."
    )


def _scoring(groups: Sequence[Group]) -> str:
    """How whole volumes were scored, in a sentence; where groups differ in it, only what they share."""
    keys = (*_OF_WHICH_VOLUMES, *_SAID_OF_SCORING)
    shared: set[tuple[str, str]] | None = None
    for settings in (result.scores["settings"] for group in groups for result in group.results if result.scores):
        said = {(key, str(settings[key])) for key in keys if settings.get(key) not in (None, [])}
        shared = said if shared is None else shared & said
    values = dict(shared or ())
    said_of_all = [f"{key} {values[key]}" for key in _SAID_OF_SCORING if key in values]
    if "split" in values:
        where = f"in {Path(values['store']).name}" if "store" in values else "of each run's own store"
        said_of_all = [f"the volumes to {values['split']} {where}", *said_of_all]
    return f" Scoring: {', '.join(said_of_all)}." if values else ""


def comparison_table(config: StudyConfig, found: Sequence[Comparison], folds: int | None = None) -> Table:
    """Differences and ratios of times with their intervals.

    Args:
        config: of the study.
        found: what was compared.
        folds: how many of them are in each group; None where its settings are no folds.
    """
    level = f"{100 * config.bootstrap.level:g} % interval"
    rows = [
        [
            one.ours.name,
            one.theirs.name,
            signed(one.dice.difference),
            interval_text(one.dice),
            f"{seeds_text(one.dice)}, {one.dice.cases} cases" if one.dice.cases else NOTHING,
            with_interval(one.steps),
            with_interval(one.seconds),
        ]
        for one in found
    ]
    return Table(
        title="Differences",
        columns=[
            "arm",
            "against",
            "difference in Dice",
            level,
            "seeds and cases",
            "times sooner at the target, steps",
            "times sooner, pretraining included",
        ],
        rows=rows,
        note=_how_drawn(config, folds) + _TIMES_SOONER,
        text_columns=2,
    )


def _how_drawn(config: StudyConfig, folds: int | None) -> str:
    """What an interval is."""
    of_folds = (
        f" All {folds} folds are in every replicate, so that they differ is not in the interval." if folds else ""
    )
    return (
        f"Paired percentile bootstrap, {config.bootstrap.replicates} replicates: pretraining seeds, fine-tuning seeds "
        "and cases are drawn, the same for both arms. One draw of fine-tuning seeds holds for all pretraining seeds, "
        "since each of them is fine-tuned with the same ones; so does one draw of cases for all runs."
        f"{of_folds} Seeds: of pretraining, where any arm has them, x of fine-tuning. Of two or three seeds an "
        "interval is rather too narrow, and none is corrected for how many there are."
    )


def time_table(groups: Sequence[Group], targets: Targets) -> Table:
    """Steps until validation Dice reached the target."""
    rows = []
    for group in groups:
        times = group.times(targets)
        if not times:
            continue
        rows.append(
            [
                group.arm,
                group.setting,
                _from_to([targets[result.trial] for result in group.results if result.trial in targets]),
                time_text(median_time(times)),
                time_text(median_time(group.seconds_to(targets))),
                f"{sum(time.censored for time in times)} of {len(times)}",
                ", ".join(time_text(time) for time in times),
            ]
        )
    return Table(
        title="Steps to the target",
        columns=["arm", "setting", "target", "steps, median", "seconds, median", "never reached", "each run"],
        rows=rows,
        note="The first validation at which Dice is at least the target; > means later than that: the run ended there. "
        "Seconds: of computing, pretraining included. A median of an even number of runs is the mean of the middle "
        "two. Each fold has a target of its own; an arm has none while the one that sets it has no run by its plan.",
        text_columns=2,
    )


def _from_to(values: Sequence[float]) -> str:
    """Values that may all be one."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def class_tables(groups: Sequence[Group]) -> list[Table]:
    """Scores of each class: a table a metric, with a column for each arm and setting."""
    scored = [group for group in groups if any(result.scores for result in group.results)]
    names = list(
        dict.fromkeys(name for group in scored for r in group.results if r.scores for name in r.scores["classes"])
    )
    tables = []
    for metric, title, digits in (
        ("dice", "Dice of each class", 3),
        ("hd95_mm", "HD95 of each class, mm", 2),
        ("nsd", "NSD of each class", 3),
    ):
        rows = [[name, *(_spread(group.class_spread(name, metric), digits) for group in scored)] for name in names]
        rows = [row for row in rows if set(row[1:]) != {NOTHING}]  # HD95 and NSD are of no background
        tables.append(Table(title=title, columns=["class", *(group.name for group in scored)], rows=rows))
    return tables


def _spread(value: Spread, digits: int = 3) -> str:
    if value.mean is None:
        return NOTHING
    return f"{value.mean:.{digits}f}" + ("" if value.std is None else f" +/- {value.std:.{digits}f}")


def three(value: float | None) -> str:
    """A score."""
    return NOTHING if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference of scores."""
    return NOTHING if value is None else f"{value:+.3f}"


def interval_text(interval: Interval) -> str:
    """An interval in brackets."""
    return NOTHING if interval.low is None else f"[{signed(interval.low)}, {signed(interval.high)}]"


def ratio_text(ratio: Ratio) -> str:
    """A ratio of times, and whether it is only a bound."""
    return NOTHING if ratio.value is None else f"{ratio.bound} {ratio.value:.2f}".strip()


def with_interval(one: RatioInterval) -> str:
    """A ratio of times and, where there is one, its interval in brackets."""
    if one.low is None or one.high is None:
        return ratio_text(one.ratio)
    low, high = (ratio_text(end) if end.value is not None else "unknown" for end in (one.low, one.high))
    return f"{ratio_text(one.ratio)} [{low}, {high}]"


def seeds_text(interval: Interval | RatioInterval) -> str:
    """How many seeds, of pretraining x of fine-tuning; the latter alone where no arm was pretrained."""
    return " x ".join(str(count) for count in (interval.pretrain_seeds, interval.finetune_seeds) if count)


def time_text(time: Time | None) -> str:
    """A time, and whether it only was not yet then."""
    return NOTHING if time is None else f"{'> ' if time.censored else ''}{time.value:.0f}"
