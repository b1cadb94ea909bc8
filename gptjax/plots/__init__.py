"""Matplotlib figures of runs and of model internals: NumPy arrays in, a `Figure` out.

Made for print: no wider than a page, no text under 6 points, colour-blind safe colours whose order
survives greyscale. Notebooks show them as they are (inline.py).

The first layer is on top, in all figures and in the attention page. Blue is above 0, orange below;
attention weights are scaled from 0 to 1, other values from their minimum to their maximum.
"""

from gptjax.plots.comparisons import (
    FittedLine,
    Points,
    curves_by_variant,
    difference_panels,
    differences,
    frontier,
    loss_by_rate,
    pareto,
    scaling,
    signed,
)
from gptjax.plots.curves import bars, curves, loss_curve
from gptjax.plots.heads import attention_grid
from gptjax.plots.heatmaps import (
    attention_map,
    heat_map,
    logit_lens_table,
    patching_map,
    restored,
    score_grid,
)
from gptjax.plots.legible import NARROW, PAGE, luminance, save, to_svg, token_label
from gptjax.plots.texts import token_values
from gptjax.plots.watched import watched

__all__ = [
    "NARROW",
    "PAGE",
    "FittedLine",
    "Points",
    "attention_grid",
    "attention_map",
    "bars",
    "curves",
    "curves_by_variant",
    "difference_panels",
    "differences",
    "frontier",
    "heat_map",
    "logit_lens_table",
    "loss_by_rate",
    "loss_curve",
    "luminance",
    "pareto",
    "patching_map",
    "restored",
    "save",
    "scaling",
    "score_grid",
    "signed",
    "to_svg",
    "token_label",
    "token_values",
    "watched",
]
