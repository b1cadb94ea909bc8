"""Sizes, fonts and colours that are legible in print, in greyscale and in any script."""

import dataclasses
import functools
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import noto_cjk_sans_otc
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.typing import ColorType

from gptjax.config import InputError
from gptjax.plots.colours import diverging, sequential
from gptjax.system.outputs import whole_file

PAGE = 518.0
"""Printable width of a page in points: A4 or letter, with margins of half an inch."""

NARROW = 290.0
"""Width in points of a figure that is legible on a phone's 360 pixels."""

SMALLEST = 6.0
"""Smallest text size, points."""

LINE = 1.2
"""Line height relative to the text size."""

SEQUENTIAL, DIVERGING = "gptjax_above", "gptjax_signed"
"""Colour maps of `gptjax.plots.colours`: blue above 0, orange below."""
UNKNOWN, HIDDEN, HATCH = "0.8", "0.95", "0.75"
"""Grey of NaN, grey of masked cells, and the colour of their hatching."""

CLEAR = 0.1
"""The share of the largest value above which a value is clearly not 0."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colour-blind safe palette (Okabe and Ito 2008), without the yellow."""

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 4)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@functools.cache
def colour_map(name: str) -> Colormap:
    """Returns `SEQUENTIAL` or `DIVERGING`, registering it with Matplotlib."""
    colours = sequential() if name == SEQUENTIAL else diverging()
    colormaps.register(ListedColormap(colours, name=name), force=True)
    return colormaps[name]


@functools.cache
def fonts() -> tuple[str, ...]:
    """Returns font families in fallback order: Matplotlib's own, then Noto's CJK.

    Characters that Chinese, Japanese and Korean write differently have the Chinese form.
    """
    fontManager.addfont(str(noto_cjk_sans_otc.FONT_PATH))
    return ("DejaVu Sans", "Noto Sans CJK SC")


@functools.cache
def _glyphs() -> frozenset[int]:
    """Returns the code points for which one of the fonts has a glyph."""
    return frozenset().union(*(get_font(findfont(family)).get_charmap() for family in fonts()))


def token_label(text: str) -> str:
    """Returns a token's text as a label for figures.

    White space becomes visible; control characters, and characters in no font, are escaped.
    """
    text = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return "".join(
        character
        if character.isprintable() and ord(character) in _glyphs()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def check_covered(text: str) -> None:
    """Refuse a text with a character in none of the fonts, which would be drawn as a box."""
    for character in text:
        if character != "\n" and ord(character) not in _glyphs():
            raise InputError(
                f"No font covers {character!r} (U+{ord(character):04X}) of the text {text!r}: "
                "plots.token_label escapes such characters."
            )


def typeset(figure: Figure) -> None:
    """Let every text of a figure fall back on `fonts`.

    Raises:
      InputError: none of them has a character.
    """
    for text in figure.findobj(Text):
        check_covered(text.get_text())
        text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *fonts()])))


def finish(figure: Figure) -> Figure:
    """Returns the figure with our fonts and literal text: a token may have dollar signs."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    typeset(figure)
    return figure


def save(figure: Figure, path: str | Path, *, most_pixels: int = 4000) -> None:
    """Write a figure as its suffix says: .png of at most `most_pixels` per side, .pdf, .svg.

    An existing figure is replaced; `gptjax.system.outputs` says what is not.

    Raises:
      InputError: a character of the figure is in no font, or a suffix that Matplotlib does not
        know, or a path that cannot be written; nothing is.
    """
    path, known = Path(path), figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise InputError(f"cannot write {path}: it must end in .{', .'.join(sorted(known))}.")
    typeset(figure)
    resolution = min(300, math.floor(most_pixels / max(figure.get_size_inches())))
    with whole_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=resolution)


def to_svg(figure: Figure, name: str) -> str:
    """Returns a figure as one svg element, deterministically.

    Text stays text, in the reader's font, so that it can be searched and copied.

    Args:
      figure: to be drawn.
      name: of the figure on its page; prefixes all its ids, so that figures share none.

    Raises:
      InputError: a character of the figure is in no font.
    """
    typeset(figure)
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.sans-serif": ["DejaVu Sans"],
    }
    with rc_context(settings):
        figure.savefig(drawn, format="svg", metadata=nothing)
    element = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    return re.sub(  # Only in tags: text may contain id=" too.
        "<[^>]*>", lambda tag: re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", tag[0]), element
    )


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Returns the width of a text in points.

    Raises:
      InputError: no font has one of its characters.
    """
    check_covered(text)
    font = FontProperties(family=["sans-serif", *fonts()], size=size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def widest(texts: Sequence[str], size: float) -> float:
    """Returns the largest width of several texts in points; 0 for none."""
    return max((text_width(text, size) for text in texts), default=0.0)


def shorten(text: str, size: float, width: float) -> str:
    """Returns a text cut to `width` points, with an ellipsis if cut."""
    if text_width(text, size) <= width:
        return text
    kept = text
    while kept and text_width(kept + "…", size) > width:
        kept = kept[:-1]
    return kept + "…" if kept else ""


def wrap(text: str, size: float, width: float) -> str:
    """Returns a text in lines of at most `width` points, broken at spaces, or within long words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(longer, size) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if text_width(lines[-1] + character, size) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Colours:
    """A colour map with its range."""

    cmap: Colormap
    least: float
    largest: float

    @property
    def norm(self) -> Normalize:
        """Normalises values to 0 to 1."""
        return Normalize(self.least, self.largest)

    def of(self, value: float) -> tuple[float, float, float]:
        """Returns red, green and blue of a value, each from 0 to 1."""
        red, green, blue, _ = self.cmap(float(self.norm(value)))
        return red, green, blue

    def mappable(self) -> ScalarMappable:
        """Returns Matplotlib's mappable for a colour bar."""
        return ScalarMappable(self.norm, self.cmap)


def scale(values: np.ndarray, most: float | None = None) -> Colours:
    """Returns colours for values: centred at 0 if some are negative; grey for NaN.

    They go from 0 to `most`; without it, from the minimum to the maximum, so that small
    differences are visible.
    """
    finite = values[np.isfinite(values)]
    largest = most or float(np.abs(finite).max(initial=0)) or 1.0
    if (finite < 0).any():
        name, least = DIVERGING, -largest
    else:
        name, least = SEQUENTIAL, 0.0 if most else float(finite.min(initial=largest))
        least = least if least < largest else 0.0  # A single value has no range.
    return Colours(colour_map(name).with_extremes(bad=UNKNOWN), least, largest)


def luminance(colour: ColorType) -> float:
    """Returns the relative luminance of a colour, from 0 to 1 (WCAG 2.2)."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def ink(background: ColorType) -> str:
    """Returns black or white, whichever contrasts more: at least 4.58 to 1 (WCAG 2.2)."""
    bright = luminance(background) + 0.05
    return "black" if bright / 0.05 > 1.05 / bright else "white"
