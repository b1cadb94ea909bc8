"""Figure layout in points: a title, a content area, and a colour bar."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from gptjax.plots.inline import COLOUR_BAR, InlineFigure
from gptjax.plots.legible import HATCH, HIDDEN, LINE, SMALLEST, Colours, shorten, widest, wrap

MARGIN, GAP = 6.0, 4.0  # Points around a figure, and between its parts.
LARGEST, TITLE = 8.0, 10.0  # Points of the largest text, and of the title.
NAME = LINE * LARGEST + GAP  # Points for an axis label.
BAR = 3 * LINE * LARGEST  # Points for a colour bar with its numbers and its label.
LABEL = 72.0  # Widest tick label in points: fits "implementation".


class Sheet:
    """A figure around a content area of a given size in points."""

    def __init__(
        self, width: float, height: float, *, title: str, left: float = 0, below: float = 0
    ) -> None:
        """A content area of `width` and `height`, with `left` and `below` points for labels.

        A margin is around all, space for a colour bar at the bottom, the title on top.
        """
        self.left, self.bottom = MARGIN + left, MARGIN + BAR + GAP + below
        self.width, self.height = width, height
        self.across = max(self.left + width + 2 * MARGIN, 180.0)
        title = wrap(title, TITLE, self.across - 2 * MARGIN)
        above = (title.count("\n") + 1) * LINE * TITLE + GAP if title else 0
        self.tall = self.bottom + height + above + MARGIN
        self.figure = InlineFigure(figsize=(self.across / 72, self.tall / 72))
        self.figure.suptitle(title, y=1 - MARGIN / self.tall, fontsize=TITLE, va="top")

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Returns axes at an offset in points from the lower left of the content area."""
        return self._axes(self.left + left, self.bottom + bottom, width, height)

    def _axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        box = (left / self.across, bottom / self.tall, width / self.across, height / self.tall)
        return self.figure.add_axes(box)

    def name_axes(self, across: str, down: str) -> None:
        """Label the columns and the rows of the content area."""
        centre = (self.left + self.width / 2) / self.across
        middle = (self.bottom + self.height / 2) / self.tall
        low, left = (MARGIN + BAR + GAP) / self.tall, MARGIN / self.across
        self.figure.supxlabel(across, x=centre, y=low, fontsize=LARGEST, va="bottom")
        self.figure.supylabel(down, x=left, y=middle, fontsize=LARGEST, ha="left")

    def colour_bar(self, colours: Colours, label: str) -> None:
        """Draw a colour bar at the bottom."""
        long = min(max(self.width, 100.0), 200.0)
        begin = self.left + (self.width - long) / 2
        begin = min(max(begin, 3 * MARGIN), self.across - long - 3 * MARGIN)
        bar = self._axes(begin, MARGIN + 2 * LINE * LARGEST, long, LARGEST)
        self.figure.colorbar(colours.mappable(), cax=bar, orientation="horizontal")
        bar.set_label(COLOUR_BAR)
        bar.set_xlabel(label, fontsize=LARGEST, labelpad=1)
        bar.tick_params(labelsize=LARGEST - 1, length=2, pad=1)
        bar.locator_params(nbins=5)


def draw_cells(
    axes: Axes, values: np.ndarray, colours: Colours, hidden: np.ndarray | None = None
) -> None:
    """Draw a heat map of values [R, C], hatched where `hidden` [R, C]."""
    shown = values if hidden is None else np.ma.masked_array(values, hidden)
    axes.imshow(shown, cmap=colours.cmap, norm=colours.norm, aspect="auto")
    if hidden is None or not hidden.any():
        return
    paths = []
    for row, line in enumerate(hidden):
        ends = np.flatnonzero(np.diff(line.astype(int), prepend=0, append=0)).reshape(-1, 2) - 0.5
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
        paths += [Path(corners * [b - a, 1] + [a, row - 0.5], closed=True) for a, b in ends]
    rectangles = Path.make_compound_path(*paths)
    style = {"facecolor": HIDDEN, "edgecolor": HATCH, "linewidth": 0}
    axes.add_patch(PathPatch(rectangles, hatch="/////", **style))


def hidden_cells(weights: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    """Returns where weights [..., T, S] are masked, as a bool array of their shape.

    None takes the causal mask, if all weights there are 0.
    """
    if hidden is None:
        queries, keys = weights.shape[-2:]
        later = np.triu(np.ones((queries, keys), bool), 1)
        hidden = later if queries == keys and not weights[..., later].any() else np.zeros(1, bool)
    return np.broadcast_to(hidden, weights.shape)


def weight_label(hidden: np.ndarray) -> str:
    """Returns the colour bar label of attention weights, with the hatching if there is any."""
    return f"attention weight{'; hatched: mask' if hidden.any() else ''}"


@dataclasses.dataclass(frozen=True)
class Ticks:
    """Tick labels along one side of a heat map: every `step`-th from the first, as space allows."""

    labels: list[str]
    step: int
    size: float
    turned: bool = False

    @property
    def depth(self) -> float:
        """Height of column labels in points."""
        return widest(self.labels, self.size) if self.turned else LINE * self.size

    def put(self, axis: Axis) -> None:
        """Set the ticks of an axis."""
        ticks, shown = range(0, len(self.labels), self.step), self.labels[:: self.step]
        axis.set_ticks(ticks, shown, fontsize=self.size, rotation=90 if self.turned else 0)
        axis.set_tick_params(length=0, pad=2)

    def named(self, what: str) -> str:
        """Returns an axis label that says how many tick labels are shown."""
        return what if self.step == 1 else f"{what} (1 in {self.step} labelled)"


def row_ticks(labels: Sequence[str], pitch: float) -> Ticks:
    """Returns tick labels of rows that are `pitch` points high."""
    size = min(max(pitch / LINE, SMALLEST), LARGEST)
    step = math.ceil(LINE * SMALLEST / pitch)
    return Ticks([shorten(label, size, LABEL) for label in labels], step, size)


def column_ticks(labels: Sequence[str], pitch: float) -> Ticks:
    """Returns tick labels of columns `pitch` points wide: rotated if more fit then."""
    lying = row_ticks(labels, pitch)
    apart = 1 if max(map(len, labels)) == 1 else GAP
    step = math.ceil((widest(lying.labels, lying.size) + apart) / pitch)
    if step <= lying.step:
        return dataclasses.replace(lying, step=step)
    return dataclasses.replace(lying, turned=True)
