"""Attention of all heads of all layers in one grid."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from gptjax.config import InputError
from gptjax.plots.legible import LINE, PAGE, SMALLEST, finish, scale, text_width, widest
from gptjax.plots.sheet import (
    GAP,
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


def attention_grid(
    weights: np.ndarray,
    tokens: Sequence[str],
    title: str = "",
    *,
    columns: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    hidden: np.ndarray | None = None,
    names: tuple[str, str] = ("query", "key"),
) -> Figure:
    """Plots the attention of all heads: a row of the grid is a layer, the first on top.

    A column is a head. In a panel, a row is a query and a column a key; each row sums to 1, and
    masked keys are hatched. The grid is a page wide at most: if a panel has no room for all token
    labels, it shows one in several and says so; small panels are titled 3.5 for layer 3, head 5.

    Args:
      weights: [L, N, T, S].
      tokens: T labels.
      title: above the grid.
      columns: S labels, where the keys are other tokens than the queries.
      layers, heads: the L and N numbers of the panels, if not all are shown.
      hidden: bool, broadcastable to the weights, with last axes [T, S]: masked keys. None takes the
      causal mask, if all weights there are 0.
      names: of rows and columns.

    Raises:
      InputError: numbers of labels, layers or heads that do not match the weights.
    """
    depth, count, queries, keys = weights.shape
    columns = tokens if columns is None else columns
    layers = range(depth) if layers is None else layers
    heads = range(count) if heads is None else heads
    named = (len(layers), len(heads), len(tokens), len(columns))
    if named != weights.shape:
        raise InputError(
            f"weights have shape {weights.shape}: layers, heads, tokens and columns name {named}."
        )
    left = NAME + widest(row_ticks(tokens, LINE * LARGEST).labels, LARGEST)
    room = (PAGE - 3 * MARGIN - left - GAP * (count - 1)) / count
    width = min(room, max(110.0, LINE * SMALLEST * keys))
    height = min(max(width * queries / keys, width / 3), 2 * width)
    above = LINE * (SMALLEST + 1) + GAP
    down, along = row_ticks(tokens, height / queries), column_ticks(columns, width / keys)
    name = "layer {}, head {}"
    if text_width(name.format(max(layers), max(heads)), SMALLEST + 1) > width:
        name = "{}.{}"
    sheet = Sheet(
        (width + GAP) * count - GAP,
        (height + above) * depth,
        title=title,
        left=left,
        below=along.depth + NAME,
    )
    colours, hidden = scale(weights, 1.0), hidden_cells(weights, hidden)
    for layer, head in np.ndindex(depth, count):
        low = (height + above) * (depth - 1 - layer)
        axes = sheet.axes((width + GAP) * head, low, width, height)
        draw_cells(axes, weights[layer, head], colours, hidden[layer, head])
        axes.set_title(name.format(layers[layer], heads[head]), fontsize=SMALLEST + 1, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_linewidth(0.5)
        if layer == depth - 1:
            along.put(axes.xaxis)
        if head == 0:
            down.put(axes.yaxis)
    sheet.name_axes(along.named(names[1]), down.named(names[0]))
    sheet.colour_bar(colours, weight_label(hidden))
    return finish(sheet.figure)
