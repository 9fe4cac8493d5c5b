"""The validation Dice that a run is to reach, and of which runs it can be said to be the same."""

import statistics
from collections.abc import Sequence

from mimscale.study.config import StudyConfig
from mimscale.study.graph import Trial
from mimscale.study.results import Group, Result

# Keys of a fine-tuning that decide which crops of which volumes are validated, against what.
VALIDATED_ON = (
    "store",
    "modality",
    "overlay",
    "regions",
    "crop_voxels",
    "validation.crops_per_volume",
    "validation.max_volumes",
    "stream.filter",
    "stream.fold",
    "stream.target_spacing_mm",
    "stream.max_spacing_ratio",
)
# And those that say which plan a target is one of, where an experiment has to take it from another one.
PLANNED_AS = (*VALIDATED_ON, "head", "steps", "global_batch", "optim.schedule", "stream.train_fraction")


def race_targets(config: StudyConfig, everything: Sequence[Group], place: Group, *racing: Group) -> dict[Trial, float]:
    """The validation Dice that each run of some groups is to reach, so that their times can be compared.

    It is what the arm that sets it ends at where `place` stands: under its setting of its experiment or, where that
    arm has no part in the experiment, where it has one by the same plan, under a setting of the same name if there is
    one. Of a fold it is what that arm ends at in this fold. A run has none while that arm has none, and none where
    other crops or volumes are validated than in that arm or in another of the groups: their Dice is another quantity.

    Args:
        config: of the study.
        everything: the groups of all experiments.
        place: the group whose experiment and setting decide.
        racing: the groups to compare.
    """
    ends: dict[str, list[float]] = {}
    for result in _setters(config, everything, place):
        if result.last_validation is not None:
            ends.setdefault(result.same_in(VALIDATED_ON), []).append(result.last_validation)
    in_all = set.intersection(*({r.same_in(VALIDATED_ON) for r in group.results if r.curve} for group in racing))
    found = {}
    for result in (result for group in racing for result in group.results if result.curve):
        quantity = result.same_in(VALIDATED_ON)
        dice = statistics.fmean(ends[quantity]) if quantity in ends else config.target.dice
        if dice is not None and quantity in in_all:
            found[result.trial] = dice
    return found


def _setters(config: StudyConfig, everything: Sequence[Group], place: Group) -> list[Result]:
    """The runs whose last validation is the target of a group."""
    by_arm = [group for group in everything if group.arm == config.target.arm]
    own = [g for g in by_arm if (g.experiment, g.setting) == (place.experiment, place.setting)]
    if own:
        return list(own[0].results)
    plans = {result.same_in(PLANNED_AS) for result in place.results}
    for group in sorted(by_arm, key=lambda group: group.setting != place.setting):
        if found := [result for result in group.results if result.same_in(PLANNED_AS) in plans]:
            return found
    return []
