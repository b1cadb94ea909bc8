"""Matplotlib figures of what a run measured and of what a model does."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def loss_curve(lines: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Training and validation loss over steps, from the lines of `metrics.jsonl`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trained = [(line["step"], line["cross_entropy"]) for line in lines]
    held_out = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    axes.plot(*zip(*trained, strict=True), color="#7aa6c2", linewidth=1, label="training batch")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color="#b5402c",
            marker="o",
            markersize=4,
            label="validation",
        )
        step, loss = held_out[-1]
        axes.annotate(
            f"{loss:.3f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def attention_grid(weights: np.ndarray, tokens: Sequence[str], title: str = "") -> Figure:
    """Every head of every layer: a row of the grid is a layer, a column a head.

    In a panel, a row is a token that looks and a column a token that is looked at; each row sums
    to 1.

    Args:
      weights: [L, N, T, T].
      tokens: T labels.
      title: above the grid.
    """
    layers, heads, length, _ = weights.shape
    side = max(2.2, 0.085 * length)
    figure = Figure(figsize=(side * heads + 0.8, side * layers + 0.9), layout="constrained")
    panels = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    image = None
    for layer, head in np.ndindex(layers, heads):
        axes = cast(Axes, panels[layer, head])
        image = axes.imshow(weights[layer, head], cmap="magma_r", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(range(length), tokens, fontsize=5, family="monospace", parse_math=False)
        axes.tick_params(length=0, pad=1)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("is looked at", fontsize=9)
    figure.supylabel("looks", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.5, label="attention weight")
    return figure


def token_label(text: str) -> str:
    """A token's text as it can stand on an axis: white space and control characters visible."""
    text = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def save(figure: Figure, path: Path, *, most_pixels: int = 4000) -> None:
    """Write a PNG of at most `most_pixels` a side."""
    dpi = min(160, math.floor(most_pixels / max(figure.get_size_inches())))
    with warnings.catch_warnings():
        # Matplotlib's own font has no Chinese, say: such a label becomes a box, which shows itself.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(path, dpi=dpi)
