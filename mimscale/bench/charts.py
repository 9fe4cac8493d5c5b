"""Charts of benchmarks: bars of contenders, and lines over ranks or volumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS, STYLES = 10, ("o-", "s-.", "^:")  # what follows the tenth line has its colour and another style
OWN, CEILING, OTHER = "#1b6ca8", "#e0c068", "#bbbbbb"


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A panel of bars, the largest on top."""

    title: str
    unit: str
    rows: Sequence[tuple[str, float]]  # name, value


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A panel of lines."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    dashed: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)  # beside the line of its name
    logarithmic: bool = False


def draw_bars(panels: Sequence[Bars], path: Path) -> None:
    """One panel below the other: ours, ceilings and the others in colours of their own."""
    heights = [1.2 + 0.3 * len(panel.rows) for panel in panels]
    figure, axes = _figure(len(panels), 1, (9, sum(heights)), height_ratios=heights)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        rows = sorted(panel.rows, key=lambda row: row[1])
        colours = [
            CEILING if name.startswith("ceiling") else OWN if name.startswith("mimscale") else OTHER for name, _ in rows
        ]
        bars = axis.barh([name for name, _ in rows], [value for _, value in rows], color=colours)
        axis.bar_label(bars, [f"{value:.3g}" for _, value in rows], padding=3)
        axis.set(xlabel=panel.unit, title=panel.title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_lines(panels: Sequence[Sequence[Lines]], path: Path) -> None:
    """A grid of panels, row by row; panels with the same lines have one legend, beside the first row of them."""
    figure, axes = _figure(len(panels), len(panels[0]), (6 * len(panels[0]), 4 * len(panels)))
    shown: set[tuple[str, ...]] = set()
    for row_of_axes, row in zip(axes, panels, strict=True):
        names = [tuple(panel.lines) for panel in row]
        for axis, panel, following in zip(row_of_axes, row, [*names[1:], ()], strict=True):
            plot = axis.loglog if panel.logarithmic else axis.plot
            for number, (name, points) in enumerate(panel.lines.items()):
                (line,) = plot(*zip(*points, strict=True), STYLES[number // COLOURS % len(STYLES)], label=name)
                if name in panel.dashed:
                    plot(*zip(*panel.dashed[name], strict=True), "--", color=line.get_color())
            axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
            if panel.logarithmic:
                sizes = sorted({x for points in panel.lines.values() for x, _ in points})
                axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
                axis.set_xticks([], minor=True)
            else:
                axis.set_ylim(0, None)
                axis.locator_params(axis="x", integer=True)
            axis.grid(visible=True, which="major", alpha=0.3)
            if tuple(panel.lines) not in (*shown, following):
                axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # lines fill the panel itself
                shown.add(tuple(panel.lines))
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], **grid: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, gridspec_kw=grid)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=100)
    pyplot.close(figure)
