"""Figures that compare variants: differences, costs, learning rates, model sizes.

A variant has the same colour, dashes and marker in all of them, by its index among the names. NaN
is unknown and not drawn.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from gptjax.plots.curves import FEW, SIZE, line_style, page_axes
from gptjax.plots.inline import InlineFigure
from gptjax.plots.legible import LINE, LINES, PAGE, finish, wrap
from gptjax.plots.names import NAME, legend_below, legend_height, name_label, pitch

SIGNS = (("v", LINES[0]), ("^", LINES[1]), ("o", "0.45"))
"""Marker and colour of a difference below zero, above zero, and not separated."""
PANEL, WIDE_PANEL = 145.0, 250.0
"""Width in points of the smallest panel, and of one with markers of all variants."""


class Points(NamedTuple):
    """Measurements of a variant along an axis."""

    x: np.ndarray
    """[points]."""
    values: np.ndarray
    """[points, seeds]."""


def differences(
    names: Sequence[str],
    intervals: np.ndarray,
    *,
    runs: Sequence[np.ndarray] = (),
    separated: Sequence[bool] = (),
    label: str,
    sides: tuple[str, str],
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """Plots differences with their intervals against a line at zero, first on top.

    Separated ones, whose interval excludes zero, have the marker and colour of their side; the
    others are grey and hollow. Values are printed beside the rows, unknown ones too.

    Args:
      names: of the variants.
      intervals: [names, 3], the difference and the ends of its interval; NaN where there is none.
      runs: [names] of [seeds], differences of single seeds, as dots; empty leaves them out.
      separated: [names], whether a verdict allows colouring by side; empty allows all.
      label: axis label.
      sides: meaning of below zero, and of above.
      title: above the figure.
      width: in points, `PAGE` or `NARROW`.
    """
    room = NAME * width / PAGE
    figure, axes = page_axes(100 + pitch(names, room) * len(names), title, width)
    intervals = np.asarray(intervals, float).reshape(-1, 3)
    axes.axvline(0, color="0.2", linewidth=1)
    for row, (middle, low, high) in enumerate(intervals):
        sign = 0 if high < 0 else 1 if low > 0 else 2
        sign = sign if not separated or separated[row] else 2
        marker, colour = SIGNS[sign]
        axes.hlines(row, low, high, color=colour, linewidth=1.6)
        axes.plot([low, high], [row, row], "|", color=colour, markersize=7)
        face = "white" if sign == 2 else colour
        axes.plot(middle, row, marker, color=colour, markerfacecolor=face, markersize=6)
    for row, values in enumerate(runs):
        axes.plot(values, np.full(len(values), row + 0.28), ".", color="0.55", markersize=3)
    shown = np.concatenate([intervals.ravel(), *runs])
    reach = np.abs(shown[np.isfinite(shown)]).max(initial=0) or 1
    axes.set_xlim(-1.08 * reach, 1.08 * reach)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [name_label(name, room) for name in names], fontsize=SIZE)
    axes.set_xlabel(wrap(label, SIZE, width - room - 60), fontsize=SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(int(width // 80)))
    for side, (words, end) in enumerate(zip(sides, (0.0, 1.0), strict=True)):
        axes.annotate(
            f"◀ {words}" if side == 0 else f"{words} ▶",
            (end, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            ha=("left", "right")[side],
            fontsize=SIZE,
        )
    printed = axes.secondary_yaxis("right")
    values = ["unknown" if np.isnan(middle) else signed(middle) for middle in intervals[:, 0]]
    printed.set_yticks(range(len(names)), values, fontsize=SIZE)
    for side in (axes, printed):
        side.tick_params(axis="y", length=0)
    printed.spines["right"].set_visible(False)
    return finish(figure)


def signed(value: float) -> str:
    """Returns a difference of losses with its sign, to four decimals."""
    return f"{value:+z.4f}".replace("-", "−")


def curves_by_variant(
    curves: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """Plots measurements over training, each variant at its own steps: mean, and range as a band.

    The y axis is cut off above the values after a fifth of training, as all fall steeply before.

    Args:
      curves: by name; empty points if unknown.
      xlabel, ylabel: axis labels.
      title: above the figure.
      width: in points, `PAGE` or `NARROW`.
    """
    figure, axes = page_axes(250 + legend_height(list(curves), width), title, width)
    for index, (name, (x, values)) in enumerate(curves.items()):
        style = line_style(index, len(x))
        if len(x):
            low, high = values.min(1), values.max(1)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(x, values.mean(1), label=name_label(name), **style)
    _end_after_a_fifth(axes, list(curves.values()))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(xlabel, fontsize=SIZE)
    axes.set_ylabel(ylabel, fontsize=SIZE)
    legend_below(figure, axes)
    return finish(figure)


def difference_panels(
    curves: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """Plots differences over training, one panel each: mean, range as a band, a line at zero.

    All panels share their axes, cut off at the values after a fifth of training, as the first steps
    would hide the rest.

    Args:
      curves: by name.
      xlabel, ylabel: axis labels.
      title: above the figure.
      width: in points, `PAGE` or `NARROW`.
    """
    columns = min(int(width // PANEL), len(curves))
    rows = -(-len(curves) // columns)
    titles = [name_label(name, width / columns - 40) for name in curves]
    lines = max(title.count("\n") for title in titles)
    height = 60 + (105 + LINE * SIZE * lines) * rows
    figure = InlineFigure(figsize=(width / 72, height / 72), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name, (x, values) in zip(panels, titles, curves.values(), strict=False):
        mean, low, high = values.mean(1), values.min(1), values.max(1)
        axes.axhline(0, color="0.2", linewidth=0.8)
        axes.fill_between(x, low, high, color=LINES[0], alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=LINES[0], linewidth=1.4)
        axes.set_title(name, fontsize=SIZE)
        axes.tick_params(labelsize=SIZE - 1)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    _end_after_a_fifth(panels[0], list(curves.values()), both=True)
    for axes in panels[len(curves) :]:
        axes.remove()
    for axes in panels[max(0, len(curves) - columns) : len(curves)]:
        axes.tick_params(labelbottom=True)
    if title:
        figure.suptitle(wrap(title, SIZE + 1, width - 60), fontsize=SIZE + 1)
    figure.supxlabel(xlabel, fontsize=SIZE)
    figure.supylabel(ylabel, fontsize=SIZE)
    return finish(figure)


def frontier(
    names: Sequence[str],
    costs: Mapping[str, np.ndarray],
    intervals: np.ndarray,
    *,
    ylabel: str,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """Plots loss against cost, one panel per cost, with the Pareto front as a line.

    Args:
      names: of the variants.
      costs: [names] by axis label, lower is better; NaN if unknown.
      intervals: [names, 3], the loss, lower is better, and the ends of its interval.
      ylabel: axis label of the loss.
      title: above all panels.
      width: in points, `PAGE` or `NARROW`.
    """
    columns = min(int(width // WIDE_PANEL), len(costs))
    rows = -(-len(costs) // columns)
    height = 240 * rows + legend_height(names, width)
    figure = InlineFigure(figsize=(width / 72, height / 72), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, (xlabel, cost) in zip(panels, costs.items(), strict=True):
        middle = intervals[:, 0]
        front = pareto(cost, middle)
        axes.step(cost[front], middle[front], where="post", color="0.6", linewidth=1, zorder=1)
        for index, name in enumerate(names):
            style = {**line_style(index, 1), "markersize": 6, "linestyle": ""}
            axes.vlines(cost[index], *intervals[index, 1:], color=style["color"], linewidth=1)
            axes.plot(cost[index], middle[index], label=name_label(name), **style)
        axes.plot(
            cost[front],
            middle[front],
            "o",
            color="0.3",
            markerfacecolor="none",
            markersize=11,
            label="Pareto front",
        )
        axes.tick_params(labelsize=SIZE)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(xlabel, fontsize=SIZE)
    for axes in panels[::columns]:
        axes.set_ylabel(ylabel, fontsize=SIZE)
    if title:
        figure.suptitle(wrap(title, SIZE + 1, width - 60), fontsize=SIZE + 1)
    legend_below(figure, panels[0])
    return finish(figure)


def pareto(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Returns the indices [front] of the Pareto front, by rising cost; no NaN."""
    front: list[int] = []
    for index in np.lexsort((loss, cost)):
        known = np.isfinite(cost[index]) and np.isfinite(loss[index])
        if known and (not front or loss[index] < loss[front[-1]]):
            front.append(int(index))
    return np.array(front, int)


def loss_by_rate(
    searched: Mapping[str, Points],
    chosen: Sequence[float],
    *,
    ylabel: str,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """Plots loss by learning rate: the mean over seeds, a dot per seed, a ring if chosen.

    The y axis is cut off at four times the distance from the best to the median of all, so that a
    diverging rate does not hide the others.

    Args:
      searched: by name, losses at rates; NaN where a run failed.
      chosen: [names], the chosen rate.
      ylabel: axis label.
      title: above the figure.
      width: in points, `PAGE` or `NARROW`.
    """
    figure, axes = page_axes(230 + legend_height(list(searched), width), title, width)
    for index, ((name, (rates, losses)), taken) in enumerate(
        zip(searched.items(), chosen, strict=True)
    ):
        style = line_style(index, len(rates))
        mean = losses.mean(1)
        axes.plot(rates, mean, label=name_label(name), **style)
        axes.plot(rates, losses, ".", color=style["color"], markersize=3)
        ring = {"color": style["color"], "markerfacecolor": "none", "markersize": 11}
        axes.plot(rates[rates == taken], mean[rates == taken], "o", **ring)
    axes.set_xscale("log")
    rates = np.unique(np.concatenate([points.x for points in searched.values()]))
    _label_ticks(axes.xaxis, rates if len(rates) <= FEW else _round(*axes.get_xlim()))
    axes.xaxis.set_major_formatter("{x:g}")
    known = np.concatenate([points.values.ravel() for points in searched.values()])
    known = known[np.isfinite(known)]
    if len(known):
        reach = 4 * (np.median(known) - known.min())
        if 0 < reach < known.max() - known.min():
            axes.set_ylim(known.min() - 0.08 * reach, known.min() + reach)
    axes.set_xlabel("peak learning rate", fontsize=SIZE)
    axes.set_ylabel(ylabel, fontsize=SIZE)
    legend_below(figure, axes)
    return finish(figure)


class FittedLine(NamedTuple):
    """A fitted law along an axis, with its bootstrap interval."""

    x: np.ndarray
    """[points]."""
    values: np.ndarray
    """[points]."""
    low: np.ndarray
    """[points]."""
    high: np.ndarray
    """[points]."""


def scaling(
    measured: Mapping[str, Points],
    fitted: Mapping[str, FittedLine],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """Plots losses over sizes, log-log: a marker per run, a line per law, its interval as a band.

    Args:
      measured: losses at sizes, by name.
      fitted: laws by the same names, where one could be fitted.
      xlabel, ylabel: axis labels.
      title: above the figure.
      width: in points, `PAGE` or `NARROW`.
    """
    figure, axes = page_axes(280 + legend_height(list(measured), width), title, width)
    for index, (name, (x, values)) in enumerate(measured.items()):
        style = line_style(index, 1)
        if name in fitted:
            line = fitted[name]
            axes.plot(line.x, line.values, **{**style, "marker": None})
            axes.fill_between(
                line.x, line.low, line.high, color=style["color"], alpha=0.12, linewidth=0
            )
        across = np.repeat(x, values.shape[1])
        axes.plot(
            across, values.ravel(), **{**style, "linestyle": "", "markersize": 4, "alpha": 0.6}
        )
        axes.plot([], [], label=name_label(name), **style)
    axes.set(xscale="log", yscale="log")
    for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        _label_ticks(axis, _round(*ends))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(xlabel, fontsize=SIZE)
    axes.set_ylabel(ylabel, fontsize=SIZE)
    legend_below(figure, axes)
    return finish(figure)


def _end_after_a_fifth(axes: Axes, curves: Sequence[Points], *, both: bool = False) -> None:
    """Limit the y axis to the values after the first fifth of training."""
    late = [points.values[points.x >= 0.2 * points.x.max()] for points in curves if len(points.x)]
    known = np.concatenate([values.ravel() for values in late]) if late else np.empty(0)
    known = known[np.isfinite(known)]
    if not len(known):
        return
    low, high = (min(known.min(), 0), max(known.max(), 0)) if both else (known.min(), known.max())
    room = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - room, high + room)


def _round(low: float, high: float) -> np.ndarray:
    """Returns a few round tick positions of a logarithmic axis."""
    if high / low < 10:
        ticks = np.array(MaxNLocator(5).tick_values(low, high))
    else:
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
        ticks = np.sort(np.outer((1,) if high / low > 1000 else (1, 2, 5), decades).ravel())
    return ticks[(ticks >= low) & (ticks <= high)]


def _label_ticks(axis: Axis, ticks: np.ndarray) -> None:
    """Label exactly these ticks of an axis."""
    axis.set_major_locator(FixedLocator(ticks.tolist()))
    axis.set_minor_locator(NullLocator())
