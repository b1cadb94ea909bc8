"""Matplotlib figures of what a run measured and of what a model does: numpy in, a `Figure` out.

Made for paper: no wider than a page, no text under 6 points, colours that the colour-blind tell
apart and that stay in order in grey. In a notebook they are shown after `%matplotlib inline`.
"""

from gptjax.plots.curves import bars, curves, loss_curve
from gptjax.plots.heads import attention_grid
from gptjax.plots.heatmaps import (
    attention_map,
    heat_map,
    logit_lens_table,
    patching_map,
    score_grid,
)
from gptjax.plots.legible import save, token_label
from gptjax.plots.texts import token_values

__all__ = [
    "attention_grid",
    "attention_map",
    "bars",
    "curves",
    "heat_map",
    "logit_lens_table",
    "loss_curve",
    "patching_map",
    "save",
    "score_grid",
    "token_label",
    "token_values",
]
