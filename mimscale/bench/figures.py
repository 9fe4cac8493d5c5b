"""What two results of a benchmark can be compared by: figures with their spread, and what these were measured on.

No torch.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Of a figure that was measured once, or whose file has no spread: most recorded ones lie below (benchmarks/README.md).
ASSUMED_SPREAD_PERCENT = 30.0
ASSUMED_SPREAD_OF_BYTES_PERCENT = 10.0  # the same allocations each time
MORE_IS_BETTER = ("samples_per_s", "crops_per_s", "mb_per_s", "mb_per_cpu_s", "mb_per_wall_s")
# One number, or one a repeat.
LESS_IS_BETTER = ("seconds", "stall_s", "write_s", "save_s", "convert_s", "verify_s", "load_s", "peak_bytes")
CEILINGS = ("ceiling_s",)  # the same, of the machine and not of mimscale
_SPREAD_KEYS = {"mb_per_wall_s": "wall_spread_percent"}  # else "spread_percent"
NAMING = (
    "name",
    "part",
    "mode",
    "setting",
    "kind",
    "ranks",
    "workers",
    "volumes",
    "condition",
    "crop_voxels",
    "zero_stage",
)
_NO_FIGURES = ("surroundings", "config", "settings", "windows", "targets", "exponents")

# Trees of what was asked for, and what stands alone beside the figures.
SETTINGS = ("config", "settings", "windows", "shapes_czyx", "model")
SETTINGS_ALONE = (
    "threads",
    "device",
    "dtype",
    "precision",
    "zero_stage",
    "ranks",
    "global_batch",
    "parameters",
    "raw_mb",
    "repeats",
)
# Where one of these differs, a figure is that of other work: nothing follows from its change.
WORK = frozenset(
    (
        *("global_batch", "micro_batch", "crop_voxels", "patch_voxels", "method", "model", "mae", "simmim", "simclr"),
        *("mask", "augment", "parameters", "ranks", "threads", "dtype", "precision", "raw_mb", "shapes_czyx"),
        *("chunk_voxels", "ct_edge", "edge", "edge_factor", "mb_a_run", "rows", "receipts"),
        *("SLOW_IOPS", "SLOW_LATENCY_US"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number with the spread of its repeats."""

    name: str  # the way to it in the result
    value: float  # above 0
    spread_percent: float  # largest less smallest repeat, by the median
    is_assumed: bool  # the spread: the file holds none
    more_is_better: bool

    @property
    def is_ceiling(self) -> bool:
        """Whether it says what the machine can do, instead of what mimscale does."""
        return "ceiling" in self.name


def spread_percent(repeats: Sequence[float]) -> float | None:
    """Largest less smallest, by the median; None of a single repeat."""
    return None if len(repeats) < 2 else 100 * (max(repeats) - min(repeats)) / statistics.median(repeats)


def figures(tree: Any, name: str = "") -> Iterator[Figure]:
    """Every rate, duration and peak of memory in a result.

    A row of a table is named by what it says about itself, not by its place: tables are sorted by speed.
    """
    if isinstance(tree, list):
        for way, item in _named(tree, name):
            yield from figures(item, way)
    elif isinstance(tree, dict):
        for key in MORE_IS_BETTER:
            if isinstance(value := tree.get(key), int | float):
                spread = tree.get(_SPREAD_KEYS.get(key, "spread_percent"))
                yield from _figure(f"{name}: {key}", [value], spread, more_is_better=True)
        for key in (*LESS_IS_BETTER, *CEILINGS):
            yield from _durations(tree.get(key), f"{name}: {key}", tree.get("spread_percent"))
        for key, value in tree.items():
            if key not in (*_NO_FIGURES, *LESS_IS_BETTER, *CEILINGS):
                yield from figures(value, _way(name, str(key)))


def _named(items: list[Any], name: str) -> Iterator[tuple[str, Any]]:
    for place, item in enumerate(items):
        own = [str(item[key]) for key in NAMING if key in item] if isinstance(item, dict) else []
        yield _way(name, ", ".join(own) or str(place)), item


def _durations(value: Any, name: str, spread: float | None) -> Iterator[Figure]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _durations(item, f"{name} {key}", spread)
    elif isinstance(value, list):
        yield from _figure(name, value, spread_percent(value), more_is_better=False)
    elif isinstance(value, int | float):
        yield from _figure(name, [value], None if name.endswith("bytes") else spread, more_is_better=False)


def _figure(name: str, repeats: list[float], spread: float | None, *, more_is_better: bool) -> Iterator[Figure]:
    value, is_assumed = float(statistics.median(repeats)), not spread  # 0 is the spread of one repeat
    if is_assumed:
        spread = ASSUMED_SPREAD_OF_BYTES_PERCENT if name.endswith("bytes") else ASSUMED_SPREAD_PERCENT
    if value > 0:
        yield Figure(
            name=name.removeprefix(": "),
            value=value,
            spread_percent=float(spread or 0),
            is_assumed=is_assumed,
            more_is_better=more_is_better,
        )


@dataclass(frozen=True)
class Setting:
    """One thing that a result was measured with."""

    name: str
    value: Any
    is_work: bool  # what is done, and not only how long or where it was measured


def settings(tree: Any, name: str = "") -> Iterator[Setting]:
    """What a result says about what it was measured with: its config, and what stands beside its figures."""
    if isinstance(tree, list):
        for way, item in _named(tree, name):
            yield from settings(item, way)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            way = _way(name, str(key))
            if key in SETTINGS:
                yield from _leaves(value, (key,), name)
            elif key in SETTINGS_ALONE and not isinstance(value, dict | list):
                yield Setting(way, value, key in WORK)
            elif key not in ("surroundings", "targets"):
                yield from settings(value, way)


def _leaves(value: Any, path: tuple[str, ...], name: str) -> Iterator[Setting]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)), name)
    else:
        yield Setting(_way(name, ".".join(path)), value, not WORK.isdisjoint(path))


def _way(*parts: str) -> str:
    return " / ".join(filter(None, parts))
