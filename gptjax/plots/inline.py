"""Notebook display of figures: sharp on any screen, with alternative text."""

import base64
import html
import io
from collections.abc import Iterator

from matplotlib.figure import Figure

PIXELS = 96
"""CSS pixels per inch: a point of a figure is a point on the page."""
DENSITY = 2
"""Device pixels per CSS pixel of a high-density screen."""
COLOUR_BAR = "colour bar"
"""The label of a colour bar's axes."""


class InlineFigure(Figure):
    """A figure that any notebook displays without configuration, Colab too.

    It is an HTML element, since notebooks treat image metadata differently or ignore it:
    https://github.com/jupyter/accessibility/issues/98.
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
    """Returns a figure's alternative text: its label, or else the text around it.

    That is its titles, axis labels, legends and colour bar labels.
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
