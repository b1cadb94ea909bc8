"""A figure as a notebook shows it: sharp on any screen, and in words for who does not see it."""

import base64
import html
import io
from collections.abc import Iterator

from matplotlib.figure import Figure

PIXELS = 96
"""Of a browser's, an inch: a point of a figure is a point on its page."""
DENSITY = 2
"""Pixels of a screen of high density for one of those, each way."""
COLOUR_BAR = "colour bar"
"""The label of axes that say what colours mean."""


class InlineFigure(Figure):
    """A figure that any notebook shows without being told how to, Colab's too.

    It is an element of HTML, since notebooks show an image's own metadata in different ways or not
    at all: https://github.com/jupyter/accessibility/issues/98.
    """

    def _repr_html_(self) -> str:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png", dpi=DENSITY * PIXELS)
        data = base64.b64encode(drawn.getvalue()).decode()
        width, words = round(PIXELS * self.get_figwidth()), html.escape(in_words(self))
        style = "max-width: 100%; height: auto; background: white"
        source = f"data:image/png;base64,{data}"
        return f'<img width="{width}" style="{style}" alt="{words}" src="{source}">'


def in_words(figure: Figure) -> str:
    """The alternative text of a figure: its label where it has one, or what is written around it.

    That is its titles, what goes along its axes and what its lines and colours are called.
    """
    if figure.get_label():
        return str(figure.get_label())
    colours = [axes for axes in figure.axes if axes.get_label() == COLOUR_BAR]
    panels = [axes for axes in figure.axes if axes not in colours]
    parts = {
        "": [figure.get_suptitle(), *(axes.get_title() for axes in panels)],
        "down: ": [figure.get_supylabel(), *(axes.get_ylabel() for axes in panels)],
        "across: ": [figure.get_supxlabel(), *(axes.get_xlabel() for axes in panels)],
        "lines: ": _legends(figure),
        "colours: ": [axes.get_xlabel() for axes in colours],
    }
    said = {
        name: "; ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text))
        for name, texts in parts.items()
    }
    return ". ".join(f"{name}{words}" for name, words in said.items() if words)


def _legends(figure: Figure) -> Iterator[str]:
    own = (axes.get_legend() for axes in figure.axes)
    for legend in [*figure.legends, *filter(None, own)]:
        yield from (text.get_text() for text in legend.get_texts())
