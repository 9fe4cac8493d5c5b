"""Figures of README.md and benchmarks/README.md, written from the result files between two markers each.

python benchmarks/readme_section.py            rewrite the sections
python benchmarks/readme_section.py --check    exit code 1 when one does not match the files
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import other_sections

from mimscale.bench.measure import range_text, table
from mimscale.bench.results import shown_name
from mimscale.bench.scaling import foretold, ranks_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"


def markers(name: str) -> tuple[str, str]:
    """The lines between which a section stands."""
    return f"<!-- {name}: written by benchmarks/readme_section.py -->", f"<!-- end of {name} -->"


BEGIN, END = markers("performance")


def section(results: Path) -> str:
    """What the newest result of each benchmark and machine says."""
    parts = [text for path, tree in newest(results) if (text := _text(path, tree))]
    return f"{BEGIN}\n" + "\n".join(parts) + f"{END}\n"


def newest(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files `<benchmark>_<hardware>_<yyyymm>.json`, of each benchmark and hardware the last month."""
    last: dict[str, Path] = {}
    for path in sorted(results.glob("*.json")):
        if "-quick_" in path.name:  # of `make bench`: good for errors, not for figures
            continue
        last[path.stem.rpartition("_")[0]] = path
    for name in sorted(last):
        yield last[name], json.loads(last[name].read_text())


def _text(path: Path, tree: dict[str, Any]) -> str:
    write = {"step": _step, "train": _train, "scaling": _scaling, "less_work": _less_work}.get(tree["benchmark"])
    if write is None:
        return ""
    where = tree["surroundings"]
    return f"{write(tree)}\nFrom `benchmarks/results/{path.name}`: {where['cpu']}, commit {where['commit']}.\n"


def _step(tree: dict[str, Any]) -> str:
    rows = []
    for measured in tree["tables"]:
        for row in sorted(measured["contenders"], key=lambda row: row["step_s"]):
            rows.append(
                [
                    measured["setting"],
                    shown_name(row),
                    f"{row['samples_per_s']:.2f}",
                    f"{row['spread_percent']:.0f} %",
                    "" if row["of_ceiling"] is None else f"{100 * row['of_ceiling']:.0f} %",
                    "" if row["times"] is None else f"{row['times']:.2f}",
                ]
            )
    first = tree["tables"][0]
    head = (
        f"**The training step** on one batch that stays on the device ({first['device']}, {first['threads']} threads, "
        f"{first['dtype']}). A size is the edge of a crop and of a patch; `mimscale` is our model in plain torch, the "
        "ceiling the step's matrix products with nothing between them.\n\n"
    )
    columns = ["size", "what runs the step", "samples/s", "spread", "of ceiling", "time, mimscale = 1"]
    return head + table(columns, rows) + "\n" + _utilisation(tree["tables"])


def _utilisation(tables: list[dict[str, Any]]) -> str:
    """MFU and HFU of each size, with what they are a part of."""
    parts = []
    for measured in tables:
        use = measured["utilisation"]
        kind = "of_measured" if use["mfu"] is None else ""
        mfu, hfu = (100 * use["_".join(filter(None, (name, kind)))] for name in ("mfu", "hfu"))
        peak = use["measured_flops_per_s" if kind else "peak_flops_per_s"] / 1e9
        parts.append(f"{measured['setting']} {mfu:.0f} and {hfu:.0f} % of {peak:.0f} GFLOP/s")
    source = "a large product measured in the same run" if kind else "the data sheet"
    return f"MFU and HFU of `mimscale` (peak: {source}): {'; '.join(parts)}.\n"


def _train(tree: dict[str, Any]) -> str:
    rows = [
        [
            name.replace("_", " "),
            f"{mode['samples_per_s']:.2f}",
            f"{mode['spread_percent']:.0f} %",
            f"{max(mode['data_wait_percent']):.1f} %" if "data_wait_percent" in mode else "",
        ]
        for name, mode in tree["modes"].items()
    ]
    head = (
        f"**Training** in three modes, {tree['ranks']} rank(s): the step on a batch that stays on the device "
        f"(synthetic), the loader with nobody who computes, and both (end to end). Here: {tree['verdict']}.\n\n"
    )
    return head + table(["mode", "samples/s", "spread", "waits for data"], rows)


def _less_work(tree: dict[str, Any]) -> str:
    sizes = list(tree["speed"])
    views = tree["rows"][0]["common_views"]
    rows = [
        [
            row["way"],
            *(f"{row['times'][size]:.2f}x" for size in sizes),
            range_text(row["loss_after_time"]),
            "" if row["loss_after_views"] is None else range_text(row["loss_after_views"]),
        ]
        for row in tree["rows"]
    ]
    head = (
        "**Less work in a step**, as many views (a crop under one mask) each: times as fast, and the validation loss "
        f"of a small ViT late in {tree['config']['train_seconds']:.0f} processor seconds of training, and late in the "
        "first views that all have seen (median, lowest and highest; 1 is the mean voxel).\n\n"
    )
    columns = ["way", *sizes, "loss by time", f"loss by {views} views"]
    return head + table(columns, rows)


def _scaling(tree: dict[str, Any]) -> str:
    rows = [
        [
            kind,
            ranks_text(row),
            row["global_batch"],
            *(
                f"{row['modes'][mode]['samples_per_s']:.2f} ({100 * row['modes'][mode]['efficiency']:.0f} %)"
                for mode in modes
            ),
        ]
        for kind, of_kind in tree["scaling"].items()
        for modes in [list(of_kind[0]["modes"])]
        for row in of_kind
    ]
    modes = [mode.replace("_", " ") for mode in next(iter(tree["scaling"].values()))[0]["modes"]]
    text = (
        "**Scaling** over ranks of one machine, which share its memory: samples/s, in brackets the efficiency. Weak: "
        "the batch of a rank stays; strong: the global batch stays.\n\n"
    ) + table(["kind", "ranks", "global batch", *modes], rows)
    if told := foretold(tree):
        text += f"\n{told}"
    if tree["memory"]:
        cells = [
            [
                row["zero_stage"],
                row["ranks"],
                row["precision"],
                f"{max(row['bytes_of_rank']) / row['parameters']:.2f}",
                f"{row['of_theory']:.2f}",
            ]
            for row in tree["memory"]
        ]
        millions, bucket = tree["memory"][0]["parameters"] / 1e6, tree["memory"][-1]["bucket_bytes"] / 1e6
        text += (
            f"\nMemory of a rank between backward pass and optimizer, {millions:.1f} M parameters. Theory: 16 bytes a "
            "parameter, less what the stage shards. Above it at stage 3 are buckets of `engine.bucket_elements` (one "
            f"here: {bucket:.1f} MB), which do not grow with the model:\n\n"
        )
        text += table(["ZeRO stage", "ranks", "precision", "bytes a parameter", "of theory"], cells)
    return text


def replaced(readme: str, text: str, name: str = "performance") -> str:
    """The file with the section, which brings its markers, in its place.

    Raises:
        ValueError: a marker is missing, or stands there twice.
    """
    begin, end = markers(name)
    for marker in (begin, end):
        if readme.count(marker) != 1:
            raise ValueError(f"the file must hold {marker!r} once, it holds it {readme.count(marker)} times")
    return readme[: readme.index(begin)] + text + readme[readme.index(end) + len(end) + 1 :]


def written(readme: str, texts: dict[str, str]) -> str:
    """The file with all of its sections. One that has nothing to say, as there is no result of it, needs no markers."""
    for name, text in texts.items():
        begin, end = markers(name)
        if text or begin in readme:
            readme = replaced(readme, f"{begin}\n{text}{end}\n", name)
    return readme


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the figures of the READMEs from the result files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when one differs")
    parser.add_argument("--readme", type=Path, default=README, help="with a second one in benchmarks/ beside it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    found = list(newest(arguments.results))
    second = arguments.readme.parent / "benchmarks" / "README.md"
    readme = arguments.readme.read_text()
    wanted = {arguments.readme: written(replaced(readme, section(arguments.results)), other_sections.of_readme(found))}
    if second.exists():
        wanted[second] = written(second.read_text(), other_sections.of_benchmarks_readme(found))
    stale = [path for path, text in wanted.items() if text != path.read_text()]
    for path in stale:
        if arguments.check:
            sys.stderr.write(f"{path} does not match the results; run python benchmarks/readme_section.py\n")
        else:
            path.write_text(wanted[path])
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
