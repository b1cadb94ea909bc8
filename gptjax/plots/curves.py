"""Training curves, and bar-like comparisons of measurements."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.config import InputError
from gptjax.plots.inline import InlineFigure
from gptjax.plots.legible import DASHES, LINES, MARKERS, PAGE, finish, wrap

SIZE = 8.0  # Points of text.
HATCHES = "", "////", "...."
FEW = 8
"""Most points of a logarithmic axis that are ticks themselves: none might be a power of ten."""


def page_axes(height: float, title: str, width: float = PAGE) -> tuple[Figure, Axes]:
    """Returns a figure and its axes, `height` and `width` points large, with labels."""
    figure = InlineFigure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.subplots()
    axes.set_title(wrap(title, SIZE + 1, width - 60), fontsize=SIZE + 1)
    axes.tick_params(labelsize=SIZE)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def line_style(index: int, points: int) -> dict[str, Any]:
    """Returns the style of the index-th line: a colour, with dashes and markers for greyscale.

    The first 49 are distinct; points have markers if they are few.
    """
    turn, number = divmod(index, len(LINES))
    return {
        "color": LINES[number],
        "linestyle": DASHES[(number + turn) % len(DASHES)],
        "marker": MARKERS[(number + turn) % len(MARKERS)] if points <= 30 else None,
        "markersize": 4,
        "linewidth": 1.4,
    }


def loss_curve(lines: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Plots training and validation loss over steps, from the lines of `metrics.jsonl`."""
    figure, axes = page_axes(290, title)
    trained = [(line["step"], line["cross_entropy"]) for line in lines]
    held_out = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    axes.plot(*zip(*trained, strict=True), color=LINES[4], linewidth=1, label="training batch")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color=LINES[1],
            marker="o",
            markersize=4,
            label="validation",
        )
        step, loss = held_out[-1]
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            fontsize=SIZE,
        )
    axes.set_xlabel("step", fontsize=SIZE)
    axes.set_ylabel("cross-entropy, nats per token", fontsize=SIZE)
    axes.legend(frameon=False, fontsize=SIZE)
    return finish(figure)


def curves(
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Plots measurements over training: one line each, with a band over several seeds.

    Args:
      steps: [steps], or another x axis.
      values: by name, [steps], or [steps, seeds]: the mean is the line, the range the band.
      xlabel, ylabel: axis labels.
      title: above the figure.
      log_x, log_y: logarithmic axes.

    Raises:
      InputError: another shape, or values of 0 or below on a logarithmic axis.
    """
    if log_x and np.min(steps) <= 0:
        raise InputError(f"steps begin at {np.min(steps):g}: with log_x they must be above 0.")
    figure, axes = page_axes(290, title)
    for index, (name, measured) in enumerate(values.items()):
        measured = np.asarray(measured)
        if measured.ndim not in (1, 2) or len(measured) != len(steps):
            raise InputError(
                f"values of {name!r} have shape {measured.shape}: {len(steps)} steps ask for "
                f"({len(steps)},) or ({len(steps)}, seeds)."
            )
        if log_y and np.min(measured) <= 0:
            raise InputError(
                f"values of {name!r} go down to {np.min(measured):g}: with log_y they must be "
                "above 0."
            )
        style = line_style(index, len(steps))
        if measured.ndim == 2 and measured.shape[1] > 1:
            name = f"{name} (mean and range of {measured.shape[1]} seeds)"
            low, high = measured.min(1), measured.max(1)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(steps, measured.reshape(len(steps), -1).mean(1), label=name, **style)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if len(steps) <= FEW:
            axes.set_xticks(steps)
            axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(xlabel, fontsize=SIZE)
    axes.set_ylabel(ylabel, fontsize=SIZE)
    figure.legend(
        loc="outside lower center",
        ncols=min(len(values), 1 + (len(values) > 1) + (len(values) > 8)),
        frameon=False,
        fontsize=SIZE,
        handlelength=4,
    )
    return finish(figure)


def stacked_bar(
    names: Sequence[str], values: Sequence[float], *, label: str, title: str = ""
) -> Figure:
    """Plots parts of a whole as one bar, in the order given, with their shares in the legend.

    Args:
      names: of the parts.
      values: [names], none negative.
      label: axis label.
      title: above the figure.
    """
    figure, axes = page_axes(150, title)
    begins = np.concatenate([[0.0], np.cumsum(values)[:-1]])
    whole = float(np.sum(values)) or 1.0
    for index, (name, begin, value) in enumerate(zip(names, begins, values, strict=True)):
        turn, number = divmod(index, len(LINES))
        share = f"{name}, {value / whole:.1%}"
        (part,) = axes.barh(0, value, left=begin, label=share, color=LINES[number])
        part.set(edgecolor="white", linewidth=0.5, hatch=HATCHES[turn])
    axes.set_xlim(0, whole)
    axes.set_yticks([])
    axes.set_xlabel(label, fontsize=SIZE)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SIZE)
    return finish(figure)


def bars(
    names: Sequence[str],
    values: np.ndarray,
    intervals: np.ndarray | None = None,
    *,
    label: str,
    title: str = "",
) -> Figure:
    """Plots measurements in the order given, first on top: points with their intervals.

    Args:
      names: of the values.
      values: [names].
      intervals: [names, 2], the lower and the upper end of each.
      label: axis label.
      title: above the figure.
    """
    figure, axes = page_axes(72 + 1.8 * SIZE * len(names), title)
    rows = np.arange(len(names))
    if intervals is not None:
        low, high = np.asarray(intervals).T
        axes.hlines(rows, low, high, color=LINES[0], linewidth=1.4)
        for ends in (low, high):
            axes.plot(ends, rows, "|", color=LINES[0], markersize=6)
    axes.plot(values, rows, "o", color=LINES[1], markersize=5)
    axes.set_yticks(rows, names, fontsize=SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=SIZE)
    printed = axes.secondary_yaxis("right")
    decimals = max(0, 3 - math.floor(math.log10(np.max(np.abs(values)) or 1)))
    printed.set_yticks(rows, [f"{value:.{decimals}f}" for value in values], fontsize=SIZE)
    for side in (axes, printed):
        side.tick_params(axis="y", length=0)
    printed.spines["right"].set_visible(False)
    return finish(figure)
