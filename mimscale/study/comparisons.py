"""Two arms, or two settings of one, on what both have: how much higher, how much sooner, and how sure that is.

P pretraining seeds | F fine-tuning seeds
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from mimscale.study.config import ExperimentConfig, StudyConfig
from mimscale.study.graph import Trial
from mimscale.study.results import Group, Targets
from mimscale.study.statistics import Interval, Ratio, RatioInterval, Time, paired_bootstrap, ratio_bootstrap
from mimscale.study.targets import race_targets


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two groups that the same cases tell apart."""

    ours: Group
    theirs: Group
    dice: Interval
    steps: RatioInterval  # how many times sooner ours reaches the target
    seconds: RatioInterval  # the same with what pretraining took
    ours_times: Sequence[Time] = ()  # at which the runs of ours reached it; empty where there is no target
    theirs_times: Sequence[Time] = ()


@dataclass(frozen=True, kw_only=True)
class SharedSeeds:
    """The seeds that a comparison draws: of pretraining each group's own, of fine-tuning those that both have."""

    ours: list[int | None]  # None: not pretrained
    theirs: list[int | None]
    finetune: list[int]

    @property
    def same_pretraining(self) -> bool:
        """Whether pretraining seeds are drawn for both groups together."""
        return self.ours == self.theirs

    @property
    def pretrained(self) -> int:
        """Pretraining seeds of the group that has fewer; 0 where none of the two was pretrained."""
        return min((len(seeds) for seeds in (self.ours, self.theirs) if seeds != [None]), default=0)


def shared_seeds(ours: Sequence[Trial], theirs: Sequence[Trial]) -> SharedSeeds | None:
    """The seeds of two groups of trials, in rising order; None where no fine-tuning seed is in both."""
    finetune = {trial.finetune_seed for trial in ours} & {trial.finetune_seed for trial in theirs}
    if not finetune:
        return None
    of_both = [[trial for trial in trials if trial.finetune_seed in finetune] for trials in (ours, theirs)]
    first, second = (sorted({t.pretrain_seed for t in ts}, key=lambda seed: seed or 0) for ts in of_both)
    return SharedSeeds(ours=first, theirs=second, finetune=sorted(finetune))


def compare(config: StudyConfig, ours: Group, theirs: Group, targets: Targets) -> Comparison:
    """Two groups on the fine-tuning seeds, and for scores the cases, that both have: how high, and how soon."""
    seeds = shared_seeds(ours.scored, theirs.scored)
    cases = sorted(set(_cases(ours)) & set(_cases(theirs)))
    interval = Interval(difference=None, low=None, high=None, pretrain_seeds=0, finetune_seeds=0, cases=0)
    if seeds and cases:
        interval = paired_bootstrap(
            ours.scores(seeds.ours, seeds.finetune, cases),
            theirs.scores(seeds.theirs, seeds.finetune, cases),
            **asdict(config.bootstrap),
            same_pretraining=seeds.same_pretraining,
        )
        interval = replace(interval, pretrain_seeds=seeds.pretrained)
    return Comparison(
        ours=ours,
        theirs=theirs,
        dice=interval,
        steps=_sooner(config, ours.timed(targets), theirs.timed(targets)),
        seconds=_sooner(config, ours.timed_s(targets), theirs.timed_s(targets)),
        ours_times=ours.times(targets),
        theirs_times=theirs.times(targets),
    )


def _sooner(
    config: StudyConfig, ours: Sequence[tuple[Trial, Time]], theirs: Sequence[tuple[Trial, Time]]
) -> RatioInterval:
    """How many times sooner our trials reached the target, on the fine-tuning seeds that both have."""
    seeds = shared_seeds([trial for trial, _ in ours], [trial for trial, _ in theirs])
    if seeds is None:
        return RatioInterval(ratio=Ratio(value=None))
    found = ratio_bootstrap(
        _by_seed(ours, seeds.ours, seeds.finetune),
        _by_seed(theirs, seeds.theirs, seeds.finetune),
        **asdict(config.bootstrap),
        same_pretraining=seeds.same_pretraining,
    )
    return replace(found, pretrain_seeds=seeds.pretrained, finetune_seeds=len(seeds.finetune))


def _by_seed(
    timed: Sequence[tuple[Trial, Time]], pretrain: Sequence[int | None], finetune: Sequence[int]
) -> list[list[list[Time]]]:
    """The times of each pair of seeds, [P, F]: several where runs differ by their fold."""
    found: dict[tuple[int | None, int], list[Time]] = {}
    for trial, time in timed:
        found.setdefault((trial.pretrain_seed, trial.finetune_seed), []).append(time)
    return [[found.get((first, second), []) for second in finetune] for first in pretrain]


def _cases(group: Group) -> list[str]:
    return [case for result in group.results for case in result.case_dice]


def reference_setting(recipe: ExperimentConfig) -> str:
    """The setting that others are compared with."""
    return "" if recipe.pool_settings else recipe.reference_setting or next(iter(recipe.points))


def comparisons(config: StudyConfig, experiment: str, everything: Sequence[Group]) -> list[Comparison]:
    """Every arm against the reference arm of its setting, and every setting against the reference setting.

    Args:
        config: of the study.
        experiment: whose groups are compared.
        everything: the groups of all experiments.
    """
    groups = [group for group in everything if group.experiment == experiment]
    by_place: Mapping[tuple[str, str], Group] = {(group.setting, group.arm): group for group in groups}
    recipe = config.experiments[experiment]
    arm, setting = recipe.reference_arm or recipe.arms[0], reference_setting(recipe)
    found = []
    for group in groups:
        others = [(group.setting, arm)] if group.arm != arm else []
        others += [(setting, group.arm)] if group.setting != setting else []
        for other in (by_place[place] for place in others):
            found.append(compare(config, group, other, race_targets(config, everything, other, group, other)))
    return found
