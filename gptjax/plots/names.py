"""Labels of variants in figures: full names, broken into lines between their parts."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.plots.curves import SIZE
from gptjax.plots.legible import LINE, PAGE, shorten, text_width, token_label

NAME = 200.0
"""Greatest width of a line of a name, points."""
HANDLE = 50.0
"""Width of a legend's line sample, points."""
MOST_LINES = 4


def name_label(name: str, width: float = NAME) -> str:
    """Returns a variant's name in lines of at most `width` points, characters in no font escaped.

    Lines end after a comma, colon or equals sign; more than four lines end in an ellipsis.
    """
    shown = "".join(character if character == " " else token_label(character) for character in name)
    lines = [""]
    for piece in re.findall("[^,:=]*[,:=]|[^,:=]+", shown):
        if lines[-1] and text_width(lines[-1] + piece, SIZE) > width:
            lines.append("")
        lines[-1] += piece
    kept = lines[: MOST_LINES - 1]
    rest = "".join(lines[MOST_LINES - 1 :])
    return "\n".join(shorten(line, SIZE, width) for line in ([*kept, rest] if rest else kept))


def pitch(names: Sequence[str], width: float = NAME) -> float:
    """Returns the row height in points that fits the name with most lines."""
    lines = max((name_label(name, width).count("\n") + 1 for name in names), default=1)
    return SIZE * (1 + LINE * lines)


def legend_columns(width: float) -> int:
    """Returns the legend columns that fit into `width` points."""
    return 2 if width >= 2 * (NAME + HANDLE) else 1


def legend_height(names: Sequence[str], width: float = PAGE) -> float:
    """Returns the height of `legend_below` for these names, in points."""
    return -(-len(names) // legend_columns(width)) * (pitch(names) - SIZE / 2)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Draw the axes' legend in columns below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(legend_columns(72 * figure.get_figwidth()), len(handles)),
            frameon=False,
            fontsize=SIZE,
            handlelength=4,
        )
