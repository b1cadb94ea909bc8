"""Names of variants beside a figure: whole, in lines that end where a name has parts."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.plots.curves import SIZE
from gptjax.plots.legible import LINE, shorten, text_width, token_label

NAME = 200.0
"""Points that a line of a name may take."""
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


def pitch(names: Sequence[str]) -> float:
    """Points that a row needs whose name is as high as the highest one."""
    lines = max((name_label(name).count("\n") + 1 for name in names), default=1)
    return SIZE * (1 + LINE * lines)


def legend_height(names: Sequence[str]) -> float:
    """Points that `legend_below` takes of as many such names."""
    return -(-len(names) // 2) * (pitch(names) - SIZE / 2)


def legend_below(figure: Figure, axes: Axes) -> None:
    """All labels of the axes, in two columns under the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(2, len(handles)),
            frameon=False,
            fontsize=SIZE,
            handlelength=4,
        )
