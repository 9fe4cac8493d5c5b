"""`mimscale bench compare A.json B.json`: is B slower than A, or does it take more, by more than the two were spread?

Exit codes: 0 nothing is worse, 1 something is, 2 the two cannot be compared.
"""

import argparse
from pathlib import Path
from typing import Any

from mimscale import console
from mimscale.bench import measure
from mimscale.bench.figures import ASSUMED_SPREAD_OF_BYTES_PERCENT, ASSUMED_SPREAD_PERCENT, Figure, figures, settings
from mimscale.bench.results import read_result
from mimscale.errors import ConfigError

SLOWER_EXIT_CODE = 1
HARDWARE = ("cpu", "cores", "cores_used", "gpu_driver", "nccl")
_OF_NO_WEIGHT = ("run_dir", "hardware", "out")  # settings that change nothing that is measured
_ABSENT = "(not there)"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of both, worst first.

    A row has name, before, after, change_percent, spread_percent, spread_assumed, slower, ceiling. A figure is slower
    (of bytes: larger) when it has become worse by more than half of both spreads together: then the middles of the two
    lie farther apart than their repeats did.

    Raises:
        ConfigError: results of two different benchmarks, or without a common figure.
    """
    if before["benchmark"] != after["benchmark"]:
        raise ConfigError(f"a result of {before['benchmark']} and one of {after['benchmark']} have nothing to compare")
    old, new = ({figure.name: figure for figure in figures(tree)} for tree in (before, after))
    if not (common := [name for name in old if name in new]):
        raise ConfigError("the two results have no figure in common; were they measured with the same settings?")
    rows = [_row(old[name], new[name]) for name in common]
    return sorted(rows, key=lambda row: float(row.pop("gain_percent")))


def _row(old: Figure, new: Figure) -> dict[str, Any]:
    change = 100 * (new.value / old.value - 1)
    gain = change if old.more_is_better else -change
    spread = (old.spread_percent + new.spread_percent) / 2
    return {
        "name": old.name,
        "before": old.value,
        "after": new.value,
        "change_percent": round(change, 1),
        "spread_percent": round(spread, 1),
        "spread_assumed": old.is_assumed or new.is_assumed,
        "slower": gain < -spread,
        "ceiling": old.is_ceiling,
        "gain_percent": gain,
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else has changed, in words: hardware, versions, and settings that leave the work as it is."""
    old, new = before["surroundings"], after["surroundings"]
    lines = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in HARDWARE if old.get(key) != new.get(key)]
    lines += _changed(_versions(before), _versions(after))
    return lines + _changed(*(_settings(tree, work=False) for tree in (before, after)))


def other_work(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Settings of both that differ and that make a figure one of other work: batch, sizes, model, threads, precision.

    One that only one of them has is no such: a later version may have added it.
    """
    old, new = (_settings(tree, work=True) for tree in (before, after))
    return _changed({name: old[name] for name in old if name in new}, {name: new[name] for name in new if name in old})


def _settings(tree: dict[str, Any], *, work: bool) -> dict[str, Any]:
    found = {setting.name: setting for setting in settings(tree)}
    return {
        name: setting.value
        for name, setting in found.items()
        if setting.is_work == work and name.rpartition(".")[2] not in _OF_NO_WEIGHT
    }


def _versions(tree: dict[str, Any]) -> dict[str, str]:
    where = tree["surroundings"]
    return {**tree.get("packages", {}), **where.get("versions", {}), **where.get("peers", {})}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    pairs = {name: (old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in sorted(old.keys() | new.keys())}
    return [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]


def main(argv: list[str]) -> int:
    """`mimscale bench compare A.json B.json [--json] [--anyway]`; see the top of the file for its exit codes."""
    parser = argparse.ArgumentParser(
        prog="mimscale bench compare",
        description="Flag what is slower or larger in B than in A beyond the spread. Exit code 1: something is.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--json", action="store_true", help="the comparison as JSON on stdout")
    parser.add_argument("--anyway", action="store_true", help="although batch, sizes, threads or precision differ")
    arguments = parser.parse_args(argv)
    before, after = read_result(arguments.before), read_result(arguments.after)
    rows, others, works = compare(before, after), differences(before, after), other_work(before, after)
    if works and not arguments.anyway:
        raise ConfigError(
            f"{arguments.before} and {arguments.after} have measured different work:\n  "
            + "\n  ".join(works)
            + "\nmeasure both with the same settings, or give --anyway and read the figures with that in mind"
        )
    missing = sorted({figure.name for figure in figures(before)} ^ {figure.name for figure in figures(after)})
    slower = [row for row in rows if row["slower"] and not row["ceiling"]]
    if arguments.json:
        tree = {"rows": rows, "differences": others, "other_work": works, "in_one_only": missing}
        console.print_json({**tree, "slower": len(slower)})
    else:
        print(_as_text(rows), end="")
        for line in works:
            print(f"other work: {line}")
        for line in others:
            print(f"differs: {line}")
        for name in missing:
            print(f"in one of them only: {name}")
        print(f"{len(slower)} of {len(rows)} figures are worse beyond their spread")
    return SLOWER_EXIT_CODE if slower else 0


def _as_text(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["name"],
            f"{row['before']:.4g}",
            f"{row['after']:.4g}",
            f"{row['change_percent']:+.1f} %",
            f"{row['spread_percent']:.1f} %{' (assumed)' if row['spread_assumed'] else ''}",
            _verdict(row),
        ]
        for row in rows
    ]
    text = measure.table(["figure", "A", "B", "change", "spread", ""], cells)
    if any(row["spread_assumed"] for row in rows):
        text += (
            f"(assumed): measured once, or recorded without a spread; {ASSUMED_SPREAD_PERCENT:.0f} % stand for it, "
            f"{ASSUMED_SPREAD_OF_BYTES_PERCENT:.0f} % of bytes\n"
        )
    return text


def _verdict(row: dict[str, Any]) -> str:
    if not row["slower"]:
        return ""
    word = "larger" if row["name"].endswith("bytes") else "slower"
    return f"{word}: the machine" if row["ceiling"] else word
