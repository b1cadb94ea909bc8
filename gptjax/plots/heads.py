"""Every head of every layer at once."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.plots.heatmaps import (
    BAR,
    GAP,
    LARGEST,
    MARGIN,
    TITLE,
    colour_bar,
    column_ticks,
    row_ticks,
)
from gptjax.plots.legible import LINE, PAGE, SMALLEST, finish, scale, text_width, widest, wrap


def attention_grid(
    weights: np.ndarray,
    tokens: Sequence[str],
    title: str = "",
    *,
    columns: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Attention of heads side by side: a row of the grid is a layer, a column a head.

    In a panel, a row is a token that looks and a column a token that is looked at; each row sums
    to 1. The grid is as wide as a page at most: where a panel has no room for all its tokens, it
    names one in several and says so, and small panels are called 3.5 for layer 3, head 5.

    Args:
      weights: [L, N, T, S].
      tokens: T labels.
      title: above the grid.
      columns: S labels, where the keys are other tokens than the queries.
      layers, heads: the L and N numbers that the panels have, if not all are shown.
    """
    columns = tokens if columns is None else columns
    count_layers, count_heads, queries, keys = weights.shape
    layers = range(count_layers) if layers is None else layers
    heads = range(count_heads) if heads is None else heads

    left = MARGIN + LINE * LARGEST + widest(row_ticks(tokens, LINE * LARGEST).labels, LARGEST) + GAP
    room = (PAGE - left - 2 * MARGIN - GAP * (count_heads - 1)) / count_heads
    width = min(room, max(110.0, LINE * SMALLEST * keys))
    height = min(max(width * queries / keys, width / 3), 2 * width)
    down, along = row_ticks(tokens, height / queries), column_ticks(columns, width / keys)
    name = "layer {}, head {}"
    if text_width(name.format(max(layers), max(heads)), SMALLEST + 1) > width:
        name = "{}.{}"
    above = LINE * (SMALLEST + 1) + GAP
    bottom = MARGIN + BAR + 2 * GAP + LINE * LARGEST + along.depth
    across = max(left + (width + GAP) * count_heads - GAP + 2 * MARGIN, 180.0)
    title = wrap(title, TITLE, across - 2 * MARGIN)
    lines = title.count("\n") + 1 if title else 0
    tall = bottom + (height + above) * count_layers + MARGIN + lines * LINE * TITLE

    figure = Figure(figsize=(across / 72, tall / 72))
    panels = figure.subplots(count_layers, count_heads, squeeze=False)
    colours = scale(weights, 1.0)
    for layer, head in np.ndindex(count_layers, count_heads):
        axes = cast(Axes, panels[layer, head])
        low = bottom + (height + above) * (count_layers - 1 - layer)
        at = left + (width + GAP) * head
        axes.set_position((at / across, low / tall, width / across, height / tall))
        axes.imshow(weights[layer, head], cmap=colours.cmap, norm=colours.norm, aspect="auto")
        axes.set_title(name.format(layers[layer], heads[head]), fontsize=SMALLEST + 1, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_linewidth(0.5)
        if layer == count_layers - 1:
            along.put(axes.xaxis)
        if head == 0:
            down.put(axes.yaxis)
    wide = (width + GAP) * count_heads - GAP
    middle = (bottom + (height + above) * count_layers / 2) / tall
    figure.supylabel(down.named("looks"), x=MARGIN / across, y=middle, fontsize=LARGEST, ha="left")
    figure.supxlabel(
        along.named("is looked at"),
        x=(left + wide / 2) / across,
        y=(MARGIN + BAR + GAP) / tall,
        fontsize=LARGEST,
        va="bottom",
    )
    colour_bar(figure, colours, "attention weight", left=left, width=wide)
    figure.suptitle(title, y=1 - MARGIN / tall, fontsize=TITLE, va="top")
    return finish(figure)
