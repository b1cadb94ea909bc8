"""What `--train.watch` measured: a panel for each measurement, a line for each layer."""

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from gptjax.plots.curves import SIZE, line_style
from gptjax.plots.inline import InlineFigure
from gptjax.plots.legible import PAGE, SEQUENTIAL, colour_map, finish

COLUMNS, HEIGHT = 3, 128.0
LOGARITHMIC = ("parameters", "gradients", "updates")
NAMES = {
    "parameters": "norm of parameters",
    "gradients": "norm of gradients",
    "updates": "norm of updates",
    "residual": "residual, RMS",
    "attention_output": "attention output, RMS",
    "mlp_output": "MLP output, RMS",
    "largest_score": "largest attention score",
    "attention_entropy": "attention entropy, nats",
    "dead_units": "share of dead units",
    "token_entropy": "token entropy, nats",
}
KINDS = [cross + kind for cross in ("", "cross_") for kind in NAMES]
"""In the order of the panels."""
LAYER = re.compile(r"(\w+)/(.+)\.(\d+)")


def watched(lines: Sequence[dict[str, Any]]) -> Figure | None:
    """Plots what is watched, from the lines of `metrics.jsonl`; None if nothing is.

    The lines of layers go from dark, the first layer, to light; what is outside the layers has a
    name.
    """
    found = {name.partition("/")[0] for line in lines for name in line if "/" in name}
    panels = [kind for kind in KINDS if kind in found]
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure = InlineFigure(figsize=(PAGE / 72, HEIGHT * rows / 72), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, kind in zip(grid.flat, panels, strict=False):
        series: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for name, value in line.items():
                if name.startswith(f"{kind}/"):
                    series.setdefault(name, []).append((line["step"], value))
        depths = [int(layer[3]) for name in series if (layer := LAYER.fullmatch(name))]
        named = 0
        for name, points in series.items():
            layer = LAYER.fullmatch(name)
            style: dict[str, Any] = line_style(named, len(points))
            if layer is None:
                named += 1
                axes.plot(*zip(*points, strict=True), **style, label=name.partition("/")[2])
                continue
            colour = colour_map(SEQUENTIAL)(1 - 0.65 * int(layer[3]) / max(1, *depths))
            dashed = "--" if layer[2] == "encoder" else "-"
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashed, linewidth=1)
        positive = all(value > 0 for points in series.values() for _, value in points)
        if kind.removeprefix("cross_") in LOGARITHMIC and positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        title = NAMES[kind.removeprefix("cross_")]
        axes.set_title(f"cross: {title}" if kind.startswith("cross_") else title, fontsize=SIZE)
        axes.tick_params(labelsize=SIZE - 1)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if named > 1:
            axes.legend(frameon=False, fontsize=SIZE - 2)
    figure.supxlabel("step; layers from dark, the first, to light", fontsize=SIZE)
    return finish(figure)
