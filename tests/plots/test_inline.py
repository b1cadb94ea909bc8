"""What a notebook shows of a figure."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from IPython.core.formatters import DisplayFormatter
from matplotlib.image import imread

from gptjax import plots
from gptjax.plots.inline import in_words


def image_of(figure) -> dict[str, str]:
    """The attributes of the one element that a notebook shows."""
    formats, _ = DisplayFormatter().format(figure)  # pyright: ignore[reportGeneralTypeIssues]
    assert formats.keys() == {"text/plain", "text/html"}
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Reader().feed(formats["text/html"])
    ((tag, attributes),) = found
    assert tag == "img"
    return attributes


def curves():
    steps = np.arange(5)
    values = {'a "variant"': steps, "another": steps**2}
    return plots.curves(steps, values, xlabel="step", ylabel="loss", title="A < B")


def test_a_figure_is_sharp_on_a_screen_of_high_density():
    figure = curves()
    shown = image_of(figure)
    prefix, data = shown["src"].split(",")
    assert prefix == "data:image/png;base64"
    pixels = imread(io.BytesIO(base64.b64decode(data)))
    assert int(shown["width"]) == round(96 * figure.get_figwidth())
    assert abs(pixels.shape[1] - 2 * int(shown["width"])) <= 2
    assert len(np.unique(pixels)) > 10  # Something is drawn.


def test_its_words_are_those_around_it():
    assert image_of(curves())["alt"] == (
        'A < B. down: loss. across: step. lines: a "variant"; another'
    )
    weights = np.tril(np.ones((1, 2, 3, 3))) / np.arange(1, 4)[:, None]
    words = in_words(plots.attention_grid(weights, ["a", "b", "c"], "the title"))
    assert re.fullmatch(
        r"the title; layer 0, head 0; layer 0, head 1\. down: query\. "
        r"across: key\. colours: attention weight; hatched: mask",
        words,
    )


def test_a_label_stands_for_them():
    figure = curves()
    figure.set_label("B overtakes A at step 2.")
    assert image_of(figure)["alt"] == "B overtakes A at step 2."
