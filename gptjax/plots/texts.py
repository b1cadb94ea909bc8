"""A text with each token coloured by a value."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gptjax.config import InputError
from gptjax.plots.legible import CLEAR, PAGE, finish, ink, scale, shorten, text_width
from gptjax.plots.sheet import LARGEST, MARGIN, Sheet

PITCH = 1.8 * LARGEST  # Points from one line to the next.


def token_values(
    tokens: Sequence[str], values: np.ndarray, *, label: str, title: str = ""
) -> Figure:
    """Plots a text with each token coloured by its value, such as its loss.

    Clearly negative ones are underlined, since in greyscale they look like positive ones.

    Args:
      tokens: T labels; after one that ends in ↵ a new line begins.
      values: [T].
      label: label of the colour bar.
      title: above the text.

    Raises:
      InputError: unequal numbers of values and tokens.
    """
    if np.shape(values) != (len(tokens),):
        raise InputError(f"values have shape {np.shape(values)}: there are {len(tokens)} tokens.")
    width = PAGE - 3 * MARGIN
    positions, lines = _lines(tokens, width)
    sheet = Sheet(width, PITCH * lines, title=title)
    axes = sheet.axes(0, 0, width, PITCH * lines)
    axes.set(xlim=(0, width), ylim=(PITCH * lines, 0))
    axes.set_axis_off()
    colours = scale(values)
    high = 0.85 * PITCH
    for token, (x, y, across), value in zip(tokens, positions, values, strict=True):
        colour = colours.of(value)
        axes.add_patch(Rectangle((x, y), across, high, facecolor=colour, linewidth=0))
        if value < -CLEAR * colours.largest:
            axes.hlines(y + 0.9 * high, x + 1.5, x + across - 1.5, color=ink(colour), linewidth=0.6)
        axes.text(
            x + across / 2,
            y + high / 2,
            shorten(token, LARGEST, width),
            color=ink(colour),
            fontsize=LARGEST,
            ha="center",
            va="center_baseline",
        )
    sheet.colour_bar(colours, label)
    return finish(sheet.figure)


def _lines(tokens: Sequence[str], width: float) -> tuple[list[tuple[float, float, float]], int]:
    """Returns each token's left, top and width in points, and the number of lines."""
    positions, x, line = [], 0.0, 0
    for token in tokens:
        across = min(text_width(token, LARGEST) + 3, width)
        if x + across > width:
            x, line = 0.0, line + 1
        positions.append((x, PITCH * line, across))
        x = width if token.endswith("↵") else x + across + 0.5
    return positions, line + 1
