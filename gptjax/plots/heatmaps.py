"""Heat maps: one head's attention, heads by layer, layers by token."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.config import InputError
from gptjax.plots.legible import (
    CLEAR,
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
)
from gptjax.plots.sheet import (
    LABEL,
    LARGEST,
    MARGIN,
    NAME,
    Sheet,
    column_ticks,
    draw_cells,
    hidden_cells,
    row_ticks,
    weight_label,
)

LONGEST = 620.0  # Greatest height of the cells, points.
MINUS = "\N{MINUS SIGN}"


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
    hidden: np.ndarray | None = None,
) -> Figure:
    """Plots one heat map with labels and a colour bar.

    Args:
      values: [R, C].
      rows, columns: R and C labels.
      names: of rows and columns.
      cell: the largest width and height of a cell in points; shrunk to fit the page.
      label: label of the colour bar.
      title: above the map.
      most: upper end of the colours, which then begin at 0; else they go from the minimum to the
      maximum, or symmetrically about 0 if some are negative.
      texts: [R][C], printed in the cells, shortened to fit. Without, the values are printed if they
      fit; else a minus sign marks negative ones, which greyscale would not distinguish.
      hidden: [R, C], bool, cells without a value, which are hatched; None for none.

    Raises:
      InputError: numbers of labels that do not match rows and columns.
    """
    if values.shape != (len(rows), len(columns)):
        raise InputError(
            f"values have shape {values.shape}: there are labels for {len(rows)} rows and "
            f"{len(columns)} columns."
        )
    height = min(cell[1], LONGEST / len(rows))
    down = row_ticks(rows, height)
    left = NAME + widest(down.labels, down.size)
    width = min(cell[0], (PAGE - left - 3 * MARGIN) / len(columns))
    along = column_ticks(columns, width)
    below = along.depth + NAME
    size = (width * len(columns), height * len(rows))
    sheet = Sheet(*size, title=title, left=left, below=below)
    axes = sheet.axes(0, 0, *size)
    colours = scale(values, most)
    draw_cells(axes, values, colours, hidden)
    axes.spines[:].set_linewidth(0.5)
    down.put(axes.yaxis)
    along.put(axes.xaxis)
    sheet.name_axes(along.named(names[1]), down.named(names[0]))
    sheet.colour_bar(colours, label)
    if texts is None:
        shown = _numbers(values, colours, width)
    else:
        shown = [[shorten(text, SMALLEST, width - 2) for text in row] for row in texts]
    _write(axes, colours, values, shown, (width, height))
    return finish(sheet.figure)


def _numbers(values: np.ndarray, colours: Colours, width: float) -> list[list[str]]:
    """Returns the values as text if all fit into `width` points, else a minus for negative ones."""
    largest, least = colours.largest, max(0.0, colours.least)
    power = math.floor(math.log10(largest - least))
    places = max(0, 2 - power if power >= 0 else 1 - power)
    shown = [
        [f"{value:z.{places}f}".replace("-", MINUS) if np.isfinite(value) else "" for value in row]
        for row in values
    ]
    if max(widest(row, SMALLEST) for row in shown) + 2 <= width:
        return shown
    return [[MINUS if value < -CLEAR * largest else "" for value in row] for row in values]


def _write(
    axes: Axes,
    colours: Colours,
    values: np.ndarray,
    shown: Sequence[Sequence[str]],
    cell: tuple[float, float],
) -> None:
    """Print texts in cells of this size in points, where they fit."""
    width, height = cell
    longest = max(widest(row, 1.0) for row in shown)
    if not longest or height < SMALLEST:
        return
    size = max(SMALLEST, min(LARGEST - 1, (width - 2) / longest, height / LINE))
    cells = [(row, column) for row, texts in enumerate(shown) for column in range(len(texts))]
    for row, column in cells:
        text = shown[row][column]
        if text and text_width(text, size) <= width:
            axes.text(
                column,
                row,
                text,
                color=ink(colours.of(values[row, column])),
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
    hidden: np.ndarray | None = None,
) -> Figure:
    """Plots one head's attention: a row is a query, a column a key.

    Masked keys are hatched. With at most 12 tokens the other weights are printed.

    Args:
      weights: [T, S], each row summing to 1.
      tokens: T labels.
      title: above the map.
      columns: S labels, where the keys are other tokens than the queries.
      hidden: [T, S], bool, masked keys; None takes the causal mask, if all weights there are 0.
    """
    hidden = hidden_cells(weights, hidden)
    columns = tokens if columns is None else columns
    side = min(30.0, (PAGE - 40) / len(columns), LONGEST / len(tokens))
    few = max(weights.shape) <= 12
    return heat_map(
        weights,
        tokens,
        columns,
        names=("query", "key"),
        cell=(side, side),
        label=weight_label(hidden),
        title=title,
        most=1.0,
        texts=np.where(hidden | (not few), "", np.char.mod("%.2f", weights)).tolist(),
        hidden=hidden,
    )


def restored(values: np.ndarray, clean: float, corrupted: float) -> np.ndarray:
    """Returns a metric after patching, normalised: 0 is the corrupted run, 1 the clean run.

    Raises:
      InputError: both runs have the same metric.
    """
    if clean == corrupted:
        raise InputError(f"clean and corrupted are both {clean:g}: there is nothing to restore.")
    return (values - corrupted) / (clean - corrupted)


def _metric(
    values: np.ndarray, label: str, clean: float | None, corrupted: float | None
) -> tuple[np.ndarray, str]:
    """Returns the values and their label, normalised by the two runs if given.

    Raises:
      InputError: one of them alone, or as `restored`.
    """
    if clean is None and corrupted is None:
        return values, label
    if clean is None or corrupted is None:
        raise InputError("clean and corrupted must be given together.")
    return restored(values, clean, corrupted), f"{label}: 0 as corrupted, 1 as clean"


def score_grid(
    values: np.ndarray,
    *,
    label: str,
    title: str = "",
    clean: float | None = None,
    corrupted: float | None = None,
) -> Figure:
    """Plots a value per head: a row is a layer, the first on top, a column a head.

    Colours go from the minimum to the maximum, or symmetrically about 0 if some are negative.

    Args:
      values: [L, N], printed where they fit.
      label: what they are.
      title: above the grid.
      clean, corrupted: the metric of both runs, by which values are normalised (`restored`).
    """
    values, label = _metric(values, label, clean, corrupted)
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
    clean: float | None = None,
    corrupted: float | None = None,
) -> Figure:
    """Plots the effect of patching each layer and token, the first layer on top.

    Colours go from the minimum to the maximum, or symmetrically about 0 if some are negative.

    Args:
      values: [L, T], printed where they fit.
      tokens: T labels.
      label: what the values are.
      title: above the map.
      rows: what a row is.
      clean, corrupted: the metric of both runs, by which values are normalised (`restored`).
    """
    values, label = _metric(values, label, clean, corrupted)
    return heat_map(
        values,
        list(map(str, range(len(values)))),
        tokens,
        names=(rows, "position"),
        cell=(30.0, 18.0),
        label=label,
        title=title,
    )


def logit_lens_table(
    tokens: Sequence[str],
    guesses: Sequence[Sequence[str]],
    values: np.ndarray,
    title: str = "",
    *,
    label: str = "probability",
) -> Figure:
    """Plots the logit lens: predictions after each layer, embeddings on top, coloured by a value.

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
    )
