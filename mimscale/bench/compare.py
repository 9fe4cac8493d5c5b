"""`mimscale bench compare A.json B.json`: is B slower than A by more than the two were spread?

Exit codes: 0 nothing is slower, 1 something is, 2 the two cannot be compared.
"""

import argparse
from pathlib import Path
from typing import Any

from mimscale import console
from mimscale.bench import measure
from mimscale.bench.results import rates, read_result
from mimscale.errors import ConfigError

SLOWER_EXIT_CODE = 1
# What must be equal for a rate to mean the same.
HARDWARE = ("cpu", "cores", "cores_used")


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rate of both, worst first: name, before, after, change_percent, spread_percent, slower.

    A rate is slower when it has lost more than half of both spreads together: then the middles of the two lie farther
    apart than their repeats did.

    Raises:
        ConfigError: results of two different benchmarks, or without a common rate.
    """
    if before["benchmark"] != after["benchmark"]:
        raise ConfigError(f"a result of {before['benchmark']} and one of {after['benchmark']} have nothing to compare")
    old, new = ({rate.name: rate for rate in rates(tree)} for tree in (before, after))
    names = [name for name in old if name in new]
    if not names:
        raise ConfigError("the two results have no rate in common; were they measured with the same settings?")
    rows = []
    for name in names:
        change = 100 * (new[name].per_s / old[name].per_s - 1)
        spread = (old[name].spread_percent + new[name].spread_percent) / 2
        rows.append(
            {
                "name": name,
                "before": old[name].per_s,
                "after": new[name].per_s,
                "change_percent": round(change, 1),
                "spread_percent": round(spread, 1),
                "slower": change < -spread,
            }
        )
    return sorted(rows, key=lambda row: float(row["change_percent"]))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else has changed, in words: the hardware and the versions."""
    old, new = before["surroundings"], after["surroundings"]
    lines = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in HARDWARE if old.get(key) != new.get(key)]
    versions = old.get("versions", {}).keys() | new.get("versions", {}).keys()
    for name in sorted(versions):
        pair = old.get("versions", {}).get(name), new.get("versions", {}).get(name)
        if pair[0] != pair[1]:
            lines.append(f"{name}: {pair[0]} -> {pair[1]}")
    return lines


def main(argv: list[str]) -> int:
    """`mimscale bench compare A.json B.json [--json]`; see the top of the file for its exit codes."""
    parser = argparse.ArgumentParser(
        prog="mimscale bench compare",
        description="Flag what is slower in B than in A beyond the recorded spread. Exit code 1: something is.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--json", action="store_true", help="the comparison as JSON on stdout")
    arguments = parser.parse_args(argv)
    before, after = read_result(arguments.before), read_result(arguments.after)
    rows, others = compare(before, after), differences(before, after)
    missing = sorted({rate.name for rate in rates(before)} ^ {rate.name for rate in rates(after)})
    slower = [row for row in rows if row["slower"]]
    if arguments.json:
        console.print_json({"rows": rows, "differences": others, "in_one_only": missing, "slower": len(slower)})
    else:
        cells = [
            [
                row["name"],
                f"{row['before']:.4g}",
                f"{row['after']:.4g}",
                f"{row['change_percent']:+.1f} %",
                f"{row['spread_percent']:.1f} %",
                "slower" if row["slower"] else "",
            ]
            for row in rows
        ]
        print(measure.table(["rate", "A", "B", "change", "spread", ""], cells))
        for line in others:
            print(f"differs: {line}")
        for name in missing:
            print(f"in one of them only: {name}")
        print(f"{len(slower)} of {len(rows)} rates are slower beyond their spread")
    return SLOWER_EXIT_CODE if slower else 0
