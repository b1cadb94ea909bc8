"""Heat maps: one head's attention, heads by layer, layers by token."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from gptjax.plots.legible import (
    LINE,
    PAGE,
    SMALLEST,
    Colours,
    finish,
    ink,
    scale,
    shorten,
    text_width,
    widest,
    wrap,
)

MARGIN, GAP = 6.0, 4.0  # Points around a figure, and between its parts.
LARGEST = 8.0  # Points of the largest text but the title.
TITLE = 10.0
LABEL = 60.0  # Points that a label may take.
BAR = 3 * LINE * LARGEST + GAP  # Points that a colour bar takes, with its numbers and its label.
LONGEST = 640.0  # Points that the cells take of a page, from top to bottom.


@dataclasses.dataclass(frozen=True)
class Ticks:
    """Labels along one side of a heat map: as many as there is room for.

    They begin with the first, and one in `step` is there.
    """

    labels: list[str]
    step: int
    size: float
    turned: bool

    @property
    def depth(self) -> float:
        """Points that they take away from the map."""
        return widest(self.labels, self.size) if self.turned else LINE * self.size

    def put(self, axis: Axis) -> None:
        """Write them."""
        places = range(0, len(self.labels), self.step)
        shown = self.labels[:: self.step]
        axis.set_ticks(places, shown, fontsize=self.size, rotation=90 if self.turned else 0)
        axis.set_tick_params(length=0, pad=2)

    def named(self, what: str) -> str:
        """What an axis is called, and how many of its labels are missing."""
        return what if self.step == 1 else f"{what} (one in {self.step} is named)"


def row_ticks(labels: Sequence[str], pitch: float) -> Ticks:
    """Labels of rows that are `pitch` points high."""
    step = math.ceil(LINE * SMALLEST / pitch)
    size = min(max(pitch / LINE, SMALLEST), LARGEST)
    return Ticks([shorten(label, size, LABEL) for label in labels], step, size, turned=False)


def column_ticks(labels: Sequence[str], pitch: float) -> Ticks:
    """Labels of columns that are `pitch` points wide: turned where that leaves room for more."""
    turned = row_ticks(labels, pitch)
    lying = math.ceil((widest(turned.labels, turned.size) + 2) / pitch)
    if lying <= turned.step:
        return dataclasses.replace(turned, step=lying)
    return dataclasses.replace(turned, turned=True)


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    names: tuple[str, str],
    cell: tuple[float, float],
    label: str,
    title: str,
    most: float | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    printed: bool = True,
    upwards: bool = False,
) -> Figure:
    """A figure of one heat map with its labels and, below, what its colours mean.

    Args:
      values: [R, C].
      rows, columns: R and C labels.
      names: what the rows are, and the columns.
      cell: the largest width and height of a cell in points; a page makes them smaller.
      label: what the values are.
      title: above the map.
      most: the value at which the colours end; else the largest.
      texts: [R][C], to be printed in the cells, shortened where they must be.
      printed: without `texts`, print the values where they fit. Where they do not, a minus
        sign marks negative ones, which grey would not tell from positive ones.
      upwards: the first row is at the bottom.
    """
    height = min(cell[1], LONGEST / len(rows))
    down = row_ticks(rows, height)
    left = MARGIN + LINE * LARGEST + widest(down.labels, down.size) + GAP
    width = min(cell[0], (PAGE - left - 2 * MARGIN) / len(columns))
    along = column_ticks(columns, width)
    bottom = MARGIN + BAR + 2 * GAP + LINE * LARGEST + along.depth
    across = max(left + width * len(columns) + 2 * MARGIN, 180.0)
    title = wrap(title, TITLE, across - 2 * MARGIN)
    lines = title.count("\n") + 1 if title else 0
    tall = bottom + height * len(rows) + 2 * MARGIN + lines * LINE * TITLE

    figure = Figure(figsize=(across / 72, tall / 72))
    size = (width * len(columns) / across, height * len(rows) / tall)
    axes = figure.add_axes((left / across, bottom / tall, *size))
    colours = scale(values, most)
    axes.imshow(values, cmap=colours.cmap, norm=colours.norm, aspect="auto")
    if upwards:
        axes.invert_yaxis()
    down.put(axes.yaxis)
    along.put(axes.xaxis)
    middle = bottom / tall + size[1] / 2
    figure.supylabel(down.named(names[0]), x=MARGIN / across, y=middle, fontsize=LARGEST, ha="left")
    under = (MARGIN + BAR + GAP) / tall
    centre = left / across + size[0] / 2
    figure.supxlabel(along.named(names[1]), x=centre, y=under, fontsize=LARGEST, va="bottom")
    colour_bar(figure, colours, label, left=left, width=width * len(columns))
    figure.suptitle(title, y=1 - MARGIN / tall, fontsize=TITLE, va="top")
    if texts:
        shown = [[shorten(text, SMALLEST, width - 2) for text in row] for row in texts]
    else:
        shown = _numbers(values, width if printed else 0)
    _write(axes, colours, values, shown, (width, height))
    return finish(figure)


def colour_bar(figure: Figure, colours: Colours, label: str, *, left: float, width: float) -> None:
    """What the colours mean, at the bottom of a figure: at `left` points, under `width` points."""
    across, tall = 72 * figure.get_size_inches()
    long = min(max(width, 100.0), 200.0)
    begin = min(left + (width - long) / 2, across - long - 2 * MARGIN)
    low = MARGIN + 2 * LINE * LARGEST
    bar = figure.add_axes((begin / across, low / tall, long / across, LARGEST / tall))
    figure.colorbar(colours.mappable(), cax=bar, orientation="horizontal")
    bar.set_xlabel(label, fontsize=LARGEST, labelpad=1)
    bar.tick_params(labelsize=LARGEST - 1, length=2, pad=1)
    bar.locator_params(nbins=5)


def _numbers(values: np.ndarray, width: float) -> list[list[str]]:
    """The values in two places where all fit into `width` points; else which are negative.

    What a mask has left, exactly 0, is not printed.
    """
    shown = [
        [f"{value:.2f}" if value and np.isfinite(value) else "" for value in row] for row in values
    ]
    if max(widest(row, SMALLEST) for row in shown) + 2 <= width:
        return shown
    clear = -0.1 * np.nanmax(np.abs(values), initial=0)
    return [["\N{MINUS SIGN}" if value < clear else "" for value in row] for row in values]


def _write(
    axes: Axes,
    colours: Colours,
    values: np.ndarray,
    shown: list[list[str]],
    cell: tuple[float, float],
) -> None:
    """Print texts in cells of so many points, unless one line is too high for them."""
    width, height = cell
    longest = max(widest(row, 1.0) for row in shown)
    if not longest or height < SMALLEST:
        return
    size = max(SMALLEST, min(LARGEST - 1, (width - 2) / longest, height / LINE))
    for (row, column), value in np.ndenumerate(values):
        text = shown[row][column]
        if text and text_width(text, size) <= width:
            axes.text(
                column,
                row,
                text,
                color=ink(colours.of(value)),
                fontsize=size,
                ha="center",
                va="center_baseline",
            )


def attention_map(
    weights: np.ndarray,
    tokens: Sequence[str],
    title: str = "",
    *,
    columns: Sequence[str] | None = None,
) -> Figure:
    """One head's attention, large: a row is a token that looks, a column one that is looked at.

    Weights are printed where there are at most 12 tokens.

    Args:
      weights: [T, S], each row summing to 1.
      tokens: T labels.
      title: above the map.
      columns: S labels, where the keys are other tokens than the queries.
    """
    columns = tokens if columns is None else columns
    side = min(30.0, (PAGE - 40) / len(columns), LONGEST / len(tokens))
    return heat_map(
        weights,
        tokens,
        columns,
        names=("looks", "is looked at"),
        cell=(side, side),
        label="attention weight",
        title=title,
        most=1.0,
        printed=max(weights.shape) <= 12,
    )


def score_grid(values: np.ndarray, *, label: str, title: str = "") -> Figure:
    """A value for every head: a row is a layer, a column a head; about 0 if some are negative.

    Args:
      values: [L, N], printed where they fit.
      label: what they are.
      title: above the grid.
    """
    layers, heads = (list(map(str, range(size))) for size in values.shape)
    cell = (30.0, 18.0)
    return heat_map(
        values, layers, heads, names=("layer", "head"), cell=cell, label=label, title=title
    )


def patching_map(
    values: np.ndarray,
    tokens: Sequence[str],
    *,
    label: str,
    title: str = "",
    rows: str = "layer",
) -> Figure:
    """What a change at each layer and token does: layers upwards; about 0 if some are negative.

    Args:
      values: [L, T], printed where they fit.
      tokens: T labels.
      label: what the values are.
      title: above the map.
      rows: what a row is.
    """
    return heat_map(
        values,
        list(map(str, range(len(values)))),
        tokens,
        names=(rows, "position"),
        cell=(30.0, 18.0),
        label=label,
        title=title,
        upwards=True,
    )


def logit_lens_table(
    tokens: Sequence[str],
    guesses: Sequence[Sequence[str]],
    values: np.ndarray,
    title: str = "",
    *,
    label: str = "probability",
) -> Figure:
    """What the model would say after each layer, layers upwards, coloured by a value.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". A guess that is wider than
    its cell is cut with an ellipsis: twenty positions leave room for words.

    Args:
      tokens: T labels of the inputs.
      guesses: [L+1][T] labels, the embeddings' first.
      values: [L+1, T].
      title: above the table.
      label: what the values are.
    """
    wanted = max(widest(list(row), SMALLEST + 1) for row in guesses) + 4
    return heat_map(
        values,
        ["embedding", *map(str, range(len(values) - 1))],
        tokens,
        names=("after layer", "input"),
        cell=(min(max(wanted, 16.0), LABEL), 16.0),
        label=label,
        title=title,
        most=1.0 if np.nanmin(values) >= 0 and np.nanmax(values) <= 1 else None,
        texts=guesses,
        upwards=True,
    )
