"""gptjax/layers/README.md names every hook point with its axes, and what published models take."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import PRESETS, TransformerConfig, build, probe
from gptjax.layers.hooks import ATTENTION, BLOCK, POINTS, PRE_ACTIVATION, Hooks
from gptjax.layers.mlp import MLP

README = (Path(__file__).parents[2] / "gptjax" / "layers" / "README.md").read_text()
SIZES = {
    "vocab_size", "context_length", "depth", "encoder_depth", "width", "heads",
    "head_dim", "mlp_dim", "dropout",
}  # fmt: skip
TINY = TransformerConfig(
    family="encoder_decoder",
    vocab_size=13,
    context_length=9,
    depth=3,
    width=20,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_dim=24,
)
AXES = {"L": 3, "B": 1, "T": 7, "S": 7, "D": 20, "N": 4, "K": 2, "H": 6, "F": 24}
SOURCE = 5


def rows(heading: str) -> list[list[str]]:
    """The rows of a section's table."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.mark.slow
def test_every_hook_point_has_the_axes_that_are_told():
    told = {name.strip("`"): axes.split() for name, axes, *_ in rows("Hook points")}
    assert told.keys() == POINTS.keys()
    model = build(TINY, rngs=nnx.Rngs(0))
    asked = [*BLOCK, *(f"cross_{name}" for name in ATTENTION), *(f"encoder_{n}" for n in BLOCK)]
    tokens, source = np.zeros((1, AXES["T"]), int), np.zeros((1, SOURCE), int)
    captured = probe.observe(model, tokens, asked, source=source).captured
    expected = {}
    for name in asked:
        sizes = AXES | ({"T": SOURCE, "S": SOURCE} if name.startswith("encoder_") else {})
        sizes |= {"S": SOURCE} if name.startswith("cross_") else {}
        axes = told[name.removeprefix("cross_").removeprefix("encoder_")]
        expected[name] = tuple(sizes[axis] for axis in axes)
    assert jax.tree.map(jnp.shape, captured) == expected
    hook = Hooks((PRE_ACTIVATION,))  # A layer has it, though `observe` does not offer it.
    MLP(TINY, rngs=nnx.Rngs(0))(jnp.zeros((1, AXES["T"], AXES["D"])), hook)
    shape = hook.captured[PRE_ACTIVATION].shape
    assert (AXES["L"], *shape) == tuple(AXES[axis] for axis in told[PRE_ACTIVATION])


def test_every_axis_has_a_letter():
    letters = [letter for letter, *_ in rows("Axes")]
    assert len(set(letters)) == len(letters)
    assert {axis for point in POINTS.values() for axis in point.axes} <= set(letters)


def test_published_models_take_the_values_that_are_told():
    told = {}
    for _, names, values in rows("From a published model to its values"):
        values = set(re.findall("`(.+?)`", values))
        told |= dict.fromkeys(re.findall("`(.+?)`", names), values)
    # What presets of ours have otherwise is a size.
    assert PRESETS.keys() - told.keys() == {"shakespeare-char", "gpt-j-style", "neox-style"}
    for name, values in told.items():
        config = PRESETS[name]
        assert values == {
            f"{field.name}={value}"
            for field in dataclasses.fields(config)
            if (value := getattr(config, field.name)) != field.default
            and field.name not in SIZES
            and (field.name != "kv_heads" or value == 1)  # More of them are a size.
        }, name
