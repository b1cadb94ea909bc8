import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from gptjax.config import TransformerConfig
from gptjax.ledger import ledger
from gptjax.presets import preset
from gptjax.training.checkpoint import leaf_names
from gptjax.transformer import Decoder, split

SMALL = TransformerConfig(vocab_size=37, context=6, depth=3, width=8, heads=2)
GRID = {
    "plain": SMALL,
    "no bias": dataclasses.replace(SMALL, bias=False),
    "untied": dataclasses.replace(SMALL, tied=False),
    "rotary": dataclasses.replace(SMALL, positions="rotary"),
    "no positions": dataclasses.replace(SMALL, positions="none"),
    "rmsnorm": dataclasses.replace(SMALL, norm="rmsnorm"),
    "rmsnorm, no bias": dataclasses.replace(SMALL, norm="rmsnorm", bias=False),
    "hidden": dataclasses.replace(SMALL, hidden=20),
    "scanned": dataclasses.replace(SMALL, scan_layers=True),
    "remat": dataclasses.replace(SMALL, remat=True),
    "all": dataclasses.replace(
        SMALL, bias=False, tied=False, positions="none", norm="rmsnorm", hidden=12
    ),
}
EVERY_CONFIG = pytest.mark.parametrize("config", GRID.values(), ids=GRID.keys())


def _leaves(config: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's parameters by name, as shapes: nothing is computed."""
    _, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))


def _part(name: str) -> str:
    """The ledger's name for the leaf called `name`."""
    *modules, kind = name.split(".")
    if modules[-1].endswith("norm"):
        return "norms"
    if kind == "bias":
        return "biases"
    return {"head": "unembedding"}.get(modules[-1], modules[-1])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_has_the_published_number_of_parameters(name, parameters):
    assert ledger(preset(name)).parameters == parameters
    assert sum(math.prod(leaf.shape) for leaf in _leaves(preset(name)).values()) == parameters


@EVERY_CONFIG
def test_parameters_by_part_are_the_leaves_of_the_model(config):
    counted: dict[str, int] = {}
    for name, leaf in _leaves(config).items():
        counted[_part(name)] = counted.get(_part(name), 0) + math.prod(leaf.shape)
    assert {part.name: part.parameters for part in ledger(config).parts} == counted
    assert ledger(config).parameters == sum(counted.values())


@EVERY_CONFIG
def test_matrices_by_part_are_the_leaves_of_the_model(config):
    counted: dict[str, int] = {}
    for name, leaf in _leaves(config).items():
        layers = leaf.shape[0] if name.startswith("blocks.") else 1
        counted[_part(name)] = counted.get(_part(name), 0) + layers
    assert {part.name: part.matrices for part in ledger(config).parts} == counted


def _product_flops(jaxpr: Jaxpr) -> int:
    """Two operations a multiply-add of every matrix product in `jaxpr`, sub-programs included.

    An inner product row by row, [B, D] · [B, D] → [B], is none: it costs what a norm costs.
    """
    total = 0
    equations: list[Any] = jaxpr.eqns
    for equation in equations:
        if equation.primitive.name == "dot_general":
            left, right = (variable.aval.shape for variable in equation.invars)
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            if min(len(left), len(right)) > len(contracted) + len(batch):
                multiplied = math.prod(left[axis] for axis in contracted)
                total += 2 * multiplied * math.prod(equation.outvars[0].aval.shape)
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeats * sum(map(_product_flops, jaxprs_in_params(equation.params)))
    return total


def test_products_are_counted_within_batches_scans_and_custom_derivatives():
    @jax.custom_vjp
    def multiply(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    multiply.defvjp(lambda x, y: (multiply(x, y), None), lambda _, gradient: (gradient, gradient))

    def repeated(x):
        step = jax.jit(jax.checkpoint(multiply))
        return jax.lax.scan(lambda carry, _: (step(carry, carry), None), x, length=5)[0]

    x = jnp.zeros((7, 3, 3))
    assert _product_flops(jax.make_jaxpr(repeated)(x).jaxpr) == 5 * 7 * 2 * 3 * 3 * 3
    row_by_row = jax.make_jaxpr(lambda x: jnp.einsum("bd,bd->b", x, x))(jnp.zeros((4, 3)))
    assert _product_flops(row_by_row.jaxpr) == 0


@EVERY_CONFIG
def test_forward_flops_are_those_of_every_product_at_full_context(config):
    graphdef, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((5, config.context), jnp.int32)
    forward = jax.make_jaxpr(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    products = _product_flops(forward(params, tokens).jaxpr)
    assert products == tokens.size * ledger(config).forward_flops


@EVERY_CONFIG
def test_training_flops_are_those_of_every_product_and_leave_recomputation_out(config):
    unrecomputed = dataclasses.replace(config, remat=False)
    graphdef, params = split(nnx.eval_shape(lambda: Decoder(unrecomputed, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((5, config.context), jnp.int32)
    gradient = jax.make_jaxpr(
        jax.grad(lambda params, tokens: nnx.merge(graphdef, params)(tokens).sum())
    )
    products = _product_flops(gradient(params, tokens).jaxpr)
    assert products == tokens.size * ledger(config).training_flops


@EVERY_CONFIG
def test_the_attention_term_is_what_grows_with_the_context(config):
    longer = ledger(dataclasses.replace(config, context=2 * config.context))
    counted = ledger(config)
    assert longer.attention_flops == 2 * counted.attention_flops
    assert longer.matrix_flops == counted.matrix_flops
    assert counted.forward_flops == counted.matrix_flops + counted.attention_flops


@EVERY_CONFIG
def test_bytes_are_those_of_the_training_state(config):
    _, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    adamw = jax.tree.leaves(jax.eval_shape(optax.adamw(1e-3).init, params))
    moments = [leaf for leaf in adamw if leaf.ndim]  # The other is the count of steps.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert ledger(config).state_bytes == {
        "parameters": size,
        "gradients": size,
        "optimizer (AdamW)": sum(leaf.size * leaf.dtype.itemsize for leaf in moments),
    }
