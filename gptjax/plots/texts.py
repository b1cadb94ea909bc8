"""A text whose tokens are coloured by a value each."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gptjax.plots.legible import LINE, PAGE, finish, ink, scale, shorten, text_width, wrap

SIZE = 8.0  # Points of text.
MARGIN, BAR = 8.0, 72.0  # Points around all, and for the colour bar.


def token_values(
    tokens: Sequence[str], values: np.ndarray, *, label: str, title: str = ""
) -> Figure:
    """A text in lines, every token coloured by its value: its loss, say.

    Args:
      tokens: T labels; after one that ends in ↵ a new line begins.
      values: [T].
      label: what the values are.
      title: above the text.
    """
    values = np.asarray(values, float)
    colours = scale(values)
    width, high = PAGE - 2 * MARGIN - BAR, 2 * LINE * SIZE
    title = wrap(title, SIZE + 2, PAGE - 2 * MARGIN)
    above = MARGIN + LINE * (SIZE + 2) * (title.count("\n") + 1 if title else 0)
    places, lines = _lines(tokens, width)
    height = max(high * lines, 60.0) + above + MARGIN
    figure = Figure(figsize=(PAGE / 72, height / 72))
    text = (MARGIN / PAGE, MARGIN / height, width / PAGE, 1 - (above + MARGIN) / height)
    axes = figure.add_axes(text)
    axes.set(xlim=(0, width), ylim=(height - above - MARGIN, 0))
    axes.set_axis_off()
    for token, (x, line, across), value in zip(tokens, places, values, strict=True):
        colour = colours.of(value)
        corner = (x, line * high)
        axes.add_patch(Rectangle(corner, across, 0.8 * high, facecolor=colour, linewidth=0))
        axes.text(
            x + across / 2,
            (line + 0.4) * high,
            shorten(token, SIZE, width),
            color=ink(colour),
            fontsize=SIZE,
            ha="center",
            va="center_baseline",
        )
    bar = figure.add_axes((1 - (BAR - 8) / PAGE, text[1], 8 / PAGE, min(120 / height, text[3])))
    figure.colorbar(colours.mappable(), cax=bar).set_label(label, fontsize=SIZE)
    bar.tick_params(labelsize=SIZE - 1)
    figure.suptitle(title, fontsize=SIZE + 2, y=1 - MARGIN / height, va="top")
    return finish(figure)


def _lines(tokens: Sequence[str], width: float) -> tuple[list[tuple[float, int, float]], int]:
    """Where each token stands (points from the left, line, points across), and the lines."""
    places, x, line = [], 0.0, 0
    for token in tokens:
        across = min(text_width(token, SIZE) + 3, width)
        if x + across > width:
            x, line = 0.0, line + 1
        places.append((x, line, across))
        x = width if token.endswith("↵") else x + across + 0.5
    return places, line + 1
