"""Names of variants beside a figure: whole, in lines that end where a name has parts."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.plots.curves import SIZE
from gptjax.plots.legible import LINE, PAGE, shorten, text_width, token_label

NAME = 200.0
"""Points that a line of a name may take."""
HANDLE = 50.0
"""Points that the sample of a line beside its name takes."""
MOST_LINES = 4


def name_label(name: str, width: float = NAME) -> str:
    """A variant's name in lines of at most `width` points, what no font has escaped.

    Lines end behind a comma, colon or equals sign; what is longer than four ends in an ellipsis.
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
    """Points that a row needs whose name is as high as the highest one."""
    lines = max((name_label(name, width).count("\n") + 1 for name in names), default=1)
    return SIZE * (1 + LINE * lines)


def legend_columns(width: float) -> int:
    """Columns of names that a figure of so many points has room for."""
    return 2 if width >= 2 * (NAME + HANDLE) else 1


def legend_height(names: Sequence[str], width: float = PAGE) -> float:
    """Points that `legend_below` takes of as many such names."""
    return -(-len(names) // legend_columns(width)) * (pitch(names) - SIZE / 2)


def legend_below(figure: Figure, axes: Axes) -> None:
    """All labels of the axes, in columns under the figure."""
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
