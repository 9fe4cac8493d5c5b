"""Curves of one or more runs as PNG files. matplotlib without pyplot: no global state, no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimscale import durable
from mimscale.report.facts import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with red-green blindness (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK, FAINT = "#24292f", "#d0d7de"
# Above this many logged steps a thin line of all steps stands behind a moving mean.
SMOOTH_ABOVE_STEPS = 80
DPI = 130


def new_figure(width_in: float, height_in: float) -> "Figure":
    """A figure without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG, complete or not at all. No time of writing in it: the same numbers give the same bytes."""
    with durable.open_atomically(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None}, facecolor=figure.get_facecolor())


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def loss_chart(runs: Sequence[RunFacts], path: Path) -> None:
    """Training loss as lines, validation loss as dots."""
    figure = new_figure(7.2, 3.4)
    axes = figure.add_subplot()
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        steps = [line["step"] for line in run.steps]
        losses = [float(line["loss"]) for line in run.steps]
        if len(steps) > SMOOTH_ABOVE_STEPS:
            window = len(steps) // 40
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(
                steps, moving_mean(losses, window), color=colour, label=f"{run.name}, train (mean of {window} steps)"
            )
        else:
            axes.plot(steps, losses, color=colour, label=f"{run.name}, train")
        checked = [line for line in run.validations if line.get("val_loss") is not None]
        if checked:
            axes.plot(
                [line["step"] for line in checked],
                [float(line["val_loss"]) for line in checked],
                color=colour,
                marker="o",
                markersize=5,
                markerfacecolor="white",
                linestyle=":",
                label=f"{run.name}, validation",
            )
    finish_axes(axes, "optimizer step", "loss")
    save_figure(figure, path)


def yardstick_chart(runs: Sequence[RunFacts], path: Path) -> None:
    """Validation loss relative to two predictors without weights: 1 is a network that knows no more than they do."""
    figure = new_figure(7.2, 3.4)
    axes = figure.add_subplot()
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        for name, style, label in (
            ("val_loss_vs_mean_voxel", "-", "mean of the visible voxels"),
            ("val_loss_vs_interpolated", ":", "interpolation"),
        ):
            lines = [line for line in run.validations if line.get(name) is not None]
            axes.plot(
                [line["step"] for line in lines],
                [float(line[name]) for line in lines],
                color=colour,
                linestyle=style,
                marker="o",
                markersize=4,
                label=f"{run.name} / {label}",
            )
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_ylim(bottom=0)
    finish_axes(axes, "optimizer step", "validation loss, relative")
    save_figure(figure, path)


def dice_chart(runs: Sequence[RunFacts], path: Path) -> None:
    """Validation Dice by step."""
    figure = new_figure(7.2, 3.4)
    axes = figure.add_subplot()
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        checked = [line for line in run.validations if line.get("val_dice") is not None]
        axes.plot(
            [line["step"] for line in checked],
            [float(line["val_dice"]) for line in checked],
            color=colour,
            marker="o",
            markersize=4,
            label=run.name,
        )
    axes.set_ylim(0, 1)
    finish_axes(axes, "optimizer step", "Dice on validation crops")
    save_figure(figure, path)


def throughput_chart(runs: Sequence[RunFacts], path: Path) -> None:
    """Samples a second, and the part of each step spent waiting for data."""
    figure = new_figure(7.2, 4.4)
    speed, wait = figure.subplots(2, 1, sharex=True)
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        lines = [line for line in run.steps if line.get("samples_per_s") is not None]
        speed.plot(
            [line["step"] for line in lines],
            [float(line["samples_per_s"]) for line in lines],
            color=colour,
            label=run.name,
            linewidth=1.3,
        )
        lines = [line for line in run.steps if "data_wait_s" in line and "step_s" in line]
        wait.plot(
            [line["step"] for line in lines],
            [_percent(line) for line in lines],
            color=colour,
            linewidth=1.3,
        )
    speed.set_ylim(bottom=0)
    wait.set_ylim(0, 100)
    finish_axes(speed, "", "samples/s")
    finish_axes(wait, "optimizer step", "data wait, %", legend=False)
    save_figure(figure, path)


def _percent(line: dict[str, Any]) -> float:
    return 100 * float(line["data_wait_s"]) / float(line["step_s"]) if line["step_s"] else 0.0


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def finish_axes(axes: "Axes", x_label: str, y_label: str, *, legend: bool = True) -> None:
    """Labels, grid and legend of all our charts."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half step
    axes.margins(x=0.02)
    if legend:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
