"""The page of a study: tables that sort, curves, and where each number comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from mimscale import durable
from mimscale.errors import DataError
from mimscale.report.charts import (
    COLOURS,
    FAINT,
    finish_axes,
    new_figure,
    save_figure,
)
from mimscale.report.facts import RunFacts
from mimscale.report.page import reconstruction_pictures, segmentation_pictures
from mimscale.report.pictures import legend

SIDE_BY_SIDE = 0.06  # of the distance between two settings
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text. A click on a column's head sorts them by it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    text_columns: int = 1  # from the left: those that hold no numbers


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Validation Dice of the runs of one group, which were validated at the same steps."""

    arm: str
    setting: str
    steps: list[int]
    runs: list[list[float]]  # [run][step]
    reached: str = ""  # when the target was, in words


@dataclass(frozen=True, kw_only=True)
class Point:
    """A score under one setting: the mean over runs, its spread, and each run's own."""

    setting: str
    mean: float
    std: float | None
    runs: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One experiment."""

    name: str
    heading: str  # the name, for people
    question: str
    answers: list[str]
    tables: list[Table]
    curves: list[Curve]
    target: float | None
    points: dict[str, list[Point]]  # arm -> a point a setting; empty where there is one setting
    settings: list[str]
    classes: list[Table] = field(default_factory=list)  # scores of each class
    measured: bool = True  # whether a run of it is scored


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """Everything that the page shows."""

    title: str
    question: str
    notes: list[str]
    nodes: Table
    sections: list[Section]
    costs: Table
    provenance: list[Table]
    pictures: list[tuple[str, RunFacts]]  # caption and run, of which reconstructions or overlays are drawn
    classes: list[str]  # without the background, or regions: what overlays are drawn in
    volumes: list[tuple[str, list[str]]]  # a use of volumes, and their ids
    configs: list[tuple[str, str]]  # name and YAML
    footer: str
    tables: list[Table] = field(default_factory=list)  # the few that a terminal shows


def write_study_page(view: StudyView, folder: Path) -> Path:
    """Write `index.html` with its pictures; returns the page's path.

    Raises:
        DataError: the disk is full or not writable.
    """
    with durable.explained(DataError, folder, "free some space, then give the same command again"):
        folder.mkdir(parents=True, exist_ok=True)
        sections = []
        for number, section in enumerate(view.sections, start=1):
            charts = []
            if section.curves:
                name = f"{number:02d}_{section.name}_convergence.png"
                convergence_chart(section.curves, section.target, folder / name)
                charts.append({"file": name, "caption": _curve_caption(section)})
            if section.points:
                name = f"{number:02d}_{section.name}_settings.png"
                settings_chart(section.points, section.settings, section.heading.lower(), folder / name)
                caption = (
                    "Test Dice without background by setting: mean of the runs, bars one standard deviation, a small "
                    "circle each run. The scale does not begin at 0."
                )
                charts.append({"file": name, "caption": caption})
            sections.append({"section": section, "charts": charts})
        pictures = [
            {"caption": caption, **picture} for caption, run in view.pictures for picture in _pictures(run, folder)
        ]
        text = _render({"view": view, "sections": sections, "pictures": pictures, "legend": legend(view.classes)})
        durable.write_text(folder / "index.html", text)
    return folder / "index.html"


def _render(tree: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    files = resources.files("mimscale.report")
    template, style, script = ((files / name).read_text() for name in ("study.html", "style.css", "sort.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(tree | {"style": style, "script": script})


def _pictures(run: RunFacts, folder: Path) -> list[dict[str, str]]:
    draw = reconstruction_pictures if run.kind == "pretrain" else segmentation_pictures
    return [{"file": picture["file"], "what": picture["caption"]} for picture in draw(run, {}, folder)]


def _curve_caption(section: Section) -> str:
    target = "" if section.target is None else f" Dashed: the target, {section.target:.3f}."
    return (
        f"Validation Dice by fine-tuning step: mean of the runs, shaded from lowest to highest.{target} In brackets: "
        "the median step at which its runs reached their target, > where half of them or more never did."
    )


def convergence_chart(curves: Sequence[Curve], target: float | None, path: Path) -> None:
    """Validation Dice by step: mean of the runs of each group, shaded from the lowest to the highest.

    Arms have colours of their own; where there are several settings, these have, and each arm a kind of line.
    """
    figure = new_figure(7.2, 3.8)
    axes = figure.add_subplot()
    arms, settings = (list(dict.fromkeys(names)) for names in ([c.arm for c in curves], [c.setting for c in curves]))
    for curve in curves:
        arm, setting = arms.index(curve.arm), settings.index(curve.setting)
        place, style = (arm, arm // len(COLOURS)) if len(settings) == 1 else (setting, arm)
        colour, line = COLOURS[place % len(COLOURS)], LINES[style % len(LINES)]
        at_step = list(zip(*curve.runs, strict=True))
        mean = [sum(values) / len(values) for values in at_step]
        label = ", ".join(filter(None, (curve.arm, curve.setting))) + (f" ({curve.reached})" if curve.reached else "")
        axes.plot(curve.steps, mean, line, color=colour, marker="o", markersize=3, label=label)
        if len(curve.runs) > 1:
            low, high = [min(values) for values in at_step], [max(values) for values in at_step]
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.13, linewidth=0)
    if target is not None:
        axes.axhline(target, color=FAINT, linestyle="--", linewidth=1.2, zorder=0)
    axes.set_ylim(bottom=0)
    finish_axes(axes, "fine-tuning step", "Dice on validation crops")
    save_figure(figure, path)


def settings_chart(points: dict[str, list[Point]], settings: Sequence[str], name: str, path: Path) -> None:
    """Test Dice by setting, one line an arm."""
    figure = new_figure(5.6, 3.4)
    axes = figure.add_subplot()
    for number, (arm, line) in enumerate(points.items()):
        # Arms stand side by side, so that one does not hide another.
        beside = SIDE_BY_SIDE * (number - (len(points) - 1) / 2)
        x = [settings.index(point.setting) + beside for point in line]
        error = [point.std or 0.0 for point in line]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(x, [point.mean for point in line], yerr=error, color=colour, marker="o", capsize=3, label=arm)
        for place, point in zip(x, line, strict=True):
            runs = [place] * len(point.runs), point.runs
            axes.scatter(*runs, s=14, facecolor="white", edgecolor=colour, linewidth=0.9, zorder=3)
    finish_axes(axes, name, "Dice on test volumes")
    axes.set_xticks(range(len(settings)), list(settings))
    axes.set_xlim(-0.5, len(settings) - 0.5)
    save_figure(figure, path)
