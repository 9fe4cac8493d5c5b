"""Which checkpoints stay: the newest, every n-th step's, and the best by a validation metric. No torch here."""

import json
from collections.abc import Mapping, Sequence

from mimscale.train.run_dir import RunDir

# A metric's direction is known by a word of its name: val_loss, val_dice_2, val_feature_rank.
LOWER_IS_BETTER = frozenset({"loss", "error", "hd95"})
HIGHER_IS_BETTER = frozenset({"dice", "nsd", "accuracy", "auc", "psnr", "ssim", "rank"})


def higher_is_better(metric: str) -> bool:
    """The direction of a validation metric.

    Raises:
        ValueError: its name does not tell.
    """
    words = set(metric.split("_"))
    lower, higher = bool(words & LOWER_IS_BETTER), bool(words & HIGHER_IS_BETTER)
    if lower == higher:
        raise ValueError(
            f"checkpoint.keep_best={metric}: nobody knows whether more is better; give a metric of the validation "
            f"whose name has one of the words {', '.join(sorted(LOWER_IS_BETTER | HIGHER_IS_BETTER))}, such as val_loss"
        )
    return higher


def why_kept(
    steps: Sequence[int],
    *,
    newest_good: int,
    keep: int,
    keep_every_steps: int | None = None,
    keep_best: str | None = None,
    scores: Mapping[int, float] | None = None,
) -> dict[int, list[str]]:
    """Step -> why its checkpoint stays. A step that is missing may be deleted; `newest_good` never is.

    Args:
        steps: of all checkpoints there are, in any order.
        newest_good: of the newest checkpoint that is whole. Newer ones are broken, and stay for no reason.
        keep: how many of the newest stay.
        keep_every_steps: steps that are multiples of it stay for good.
        keep_best: the validation metric whose best stays; of equals the earliest, so that nothing is replaced for
            nothing.
        scores: step -> its value. A checkpoint of a step without a validation cannot be the best.
    """
    good = sorted((step for step in set(steps) if step <= newest_good), reverse=True)
    reasons: dict[int, list[str]] = {step: [] for step in good}
    for number, step in enumerate(good[:keep]):
        reasons[step].append("newest" if number == 0 else f"one of the last {keep}")
    for step in good:
        if keep_every_steps is not None and step % keep_every_steps == 0:
            reasons[step].append(f"every {keep_every_steps} steps")
    scored = {step: scores[step] for step in reversed(good) if scores is not None and step in scores}
    if keep_best is not None and scored:
        best = best_step(scored, keep_best)
        reasons[best].append(f"best {keep_best} ({scored[best]:.6g})")
    return {step: why for step, why in reasons.items() if why}


def best_step(scores: Mapping[int, float], metric: str) -> int:
    """The step with the best value of a metric (step -> value, one at least); of equals the first in the mapping."""
    return (max if higher_is_better(metric) else min)(scores, key=lambda step: scores[step])


def read_scores(run: RunDir, metric: str | None) -> dict[int, float]:
    """Step -> value of a validation metric, as metrics.jsonl has it. Other lines are not parsed: there may be millions.

    A last line that a kill cut short is left out.
    """
    if metric is None or not run.metrics.exists():
        return {}
    scores = {}
    with run.metrics.open() as file:
        for line in file:
            if f'"{metric}":' in line and line.endswith("\n"):
                tree = json.loads(line)
                scores[int(tree["step"])] = float(tree[metric])
    return scores
