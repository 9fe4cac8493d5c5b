"""Few cases in which any two values of different factors still meet: most faults need no more than two (Kuhn 2004)."""

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def full_product(
    factors: Mapping[str, Sequence[Hashable]], is_allowed: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Every allowed case, in the order of the factors' values."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if is_allowed(case)]


def pairs_of(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of values that meet in a case, each with its factors."""
    return set(combinations(case.items(), 2))


def pairwise_cover(cases: Sequence[Case], tries: int = 20) -> list[Case]:
    """Some of the cases, in which all pairs of all of them occur; the same ones every time.

    Greedily: always the case with the most new pairs. Which of equals comes first matters, so the smallest of several
    covers is taken, each from another order.
    """
    covers = []
    for seed in range(tries):
        in_some_order = random.Random(seed).sample(cases, len(cases))
        missing, chosen = set().union(*map(pairs_of, cases)), []
        while missing:
            chosen.append(max(in_some_order, key=lambda case: len(pairs_of(case) & missing)))
            missing -= pairs_of(chosen[-1])
        covers.append(chosen)
    return min(covers, key=len)
