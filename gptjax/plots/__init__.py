"""Matplotlib figures of what a run measured and of what a model does: numpy in, a `Figure` out.

Made for paper: no wider than a page, no text under 6 points, colours that the colour-blind tell
apart and that stay in order in grey. A notebook shows them as they are (inline.py).

The first layer is on top, in all of them and in the page of attention. Blue is above 0, orange
below; attention weights go from 0 to 1, other values from the least to the largest there is.
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
]
